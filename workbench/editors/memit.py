"""MEMIT: many facts are written into several layers at once. Meng et al. 2023 (arXiv 2210.07229), section 4.

1. For every fact a value z at the output of the last of the layers, at the last subject token (`find_values`).
2. Layer by layer, with the layers below already changed: keys K (a column a fact), and what is still missing at the last layer,
   R = (Z - what is there now) / (number of layers still to come, this one included).
3. dW = R K^T (lambda C + K K^T)^-1 (eq. 14): the least-squares change for the new facts and, weighed by lambda, the usual keys.

The key of a fact is the mean of the bare prompt's key and of the mean key after texts that the model writes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.editors._values import (
    Place,
    ValueEditor,
    down_change,
    find_values,
    interim,
    read_keys,
    read_values,
    solve,
    told,
    write_prefixes,
)
from workbench.editors.base import Draft
from workbench.edits import Change, Edit
from workbench.facts import Fact
from workbench.layouts import ModelError
from workbench.models import LM


@dataclass(frozen=True, kw_only=True)
class SpreadEditor(ValueEditor):
    """An editor that spreads what is missing at the last of its layers over all of them."""

    clamp: float = 0.75
    """The longest step away from the old value that is allowed, in lengths of the reference."""

    prefix_lengths: tuple[int, ...] = (10, 10, 10, 10, 10)
    """Lengths in tokens of the texts that are put before the prompt; the prompt alone comes on top."""

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """One change a layer for all facts together.

        Raises:
            ModelError: the family normalises what its MLPs add, so that what they write is not what arrives.
        """
        if lm.layout.mlp_out.endswith("norm"):
            raise ModelError(
                f"{lm.layout.family} normalises what its MLPs add, so a residual cannot be spread over them. Use Rome or RRome."
            )
        prefixes = write_prefixes(lm, self.prefix_lengths, seed=self.seed)
        moments = self.moments(lm)
        layers = list(moments)
        found = [find_values(lm, fact, layers[-1], self.places(), self, prefixes) for fact in facts]
        place = self.places()[0]
        wanted = torch.stack([values[place].wanted for values in found]).double().cpu()
        changes: dict[str, Change] = {}
        conditions = {}
        for index, layer in enumerate(layers):
            with interim(lm, changes):
                keys = fact_keys(read_keys(lm, facts, [layer], prefixes)[layer])
                missing = wanted - read_values(lm, facts, layers[-1], place).double().cpu()
            share = missing.T * self.share(len(layers) - index)
            left, right, conditions[layer] = self.solution(layer, moments[layer], keys.T, share, after)
            name, change = down_change(lm, layer, left=left, right=right)
            changes[name] = change
        with interim(lm, changes):
            state = self.remembered(lm, facts, layers, prefixes)
        edited = [told(fact, layers[-1], values[place]) for fact, values in zip(facts, found, strict=True)]
        return Draft(changes=changes, state=state, told={"edited": edited, "conditions": conditions})

    def places(self) -> tuple[Place, ...]:
        """Where values are looked for; the first is what is written."""
        return ("resid_post",)

    def share(self, left: int) -> float:
        """Which part of what is missing a layer takes, when so many layers are left, it included."""
        return 1 / left

    def remembered(
        self, lm: LM, facts: Sequence[Fact], layers: Sequence[int], prefixes: Sequence[str]
    ) -> dict[str, Tensor]:
        """What a later edit has to know."""
        return {}

    @abstractmethod
    def solution(
        self,
        layer: int,
        moment: Float[Tensor, "d_mlp d_mlp"],
        keys: Float[Tensor, "d_mlp fact"],
        missing: Float[Tensor, "d_model fact"],
        after: Edit | None,
    ) -> tuple[Float[Tensor, "d_model fact"], Float[Tensor, "d_mlp fact"], float]:
        """The two sides of dW = left @ right.T, and the condition number of what was solved; float64."""


def fact_keys(keys: Float[Tensor, "fact context d_mlp"]) -> Float[Tensor, "fact d_mlp"]:
    """A key a fact: the bare prompt's counts half, all the others together the other half."""
    alone, others = keys[:, 0], keys[:, 1:]
    return ((alone + others.mean(1)) / 2 if others.shape[1] else alone).double().cpu()


@dataclass(frozen=True, kw_only=True)
class Memit(SpreadEditor):
    """MEMIT (arXiv 2210.07229): a least-squares change of several layers' down projections, for one fact or thousands at once."""

    ridge: float = 15_000.0
    """lambda, the weight of usual keys against the new ones: the larger, the less they change, and the weaker the edit."""

    def n_layers(self, lm: LM) -> int:
        """Five, as published for GPT-2 XL, where the model is deep; less in shallow ones."""
        return spread_over(lm)

    def solution(
        self,
        layer: int,
        moment: Float[Tensor, "d_mlp d_mlp"],
        keys: Float[Tensor, "d_mlp fact"],
        missing: Float[Tensor, "d_model fact"],
        after: Edit | None,
    ) -> tuple[Float[Tensor, "d_model fact"], Float[Tensor, "d_mlp fact"], float]:
        """R and (lambda C + K K^T)^-1 K."""
        right, condition = solve(self.ridge * moment + keys @ keys.T, keys, what=f"lambda C + K K^T of layer {layer}")
        return missing, right, condition


def spread_over(lm: LM) -> int:
    """Over how many layers a change is spread: 5 from 24 layers on, a quarter of fewer."""
    return max(1, min(5, lm.n_layers // 4))
