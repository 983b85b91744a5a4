"""Editors: each turns facts into an `Edit`, data that says what changes. One file a method."""

from workbench.editors.base import Editor, edit_stream
from workbench.edits import Edit, EditError, LowRank
from workbench.registry import discover

__all__ = ["Edit", "EditError", "Editor", "LowRank", "all_editors", "edit_stream"]


def all_editors() -> dict[str, type[Editor]]:
    """Every editor by its class name, sorted."""
    return discover(__name__, Editor)  # type: ignore[type-abstract]  # a base class is what is wanted
