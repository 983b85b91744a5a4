"""A causal trace as somebody asks for it, by the model's name and the options that were changed; and its stored pieces.

`locate` keeps every map by the weights' hash and the resolved noise, which are only known when the model is loaded. So each
question is stored too, under a key of its own, with the keys of its pieces: a page reopens a trace without loading a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench import zoo
from workbench.facts import Fact, Probe
from workbench.progress import track
from workbench.results import Footprint, Result, join, manifest, question_key, record
from workbench.store import Store

if TYPE_CHECKING:
    from workbench.locators.causal_trace import CausalTrace
    from workbench.models import LM

WHAT = "asked trace"
"""How a manifest is marked that holds a question, not an answer."""


@dataclass(frozen=True, kw_only=True)
class AskedTrace:
    """One fact, one model, some options."""

    model: str
    """A bundled model, a folder or a hub name."""

    fact: Fact
    """What is traced."""

    dtype: str = "float32"
    """Precision of the weights."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `CausalTrace` that differ from their defaults. Without `window` it is `default_window` of the model, and without
    `kinds` all maps but the severed one."""

    @property
    def key(self) -> str:
        """Names this question; known without the model."""
        return question_key({"what": WHAT, "parameters": self._parameters, "facts": [record(self.fact)]})

    def find(self, store: Store) -> StoredTrace | None:
        """What a store has for this question, or None."""
        return find_trace(store, self.key)

    def trace(self, lm: LM) -> CausalTrace:
        """The method, with everything fixed that depends on the model.

        Raises:
            FactError, NoiseError, SiteError, ModelError: an option that cannot be used, or not on this model.
        """
        from workbench.locators.causal_trace import CausalTrace
        from workbench.sites import default_window

        kinds = tuple(kind for kind in CausalTrace.kinds if kind != self.options.get("sever"))
        options = {"window": default_window(lm.n_layers), "kinds": kinds, **self.options}
        return CausalTrace(**options).resolved(lm, self.reference())

    def reference(self) -> Sequence[Fact]:
        """The facts whose subjects set the noise's scale: all of a bundled model's, as ROME does over its set; else this fact.

        So the map of a fact does not depend on which others were looked at.
        """
        return zoo.load_facts(self.model) if self.model in zoo.NAMES else [self.fact]

    def compute(self, lm: LM, store: Store) -> Footprint:
        """The maps, one after the other; each is kept as soon as it is there, and taken from the store where it is there already.

        Raises:
            Cancelled: whoever listens to the progress stopped it.
        """
        from workbench.locators.base import locate

        trace = self.trace(lm)
        parts = trace.parts()
        runs = [manifest(type(part).__name__, model=lm.protocol, parameters=part, facts=[self.fact]) for part in parts]
        question = manifest(WHAT, model={}, parameters=self._parameters, facts=[self.fact], traced=lm.protocol)
        pieces = pd.DataFrame({"kind": [part.kinds[0] for part in parts], "key": [question_key(run) for run in runs]})
        store.save(Result(table=pieces, run=question))
        steps = track(parts, "maps", len(parts))
        return _whole([locate(part, lm, [self.fact], store=store) for part in steps])

    @property
    def _parameters(self) -> dict[str, Any]:
        return {"model": self.model, "dtype": self.dtype, **{name: self.options[name] for name in sorted(self.options)}}


@dataclass(frozen=True, kw_only=True)
class StoredTrace:
    """A question and as much of its answer as is stored."""

    asked: AskedTrace
    """The question."""

    made: str
    """When it was asked, ISO 8601 in UTC."""

    footprint: Footprint | None
    """The maps that are there, or None while there is none."""

    missing: tuple[str, ...]
    """Kinds that were asked for and are not stored, e.g. because the run was stopped."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A line in the list of what was asked before."""

    key: str
    """Of the question."""

    made: str
    """When it was asked, ISO 8601 in UTC."""

    asked: AskedTrace
    """The question."""


def find_trace(store: Store, key: str) -> StoredTrace | None:
    """What a store has for a question, by its key, or None."""
    question = store.get(key, Result)
    asked = _asked(question.run) if question is not None else None
    if question is None or asked is None or not {"kind", "key"} <= set(question.table.columns):
        return None
    rows = zip(question.table["kind"].astype(str), question.table["key"].astype(str), strict=True)
    found = {kind: store.get(key, Footprint) for kind, key in rows}
    pieces = [piece for piece in found.values() if piece is not None]
    return StoredTrace(
        asked=asked,
        made=str(question.run.get("made", "")),
        footprint=_whole(pieces) if pieces else None,
        missing=tuple(kind for kind, piece in found.items() if piece is None),
    )


def list_traces(store: Store) -> list[Listed]:
    """What was asked before, the newest first; the bundled examples come last."""
    stores = [store] if store.bundled is None else [store, Store(folder=store.bundled)]
    found = {}
    for one in stores:
        for key, run in one.manifests():
            asked = _asked(run)
            if asked is not None and key not in found:
                found[key] = Listed(key=key, made=str(run.get("made", "")), asked=asked)
    return list(found.values())


def _whole(pieces: Sequence[Footprint]) -> Footprint:
    """Maps of several kinds as one footprint, whose manifest names all kinds."""
    whole = join(pieces)
    parameters = {**whole.run["parameters"], "kinds": [kind for piece in pieces for kind in piece.kinds]}
    return replace(whole, run={**whole.run, "parameters": parameters})


def _asked(run: Mapping[str, Any]) -> AskedTrace | None:
    """The question a manifest holds; None where it holds none, or a file that somebody changed."""
    if run.get("what") != WHAT:
        return None
    try:
        parameters = dict(run["parameters"])
        model, dtype = parameters.pop("model"), parameters.pop("dtype")
        return AskedTrace(model=model, dtype=dtype, fact=_fact(run["facts"][0]), options=parameters)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _fact(row: Mapping[str, Any]) -> Fact:
    """The inverse of `record(fact)`."""
    values: dict[str, Any] = {name: row[name] for name in (f.name for f in fields(Fact)) if name in row}
    for name in ("neighbors", "portability", "locality"):
        if name in values:
            values[name] = tuple(Probe(**probe) for probe in values[name])
    if "paraphrases" in values:
        values["paraphrases"] = tuple(values["paraphrases"])
    return Fact(**values)
