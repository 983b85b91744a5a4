"""Editors: each turns facts into an `Edit`, data that says what changes. One file a method."""

from workbench.editors.base import Editor, edit_stream, reserving
from workbench.edits import Edit, EditError, LowRank
from workbench.facts import FactError
from workbench.registry import discover

__all__ = ["Edit", "EditError", "Editor", "LowRank", "all_editors", "edit_stream", "editor_named", "reserving"]


def all_editors() -> dict[str, type[Editor]]:
    """Every editor by its class name, sorted."""
    return discover(__name__, Editor)  # type: ignore[type-abstract]  # a base class is what is wanted


def editor_named(name: str) -> type[Editor]:
    """The editor of a class name.

    Raises:
        FactError: there is none.
    """
    known = all_editors()
    if name not in known:
        raise FactError(f"No editor is called {name!r}. Use one of {', '.join(known)}.")
    return known[name]
