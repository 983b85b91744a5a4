"""What every locator is: a frozen dataclass of hyperparameters that turns facts into a `Footprint`."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from workbench.checks import self_checks
from workbench.edits import edits_on
from workbench.facts import Fact, FactError, distinct_facts
from workbench.hooks import is_patched
from workbench.models import LM
from workbench.options import check_fields, check_options
from workbench.progress import track
from workbench.results import Footprint, join, manifest
from workbench.sites import default_window
from workbench.store import Store


@dataclass(frozen=True, kw_only=True)
class Locator(ABC):
    """A locating method. Its fields are its hyperparameters, with the paper's defaults; its repr is its label.

    Raises:
        FactError: a field has a value that is not one of its choices, or one of another type.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, lm: LM, facts: Sequence[Fact], *, memory: int | None = None) -> Footprint:
        """Where the facts are; `memory` as in `locate`.

        Raises:
            FactError: no facts, or two of the same id.
            ModelError: the model cannot run this method.
        """
        return locate(self, lm, facts, memory=memory)

    @classmethod
    def fitted(cls, lm: LM | None, **options: Any) -> Self:
        """The method with these options, and with defaults that fit the model: a window of layers is `default_window`.

        Without a model, to see whether options can be used before one is loaded, the defaults are the paper's.

        Raises:
            FactError: there is no such option, or it cannot have this value.
        """
        check_options(cls, options)
        published = getattr(cls, "window", None)
        if published is not None and lm is not None:
            options = {"window": default_window(lm.n_layers, published), **options}
        return cls(**options)

    @property
    def part_name(self) -> str:
        """What this part computes, e.g. a kind of sites, for a person."""
        return "the rest"

    @abstractmethod
    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """The footprints of some facts by some `parts` of this method, which may share their work.

        What a footprint depends on is the part, the weights and the fact, nothing else: not the other pieces, not the memory.
        """

    def told_of(self, whole: Footprint) -> dict[str, Any]:
        """What the manifest of a finished footprint tells beside the parts' own."""
        return {}

    def facts_at_once(self, lm: LM) -> int:
        """How many facts are best handed to `locate_together`."""
        return 1

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This method with everything fixed that it takes from the whole set of facts (e.g. the noise's scale).

        Raises:
            ModelError, FactError: this method cannot run on this model or these facts.
        """
        return self

    def parts(self) -> Sequence[Self]:
        """The pieces that can be computed and stored one by one; together they are this method."""
        return (self,)

    def _manifest(self, lm: LM, fact: Fact, **more: Any) -> dict[str, Any]:
        return manifest(
            type(self).__name__, model=lm.protocol, parameters=self, facts=[fact], self_checks=self_checks(lm), **more
        )


@dataclass(frozen=True, kw_only=True)
class NeuronLocator(Locator):
    """A locating method that gives every MLP neuron of a model a score."""

    @abstractmethod
    def neuron_scores(self, lm: LM, fact: Fact) -> Float[Tensor, "layer d_mlp"]:
        """How much each neuron has to do with a fact; larger is more."""


def locate(
    locator: Locator,
    lm: LM,
    facts: Sequence[Fact],
    *,
    store: Store | None = None,
    memory: int | None = None,
    skip: bool = False,
) -> Footprint:
    """Runs a locator over facts; with a store, each fact's pieces are kept as soon as they are there and not computed twice.

    So a run that was stopped goes on where it was.

    Args:
        locator: the method.
        lm: the model.
        facts: what to locate.
        store: where pieces are kept; None to keep nothing.
        memory: bytes that the method may take for intermediate states, where it can do with less by working longer; None: half of
            what is free.
        skip: leave out facts that the method cannot take, e.g. for want of a substitute, instead of raising.

    Returns:
        The joined footprint. Its manifest has `throughput`: facts computed now, seconds, and the process's peak memory in MiB;
        and with `skip`, `left_out`: by the id of a fact, why.

    Raises:
        FactError: no facts, or two of the same id; a fact that the method cannot take, or with `skip` none that it can.
        Cancelled: whoever listens to the progress stopped it.
    """
    facts = distinct_facts(facts, to="locate")
    if store is not None and is_patched():
        raise FactError("A patched model's results would be kept as the model's own. Use no store inside of patched().")
    if store is not None and any(edit.sides for edit in edits_on(lm)):
        raise FactError(
            "An edit stands beside the weights, and what is found would be kept as the model's own. Use no store inside of it."
        )
    lm.model.eval()
    self_checks(lm)
    locator = locator.resolved(lm, facts)
    parts, at_once = locator.parts(), locator.facts_at_once(lm)
    batches = [facts[first : first + at_once] for first in range(0, len(facts), at_once)]
    found: dict[tuple[str, Locator], Footprint] = {}
    left_out: dict[str, str] = {}
    began, computed = time.perf_counter(), 0
    for batch in track(batches, "facts", len(batches)) if len(batches) > 1 else batches:
        missing = []
        for fact, part in ((fact, part) for fact in batch for part in parts):
            run = manifest(type(part).__name__, model=lm.protocol, parameters=part, facts=[fact])
            kept = store.find(run, Footprint) if store else None
            if kept is None:
                missing.append((fact, part))
            else:
                found[fact.id, part] = kept
        for pieces in _batches(missing, one_by_one=skip):
            try:
                new = locator.locate_together(lm, pieces, memory=memory)
                for (fact, _), piece in zip(pieces, new, strict=True):
                    _check_numbers(fact, piece)
            except FactError as error:
                if not skip:
                    raise
                left_out[pieces[0][0].id] = str(error)
                continue
            for (fact, part), piece in zip(pieces, new, strict=True):
                if store:
                    store.save(piece)
                found[fact.id, part] = piece
            computed += len({fact.id for fact, _ in pieces})
    taken = [fact for fact in facts if fact.id not in left_out]
    if not taken:
        raise FactError(f"None of the {len(facts)} facts can be taken. The first: {left_out[facts[0].id]}")
    whole = join([found[fact.id, part] for fact in taken for part in parts])
    throughput = {
        "facts": computed,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_memory_mib": peak_memory(lm),
    }
    parameters = manifest("", model={}, parameters=locator, facts=())["parameters"]
    told = {"parameters": parameters, "throughput": throughput, **locator.told_of(whole)}
    if left_out:
        told["left_out"] = left_out
    return replace(whole, run={**whole.run, **told})


def _check_numbers(fact: Fact, piece: Footprint) -> None:
    """Raises FactError where a value is no number: nobody should find such a map in a store."""
    wrong = piece.table[~np.isfinite(piece.table["value"])]
    if len(wrong):
        raise FactError(
            f"{piece.run['what']} of {fact.text!r} gives {wrong['value'].iloc[0]} in {piece.run['dtype']} at "
            f"{wrong['site'].iloc[0]}, where a number was expected. Use float32, or options nearer to the defaults."
        )


def _batches(pieces: list[tuple[Fact, Locator]], *, one_by_one: bool) -> list[list[tuple[Fact, Locator]]]:
    """The pieces as they are computed: all together, or each fact's alone, so that one that fails takes no other with it."""
    if not one_by_one:
        return [pieces] if pieces else []
    return [[piece for piece in pieces if piece[0] == fact] for fact in dict.fromkeys(fact for fact, _ in pieces)]


def peak_memory(lm: LM) -> int:
    """The most memory in MiB that this process held so far: on the GPU where the model is on one, else resident."""
    if lm.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(lm.device)) // 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent process held before it started this one
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), "")
        if peak:
            return int(peak.split()[1]) // 2**10
    told = psutil.Process().memory_info()
    return int(getattr(told, "peak_wset", told.rss)) // 2**20  # elsewhere than on Linux and Windows: what it holds now
