"""Where does a language model keep a fact, and where does an editor change it?

An `LM` encodes `Fact`s into `Tokens`; `run` reads and writes `Site`s; a locator turns facts into a `Footprint`; an analysis joins
footprints into a `Result`. Names are loaded when they are first used, so that `import workbench` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.facts import Fact, Probe
    from workbench.hooks import patched, run
    from workbench.loading import load
    from workbench.locators.attribution_patching import AttributionPatching
    from workbench.locators.base import locate
    from workbench.locators.causal_trace import CausalTrace
    from workbench.models import LM
    from workbench.results import Footprint, Result
    from workbench.sites import Site
    from workbench.store import Store

_HOME = {
    "AttributionPatching": "workbench.locators.attribution_patching",
    "CausalTrace": "workbench.locators.causal_trace",
    "Fact": "workbench.facts",
    "Footprint": "workbench.results",
    "LM": "workbench.models",
    "Probe": "workbench.facts",
    "Result": "workbench.results",
    "Site": "workbench.sites",
    "Store": "workbench.store",
    "load": "workbench.loading",
    "locate": "workbench.locators.base",
    "patched": "workbench.hooks",
    "run": "workbench.hooks",
}

__all__ = [  # noqa: RUF022 - sorted as ASCII, like the table above
    "AttributionPatching", "CausalTrace", "Fact", "Footprint", "LM", "Probe", "Result", "Site", "Store",
    "load", "locate", "patched", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"workbench has no {name!r}; it exports {', '.join(__all__)}.")
    return getattr(import_module(_HOME[name]), name)
