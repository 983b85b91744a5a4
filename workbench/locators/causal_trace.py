"""Causal tracing: which states, restored to their clean values, bring a corrupted fact back? (Meng et al. 2022, arXiv 2202.05262)

1. Clean run of the prompt: the answer, its score, and every activation.
2. Corrupted run: noise on the subject's token embeddings (or another subject of equal length), several samples: a low score.
3. For every token and layer: the corrupted run with that one output restored. What the score gains is the cell's indirect effect.

Three maps: the state after each block alone (`resid_post`), and the MLP's and attention's outputs in a window of layers, since
one MLP or attention output alone restores next to nothing in a deep model (App. B.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from typing_extensions import Self

from workbench.facts import FactError
from workbench.locators.tracing import Experiment, Tracing
from workbench.models import LM
from workbench.restoring import Cell, Restoration, Restored, restore_by_loop
from workbench.results import Footprint
from workbench.shortcuts import restore_screened, restore_until_sure
from workbench.sites import SiteKind
from workbench.sweep import restore_by_sweep, sweepable

FACTS_AT_ONCE = 8
"""How many facts are swept together on a GPU."""


@dataclass(frozen=True, kw_only=True)
class CausalTrace(Tracing):
    """ROME's causal trace. Values are indirect effects: score with the cell restored minus score of the corrupted run.

    For `rank` and `kl`, where lower is better, the sign is turned, so that positive always means towards the clean run.
    """

    sever: Literal["none", "mlp_out", "attn_out"] = "none"
    """Hold these outputs at their corrupted values at the restored token in all layers (severed paths, sec. 2.2)."""

    engine: Literal["sweep", "loop"] = "sweep"
    """`sweep` computes the whole map in one pass over the layers; `loop`, the reference it is tested against, cell by cell."""

    screen: float | None = None
    """Not exact everywhere: of each map only this part of the cells is computed at first, e.g. 0.1, those that the gradient ranks
    highest, then more while effects above 2.5 % of the total turn up. The others are marked as estimates. None: all cells."""

    screen_more: bool = True
    """Whether a screened map goes on after its first part."""

    adaptive: float | None = None
    """Not exact: stop sampling the cells of a token once their standard errors are this share of the largest effect, e.g. 0.02;
    looked at after every few samples, so errors may be larger than they seem. None: every cell gets all samples."""

    tolerance: float | None = None
    """Not exact: a restored run whose states come this near to the corrupted run's, in parts of their norm, counts as equal to it,
    e.g. 0.001. None: every run goes to the top."""

    def __post_init__(self) -> None:
        Tracing.__post_init__(self)
        if self.sever in self.kinds:
            raise FactError(
                f"{self.sever} cannot be severed and restored at once. Trace resid_post, or sever the other one."
            )
        for name in ("screen", "adaptive", "tolerance"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise FactError(f"{name} is {value!r}, expected a share between 0 and 1.")
            if value is not None and self.engine == "loop":
                raise FactError(f"The loop is exact and takes no {name}. Use the sweep, or leave it out.")
        if self.screen is not None and self.adaptive is not None:
            raise FactError("Both screen and adaptive were given. Give one of them.")
        if self.screen is not None and (self.score == "rank" or self.sever != "none"):
            what = "A rank has no gradient" if self.score == "rank" else "A severed path has no gradient of its own"
            raise FactError(f"{what}, so there is nothing to screen by. Leave out screen.")

    @classmethod
    def fitted(cls, lm: LM | None, **options: Any) -> Self:
        """See `Locator.fitted`; and all maps but the severed one."""
        kinds = tuple(kind for kind in cls.kinds if kind != options.get("sever"))
        return super().fitted(lm, **{"kinds": kinds, **options})

    def facts_at_once(self, lm: LM) -> int:
        """Several on a GPU, where one fact's matrices are small; on a CPU one at a time is faster."""
        return FACTS_AT_ONCE if lm.device.type == "cuda" else 1

    def _restored(self, lm: LM, experiments: Sequence[Experiment], memory: int | None) -> list[Restored]:
        problems, cells = [one.problem for one in experiments], [one.cells for one in experiments]
        why_not = "asked for" if self.engine == "loop" else sweepable(lm, problems[0], cells[0])
        if why_not:
            found = [restore_by_loop(lm, problem, mine) for problem, mine in zip(problems, cells, strict=True)]
            return [replace(one, engine=f"loop: {why_not}") for one in found]
        if self.screen is None and self.adaptive is None:
            return restore_by_sweep(lm, problems, cells, memory=memory, tolerance=self.tolerance)
        return [self._shortened(lm, one, memory) for one in experiments]

    def _shortened(self, lm: LM, experiment: Experiment, memory: int | None) -> Restored:
        """One experiment with the shortcut that was asked for."""

        def restore(problem: Restoration, cells: Sequence[Cell]) -> Restored:
            return restore_by_sweep(lm, [problem], [cells], memory=memory, tolerance=self.tolerance)[0]

        problem, cells = experiment.problem, experiment.cells
        if self.adaptive is not None:
            return restore_until_sure(restore, problem, cells, target=self.adaptive)
        assert self.screen is not None
        return restore_screened(lm, restore, problem, cells, share=self.screen, more=self.screen_more)

    def told_of(self, whole: Footprint) -> dict[str, Any]:
        """For a screened trace: how much was computed, and how good the estimates were there, in the score's unit."""
        if "estimated" not in whole.table:
            return {}
        asked = whole.table[whole.table["token"] != "before_subject"]  # the others are known without computing
        computed = asked[~asked["estimated"]]
        if computed.empty:
            return {}
        error = ((computed["value"] - computed["estimate"]) ** 2).mean() ** 0.5
        return {"screened": {"computed": len(computed) / len(asked), "rms_error_there": float(error)}}

    @property
    def _severed(self) -> SiteKind | None:
        return None if self.sever == "none" else self.sever
