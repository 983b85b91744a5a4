"""A question as somebody asks it, by the names of model and method and the options that were changed; and its stored answer.

`locate` keeps every piece by the weights' hash and the resolved options, which are only known when the model is loaded. So each
question is stored too, under a key of its own, with the keys of its pieces: a page reopens a result without loading a model.
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
    from workbench.locators import Locator
    from workbench.models import LM

WHAT = "asked"
"""How a manifest is marked that holds a question, not an answer."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One fact, one model, one locating method, some options."""

    model: str
    """A bundled model, a folder or a hub name."""

    fact: Fact
    """What is located."""

    method: str = "CausalTrace"
    """Class name of the locator."""

    dtype: str = "float32"
    """Precision of the weights."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method that differ from what `Locator.fitted` takes without them."""

    @property
    def key(self) -> str:
        """Names this question; known without the model."""
        return question_key({"what": WHAT, "parameters": self._parameters, "facts": [record(self.fact)]})

    def find(self, store: Store) -> Stored | None:
        """What a store has for this question, or None."""
        return find_stored(store, self.key)

    def locator(self, lm: LM) -> Locator:
        """The method, with everything fixed that depends on the model.

        Raises:
            FactError: there is no such method or option.
            FactError, NoiseError, SiteError, ModelError: an option that cannot be used, or not on this model.
        """
        from workbench.locators import locator_named

        return locator_named(self.method).fitted(lm, **self.options).resolved(lm, self.reference())

    def reference(self) -> Sequence[Fact]:
        """The facts that set a noise's scale and give substitutes: a bundled model's, as ROME takes its whole set; else this one.

        So the map of a fact does not depend on which others were looked at.
        """
        return zoo.load_facts(self.model) if self.model in zoo.NAMES else [self.fact]

    def compute(self, lm: LM, store: Store) -> Footprint:
        """The pieces, one after the other; each is kept as soon as it is there, and taken from the store where it is there already.

        Raises:
            Cancelled: whoever listens to the progress stopped it.
        """
        from workbench.locators import locate

        parts = self.locator(lm).parts()
        runs = [manifest(self.method, model=lm.protocol, parameters=part, facts=[self.fact]) for part in parts]
        question = manifest(WHAT, model={}, parameters=self._parameters, facts=[self.fact], located=lm.protocol)
        pieces = pd.DataFrame({"part": [part.part_name for part in parts], "key": [question_key(run) for run in runs]})
        store.save(Result(table=pieces, run=question))
        steps = track(parts, "maps", len(parts)) if len(parts) > 1 else parts
        return _whole([locate(part, lm, [self.fact], store=store) for part in steps])

    @property
    def _parameters(self) -> dict[str, Any]:
        options = {name: self.options[name] for name in sorted(self.options)}
        return {"model": self.model, "method": self.method, "dtype": self.dtype, "options": options}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A question and as much of its answer as is stored."""

    asked: Asked
    """The question."""

    made: str
    """When it was asked, ISO 8601 in UTC."""

    footprint: Footprint | None
    """The parts that are there, or None while there is none."""

    missing: tuple[str, ...]
    """Names of parts that were asked for and are not stored, e.g. because the run was stopped."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A line in the list of what was asked before."""

    key: str
    """Of the question."""

    made: str
    """When it was asked, ISO 8601 in UTC."""

    asked: Asked
    """The question."""


def find_stored(store: Store, key: str) -> Stored | None:
    """What a store has for a question, by its key, or None."""
    question = store.get(key, Result)
    asked = _asked(question.run) if question is not None else None
    if question is None or asked is None or not {"part", "key"} <= set(question.table.columns):
        return None
    rows = zip(question.table["part"].astype(str), question.table["key"].astype(str), strict=True)
    found = {part: store.get(key, Footprint) for part, key in rows}
    pieces = [piece for piece in found.values() if piece is not None]
    return Stored(
        asked=asked,
        made=str(question.run.get("made", "")),
        footprint=_whole(pieces) if pieces else None,
        missing=tuple(part for part, piece in found.items() if piece is None),
    )


def list_asked(store: Store) -> list[Listed]:
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
    """The parts as one footprint, whose manifest names all of their kinds."""
    whole = join(pieces)
    parameters = dict(whole.run["parameters"])
    if "kinds" in parameters:
        parameters["kinds"] = list(dict.fromkeys(kind for piece in pieces for kind in piece.run["parameters"]["kinds"]))
    return replace(whole, run={**whole.run, "parameters": parameters})


def _asked(run: Mapping[str, Any]) -> Asked | None:
    """The question a manifest holds; None where it holds none, or a file that somebody changed."""
    if run.get("what") != WHAT:
        return None
    try:
        names = ("model", "method", "dtype", "options")
        model, method, dtype, options = (run["parameters"][name] for name in names)
        return Asked(model=model, method=method, dtype=dtype, fact=_fact(run["facts"][0]), options=dict(options))
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
