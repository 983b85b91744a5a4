"""`python -m workbench`: the command line."""

from workbench.cli import app

if __name__ == "__main__":
    app()
