"""What every editor is: a frozen dataclass of hyperparameters that turns facts into an `Edit`."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from workbench.checks import self_checks
from workbench.editors.presets import preset
from workbench.edits import Change, Edit, EditError, LowRank, Side, base_of, edits_on, joined
from workbench.facts import Fact, FactError, distinct_facts
from workbench.hooks import is_patched
from workbench.models import LM
from workbench.options import check_fields, check_options
from workbench.progress import track
from workbench.results import manifest


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """What an editor has found; `Editor` makes the `Edit` of it."""

    changes: Mapping[str, Change] = field(default_factory=dict)
    """What is added to which parameter of the model as it is now."""

    sides: tuple[Side, ...] = ()
    """What stands beside the weights; sides of the same class in the edit that one goes on from are replaced."""

    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What the editor has to know to go on from here."""

    told: Mapping[str, Any] = field(default_factory=dict)
    """What it measured, for the manifest: JSON data."""


_reserved: ContextVar[frozenset[str]] = ContextVar("workbench_reserved", default=frozenset())


@contextmanager
def reserving(prompts: Iterable[str]) -> Iterator[None]:
    """Within, editors of this thread draw none of these prompts from their pools, since edits will be tested with them.

    WISE and IKE draw from pools; what MEND's network has seen stands in its manifest.
    """
    reset = _reserved.set(_reserved.get() | frozenset(prompts))
    try:
        yield
    finally:
        _reserved.reset(reset)


def reserved() -> frozenset[str]:
    """The prompts that `reserving` names."""
    return _reserved.get()


@dataclass(frozen=True, kw_only=True)
class Editor(ABC):
    """An editing method. Its fields are its hyperparameters, with the paper's defaults; its repr is its label.

    Raises:
        FactError: a field has a value that is not one of its choices, or one of another type.
    """

    beside_weights = False
    """Whether the edit stands beside the weights, which then stay as they are."""

    one_by_one = False
    """Whether a batch of facts becomes what so many calls with `after` make of them, one after the other, in a memory."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in ((one.name, getattr(self, one.name)) for one in fields(self)):
            if isinstance(value, float) and not math.isfinite(value):
                raise FactError(f"{name} is {value}, expected a finite number.")
            if name == "seed" and not 0 <= value < 2**32:
                raise FactError(f"seed is {value}, expected 0 to {2**32 - 1}.")

    def __call__(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None = None) -> Edit:
        """The change that makes the model answer every fact's prompt with its `target_new`, all facts as one batch.

        The model is as it was afterwards. On a model inside of `with other.on(lm):` the edit is made on top of `other`.

        Args:
            lm: the model.
            facts: what it shall say.
            after: an edit to go on from; the result holds both.

        Raises:
            FactError: no facts, two of the same id, or one without an answer to give.
            EditError: the edit changes nothing or by something that is not finite; `after` does not belong to the model.
            ModelError: the method cannot be used on this model.
        """
        facts = _checked(lm, facts)
        if is_patched() and not edits_on(lm):
            raise EditError("Inside of patched() the model is not itself. Edit it outside.")
        if torch.is_inference_mode_enabled():
            raise EditError("Inside of torch.inference_mode() there are no gradients to edit by. Edit outside of it.")
        lm.model.eval()
        checks = self_checks(lm) if not edits_on(lm) else {}
        with ExitStack() as stack:
            if after is not None:
                stack.enter_context(after.on(lm))
            method = self.resolved(lm, facts)
            began = time.perf_counter()
            draft = method.make(lm, facts, after=after)
            seconds = time.perf_counter() - began
            below = tuple(edit.key for edit in edits_on(lm))
            run = manifest(
                type(method).__name__, model=lm.protocol, parameters=method, facts=facts, label=repr(method),
                seconds=round(seconds, 3), self_checks=checks, **draft.told,
            )  # fmt: skip
            run.pop("facts")
            edit = Edit(
                base=base_of(lm), after=below, changes=dict(draft.changes), sides=draft.sides, state=dict(draft.state),
                facts=tuple(facts), run=run,
            )  # fmt: skip
            _check_effect(lm, edit)
        if after is None:
            return edit
        own = replace(edit, after=tuple(key for key in below if key != after.key))
        kinds = {type(side) for side in own.sides}
        kept = tuple(side for side in after.sides if type(side) not in kinds)
        if after.changes or kept:
            return replace(after, sides=kept) + own
        told = {**own.run, "parts": [*after.parts, *own.parts]}
        return replace(own, state=joined(after.state, own.state), facts=(*after.facts, *own.facts), run=told)

    @classmethod
    def fitted(cls, lm: LM | None, **options: Any) -> Self:
        """The method with these options, and with the preset of this model for the rest; see `workbench.editors.presets`.

        Raises:
            FactError: there is no such option, or it cannot have this value.
        """
        check_options(cls, options)
        names = {one.name for one in fields(cls)}
        known = {} if lm is None else {k: v for k, v in preset(lm, cls.__name__).items() if k in names}
        return cls(**{**known, **options})

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This method with everything fixed that it takes from the model or the facts, e.g. the layers.

        Raises:
            ModelError, FactError, EditError: this method cannot be used on this model or these facts.
        """
        return self

    @abstractmethod
    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The change for these facts. `after`, where given, is on the model already."""


def edit_stream(editor: Editor, lm: LM, facts: Sequence[Fact], *, after: Edit | None = None) -> Iterator[Edit]:
    """Edits one fact after the other, each on top of those before; gives the whole edit so far, once a fact.

    Args:
        editor: the method.
        lm: the model; between two edits it is as it was.
        facts: in the order in which they are edited.
        after: an edit to go on from.
    """
    for fact in track(facts, "edits", len(facts)):
        after = editor(lm, [fact], after=after)
        yield after


def _checked(lm: LM, facts: Sequence[Fact]) -> list[Fact]:
    """The facts, if they can be edited."""
    facts = distinct_facts(facts, to="edit")
    for fact in facts:
        if not (fact.target_new or "").strip():
            raise FactError(
                f"The fact {fact.id!r} has no target_new. Say what the model shall answer to {fact.text!r}."
            )
        lm.target_ids(fact.text, fact.target_new or "")
    return facts


def _check_effect(lm: LM, edit: Edit) -> None:
    """Raises EditError where the weights stay what they are, e.g. since a change is lost in half precision."""
    if edit.sides:
        return
    parameters = dict(lm.model.named_parameters())
    with torch.no_grad():
        for name, change in edit.changes.items():
            weight = parameters[name]
            delta = change.dense() if isinstance(change, LowRank) else change
            kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
            if not torch.equal((weight.to(kept) + delta.to(weight.device, kept)).to(weight.dtype), weight):
                return
    raise EditError(
        f"The edit changes no weight in {lm.protocol['dtype']}: the model says the new answer already, or the steps are too small. "
        "Take another target, more steps, or load the model in float32."
    )
