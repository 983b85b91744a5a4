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
    from workbench.locators.activation_patching import ActivationPatching
    from workbench.locators.attention_knockout import AttentionKnockout
    from workbench.locators.attribution_patching import AttributionPatching
    from workbench.locators.base import locate
    from workbench.locators.causal_trace import CausalTrace
    from workbench.locators.circuit_edges import CircuitEdges
    from workbench.locators.direct_logit_attribution import DirectLogitAttribution
    from workbench.locators.hard_concrete import HardConcrete
    from workbench.locators.knowledge_neurons import KnowledgeNeurons
    from workbench.locators.logit_lens import LogitLens
    from workbench.locators.representation_zeroing import RepresentationZeroing
    from workbench.locators.subject_relation import SubjectRelation
    from workbench.locators.value_vectors import ValueVectors
    from workbench.models import LM
    from workbench.results import Footprint, Result
    from workbench.sites import Site
    from workbench.store import Store

_HOME = {
    "ActivationPatching": "workbench.locators.activation_patching",
    "AttentionKnockout": "workbench.locators.attention_knockout",
    "AttributionPatching": "workbench.locators.attribution_patching",
    "CausalTrace": "workbench.locators.causal_trace",
    "CircuitEdges": "workbench.locators.circuit_edges",
    "DirectLogitAttribution": "workbench.locators.direct_logit_attribution",
    "Fact": "workbench.facts",
    "Footprint": "workbench.results",
    "HardConcrete": "workbench.locators.hard_concrete",
    "KnowledgeNeurons": "workbench.locators.knowledge_neurons",
    "LM": "workbench.models",
    "LogitLens": "workbench.locators.logit_lens",
    "Probe": "workbench.facts",
    "RepresentationZeroing": "workbench.locators.representation_zeroing",
    "Result": "workbench.results",
    "Site": "workbench.sites",
    "Store": "workbench.store",
    "SubjectRelation": "workbench.locators.subject_relation",
    "ValueVectors": "workbench.locators.value_vectors",
    "load": "workbench.loading",
    "locate": "workbench.locators.base",
    "patched": "workbench.hooks",
    "run": "workbench.hooks",
}

__all__ = [  # noqa: RUF022 - sorted as ASCII, like the table above
    "ActivationPatching", "AttentionKnockout", "AttributionPatching", "CausalTrace", "CircuitEdges",
    "DirectLogitAttribution", "Fact", "Footprint", "HardConcrete", "KnowledgeNeurons", "LM", "LogitLens",
    "Probe", "RepresentationZeroing", "Result", "Site", "Store", "SubjectRelation", "ValueVectors", "load",
    "locate", "patched", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"workbench has no {name!r}; it exports {', '.join(__all__)}.")
    return getattr(import_module(_HOME[name]), name)
