"""What every locator is: a frozen dataclass of hyperparameters that turns facts into a `Footprint`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typing_extensions import Self

from workbench.checks import self_checks
from workbench.facts import Fact, FactError
from workbench.hooks import is_patched
from workbench.models import LM
from workbench.progress import track
from workbench.results import Footprint, join, manifest
from workbench.store import Store


@dataclass(frozen=True, kw_only=True)
class Locator(ABC):
    """A locating method. Its fields are its hyperparameters, with the paper's defaults; its repr is its label.

    Raises:
        FactError: a field has a value that is not one of its choices, or one of another type.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            if choices and value not in choices:
                raise FactError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}.")
            if hint is int and not (isinstance(value, int) and not isinstance(value, bool)):
                raise FactError(f"{name} is {value!r}, expected a whole number.")
            if get_origin(hint) is tuple and not isinstance(value, tuple):
                raise FactError(f"{name} is {value!r}, expected a tuple, e.g. ({value!r},).")

    def __call__(self, lm: LM, facts: Sequence[Fact]) -> Footprint:
        """Where the facts are.

        Raises:
            FactError: no facts, or two of the same id.
            ModelError: the model cannot run this method.
        """
        return locate(self, lm, facts)

    @abstractmethod
    def locate_one(self, lm: LM, fact: Fact) -> Footprint:
        """The footprint of one fact. What it depends on is this object, the weights and the fact, nothing else."""

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


def locate(locator: Locator, lm: LM, facts: Sequence[Fact], *, store: Store | None = None) -> Footprint:
    """Runs a locator fact by fact and part by part; with a store, each piece is kept as soon as it is there and not computed twice.

    So a run that was stopped goes on where it was.

    Args:
        locator: the method.
        lm: the model.
        facts: what to locate.
        store: where pieces are kept; None to keep nothing.

    Raises:
        FactError: no facts, or two of the same id.
        Cancelled: whoever listens to the progress stopped it.
    """
    facts = list(facts)
    if not facts:
        raise FactError("There is no fact to locate. Give at least one.")
    ids = [fact.id for fact in facts]
    if len(set(ids)) < len(ids):
        double = next(i for i in ids if ids.count(i) > 1)
        raise FactError(f"The fact id {double!r} stands {ids.count(double)} times. Give every fact its own id.")
    if store is not None and is_patched():
        raise FactError("A patched model's results would be kept as the model's own. Use no store inside of patched().")
    lm.model.eval()
    self_checks(lm)
    locator = locator.resolved(lm, facts)
    pieces = [(fact, part) for fact in facts for part in locator.parts()]
    found = []
    for fact, part in track(pieces, "facts", len(pieces)) if len(facts) > 1 else pieces:
        run = manifest(type(part).__name__, model=lm.protocol, parameters=part, facts=[fact])
        piece = store.find(run, Footprint) if store else None
        if piece is None:
            piece = part.locate_one(lm, fact)
            if store:
                store.save(piece)
        found.append(piece)
    whole = join(found)
    return Footprint(
        table=whole.table,
        run={**whole.run, "parameters": manifest("", model={}, parameters=locator, facts=())["parameters"]},
        extras=whole.extras,
    )
