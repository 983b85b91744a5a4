"""Which states would bring a corrupted fact back, by the gradient? A causal trace estimated to first order (attribution patching).

Nanda 2023 ("Attribution patching"); Syed et al. 2023 (arXiv 2310.10348); with several steps EAP-IG, Hanna et al. 2024
(arXiv 2403.17806). The experiment is the causal trace's (Meng et al. 2022, arXiv 2202.05262), parameter by parameter, and so are
the table's rows; `workbench.gradients` has the algorithm. No cell is exact: a gradient does not see how effects depend on one
another, nor that a probability near 0 or 1 bends. `analyses.screening` tells how well it ranks a model's exact maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.facts import FactError
from workbench.gradients import At, restore_by_gradient
from workbench.locators.tracing import Experiment, Tracing
from workbench.models import LM
from workbench.restoring import Restored

SmoothScore = Literal["p", "p_target", "logp", "logit_diff", "kl"]
"""The scores of `workbench.metrics` that have a derivative: all but `rank`."""

MOST_STEPS = 1000
"""More than any path needs; a slip of the keyboard should not run for hours."""


@dataclass(frozen=True, kw_only=True)
class AttributionPatching(Tracing):
    """The causal trace's maps, estimated from gradients. Values are estimated indirect effects, `score` is that above the baseline.

    So `score` may leave the range of the score itself, e.g. be a "probability" below 0.
    """

    steps: int = 1
    """Into how many parts the path from the corrupted to the clean embeddings is cut; the gradients along it are averaged."""

    at: At = "corrupted"
    """Where on each part the gradient is taken: `corrupted` end (attribution patching with 1 step), `middle`, `clean` end (EAP-IG,
    with 5 steps in its paper), or `both` ends, which with 1 step costs hardly more than one of them."""

    score: SmoothScore = "p"
    """What is measured at the end of the prompt, see `workbench.metrics`. A rank has no derivative."""

    def __post_init__(self) -> None:
        Tracing.__post_init__(self)
        if not 1 <= self.steps <= MOST_STEPS:
            raise FactError(f"{self.steps} steps were asked for, expected 1 to {MOST_STEPS}.")

    def _restored(self, lm: LM, experiments: Sequence[Experiment], memory: int | None) -> list[Restored]:
        """The estimated scores of each experiment's cells; one backward pass a point of the path serves all kinds."""
        return [restore_by_gradient(lm, one.problem, one.cells, steps=self.steps, at=self.at) for one in experiments]

    @property
    def _unit(self) -> str:
        return f"estimated indirect effect in {self.score}"
