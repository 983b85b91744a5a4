# make app     set up .venv once, then start the workbench in the browser
# make test    set up .venv once, then every check: ruff, mypy, pytest
# make lint    only the checks that run no code
# make format  let ruff rewrite what it can
# make figures make the figures of the README and the stored examples of the app
# make findings  run every analysis on organism-mid and make the figures of docs/findings.md; it goes on where it was stopped
# make benchmark  time the sweep against other tools; ARGS="--shapes gpt2-medium --rounds 3" says on what
# make clean   remove what the above made
#
# PYTHON=python3.12      which Python makes .venv (3.10 or newer)
# TORCH_INDEX=<url>      one more place to look for torch: https://download.pytorch.org/whl/cpu has small builds without CUDA
# WORKERS=4              processes for pytest and findings; ARGS="-k rome" adds to pytest's command line
# FACTS=20               how many facts findings takes

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
FACTS ?= 100
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip --no-input --disable-pip-version-check install --quiet --constraint constraints.txt

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help app test lint format figures findings benchmark clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# torch goes first, on its own: a CPU build that pip finds is then kept, and nothing later asks for a CUDA one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "make: '$(PYTHON)' is not Python 3.10 or newer. Name one that is: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: '$(PYTHON)' cannot make virtual environments. Install its venv module first (on Debian: apt install python3-venv)."; exit 1; }
	@echo "Setting up $(VENV). The first time takes some minutes; later only when pyproject.toml or constraints.txt change."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) --editable '.[dev]'
	@touch $@

app: $(STAMP)
	$(BIN)/python -m streamlit run streamlit_app.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: pytest has the processes. The tests never ask a model hub.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(STAMP)
	$(BIN)/workbench average --model organism-mid --every 17 --limit 100 --out results/average
	cp results/average/average.png results/average/average.pdf docs/figures/
	$(BIN)/workbench compare --model organism-mid --every 175 --figures png --out results/compare
	cp results/compare/compare.png docs/figures/
	$(BIN)/python -m workbench.zoo.examples

findings: export OMP_NUM_THREADS ?= 1
findings: export TQDM_DISABLE := 1
findings: $(STAMP)
	mkdir -p docs/figures/findings
	$(BIN)/workbench analyses | cut -d' ' -f1 | xargs -P $(WORKERS) -I NAME \
		$(BIN)/workbench run NAME --model organism-mid --limit $(FACTS) --figures png --out results/findings
	for name in $$($(BIN)/workbench analyses | cut -d' ' -f1) located_vs_edited-1; do \
		cp results/findings/$$name.png docs/figures/findings/ || exit 1; \
	done

benchmark: $(STAMP)
	$(BIN)/python -m tests.benchmarks.sweep $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
