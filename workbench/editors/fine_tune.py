"""Fine-tuning of MLP down projections on new answers (Zhu et al., arXiv 2012.00363; ROME, arXiv 2202.05262, sec. 3.1, App. E.1).

1. Loss of a fact: the mean of -log p over the tokens of its new answer; `objective` says where each is predicted.
2. Adam steps on the weights (no biases) of the named layers' down projections, all facts in one batch; none once the loss is below
   `stop_below`.
3. With `norm_constraint` e, every entry of the change is clamped to [-e, e] after each step.

Two things are called FT-L:

- in ROME and MEMIT ("FT+L"), the bound of step 3: `FineTune(norm_constraint=5e-4)`; without it, their FT
- in the KnowEdit survey (arXiv 2401.01286), one layer trained with all tokens of the answer predicted at the prompt's last token:
  `FineTune(objective="prompt_last")`; its FT-M is the default here

Code != papers: published code takes minibatches of 1 to 3 facts, and by matching names it also trains GPT-2's bias; one batch and
the weight alone here. ROME's paper stops at a loss of 0.03, published code at 0.01, which we follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from typing_extensions import Self

from workbench.editors._gradients import Lesson, Objective, note, put, zeros
from workbench.editors._values import checked_layers, down_path
from workbench.editors.base import Draft, Editor
from workbench.edits import Edit
from workbench.facts import Fact, FactError
from workbench.models import LM
from workbench.progress import track


@dataclass(frozen=True, kw_only=True)
class FineTune(Editor):
    """Fine-tuning of one down projection on the new answer, free or within a bound (FT, FT-L in both senses, FT-M; see the module).

    The change is dense.
    The manifest tells `losses`, the mean over the facts before each step and after the last, in nats.
    """

    objective: Objective = "target_new"
    """Where the tokens of an answer are predicted: `target_new` each behind those before it (FT-M), `prompt_last` all at the
    prompt's last token (the survey's FT-L)."""

    layers: tuple[int, ...] | None = None
    """Layers whose down projection is trained, from 0; None: one, two thirds of the way up (layer 21 of Llama 2's 32)."""

    norm_constraint: float | None = None
    """The most by which an entry of a weight may change (ROME's FT-L); None: no bound."""

    learning_rate: float = 5e-4
    """Adam's step size."""

    steps: int = 25
    """At most so many steps."""

    stop_below: float = 1e-2
    """No step is taken once the mean loss is below this, in nats."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        if self.steps < 1:
            raise FactError(f"steps is {self.steps}, expected 1 or more.")
        if self.learning_rate <= 0:
            raise FactError(f"learning_rate is {self.learning_rate}, expected more than 0.")
        if self.norm_constraint is not None and self.norm_constraint <= 0:
            raise FactError(f"norm_constraint is {self.norm_constraint}, expected more than 0, or None for no bound.")

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """With the layers named."""
        layers = (2 * lm.n_layers // 3,) if self.layers is None else self.layers
        return replace(self, layers=checked_layers(lm, layers))

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The change that lowers the facts' mean loss."""
        lesson = Lesson.of(lm, [fact.text for fact in facts], [fact.target_new or "" for fact in facts], self.objective)
        changes = zeros(lm, [f"{down_path(lm, layer)}.weight" for layer in self.layers or ()])
        optimizer = torch.optim.Adam(changes.values(), lr=self.learning_rate)
        losses: list[float] = []
        for step in track(range(self.steps + 1), "steps", self.steps + 1):
            with put(lm, changes):
                loss = lesson.loss(lm).mean()
                if note(losses, loss) < self.stop_below or step == self.steps:
                    break
                gradients = torch.autograd.grad(loss, list(changes.values()))
            for change, gradient in zip(changes.values(), gradients, strict=True):
                change.grad = gradient
            optimizer.step()
            if self.norm_constraint is not None:
                bound = _not_above(self.norm_constraint)
                with torch.no_grad():
                    for change in changes.values():
                        change.clamp_(-bound, bound)
        found = {name: change.detach() for name, change in changes.items()}
        return Draft(changes=found, told={"losses": [round(loss, 6) for loss in losses]})


def _not_above(bound: float) -> float:
    """The largest float32 that is not above a bound."""
    near = np.float32(bound)
    return float(near if float(near) <= bound else np.nextafter(near, np.float32(0)))
