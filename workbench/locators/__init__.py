"""Locating methods, one file each. `all_locators()` finds them; a new file needs no entry."""

from __future__ import annotations

from workbench.facts import FactError
from workbench.locators.attribution_patching import AttributionPatching
from workbench.locators.base import Locator, locate
from workbench.registry import discover

__all__ = ["AttributionPatching", "Locator", "all_locators", "locate", "locator_named"]


def all_locators() -> dict[str, type[Locator]]:
    """Every locator of this folder, by class name."""
    return discover("workbench.locators", Locator)  # type: ignore[type-abstract]  # the base is only compared with


def locator_named(name: str) -> type[Locator]:
    """The locator of a class name.

    Raises:
        FactError: there is none.
    """
    known = all_locators()
    if name not in known:
        raise FactError(f"No locating method is called {name!r}. Use one of {', '.join(known)}.")
    return known[name]
