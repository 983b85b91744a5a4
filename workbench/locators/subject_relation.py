"""Does a site carry the subject or the relation? Two causal traces of one prompt, compared site by site.

The trace is that of Meng et al. 2022 (arXiv 2202.05262), its fractional effect that of Hase et al. 2023 (arXiv 2301.04213, 4.1).
That relations have places of their own is what Wei et al. 2024 (arXiv 2409.00617) claim; comparing these two maps is our proposal.

1. Clean run of the prompt.
2. Two corrupted runs with the same noise: on the subject's tokens, and on all other tokens of the prompt but special ones (BOS).
3. In each of them every site is restored; what that brings back, in parts of the run's own total effect.
4. The first share minus the second. Sites that bring back the subject are positive, those that bring back the relation negative;
   late ones, where both have met, bring back everything in both and are near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.locators.tables import fact_row, site_rows
from workbench.locators.tracing import Experiment, Tracing, require_effect, standard_error
from workbench.models import LM, Tokens
from workbench.noise import Noise
from workbench.restoring import Restoration, Restored
from workbench.results import Footprint
from workbench.sweep import restore


@dataclass(frozen=True, kw_only=True, eq=False)
class _Both(Restored):
    """The subject's experiment, and beside it the relation's."""

    relation: Restored
    """The same cells where the relation is corrupted."""


@dataclass(frozen=True, kw_only=True)
class SubjectRelation(Tracing):
    """Values are differences of fractional effects: with the subject corrupted minus with the relation corrupted.

    The columns `subject` and `relation` have the two shares: 0 where restoring the site brings nothing back, 1 where it brings back
    all. A causal trace's indirect effects over its total effect are the column `subject`.
    """

    corrupt: Literal["noise"] = "noise"
    """Noise alone: a relation has no substitute of equal length."""

    substitutes: tuple[str, ...] = ()
    """Not used here, since nothing is swapped."""

    def _restored(self, lm: LM, experiments: Sequence[Experiment], memory: int | None) -> list[Restored]:
        """Both experiments of each fact, all in one sweep.

        Raises:
            FactError: nothing but the subject is in the prompt, or one of the corruptions changes nothing.
        """
        problems = [one.problem for one in experiments]
        others = [self._of_the_relation(lm, one) for one in experiments]
        for one, *pair in zip(experiments, problems, others, strict=True):
            for what, problem in zip(("subject", "relation"), pair, strict=True):
                clean, low = (
                    problem.score(problem.answer_logits(x.logits)).mean()
                    for x in (run(lm, problem.clean), problem.corrupted_run(lm))
                )
                between = f"{one.fact.text!r} as it is and with its {what} corrupted"
                require_effect(float(clean), float(low), score=self.score, between=between)
        cells = [one.cells for one in experiments]
        found = restore(lm, [*problems, *others], [*cells, *cells], memory=memory)
        return [
            _Both(**{field.name: getattr(subject, field.name) for field in fields(subject)}, relation=relation)
            for subject, relation in zip(found[: len(cells)], found[len(cells) :], strict=True)
        ]

    def _of_the_relation(self, lm: LM, experiment: Experiment) -> Restoration:
        """The same experiment with the noise on the relation's tokens."""
        problem, noise = experiment.problem, Noise.parse(self.noise)
        if experiment.sigma is not None and noise.relative:
            noise = replace(noise, number=experiment.sigma, relative=False)
        positions = _relation(lm, experiment.fact, problem.clean)
        return replace(problem, noise=self._drawn(lm, noise, problem.clean, positions))

    def _footprint(self, lm: LM, experiment: Experiment, restored: Restored) -> Footprint:
        """What both experiments say about this one's kinds."""
        assert isinstance(restored, _Both)  # as `_restored` gives it
        fact, tokens = experiment.fact, experiment.problem.clean
        mine = [i for i, cell in enumerate(experiment.cells) if cell.kind in self.kinds]
        cells = [experiment.cells[i] for i in mine]
        subject, relation = (_shares(one)[mine] for one in (restored, restored.relation))
        table = site_rows(
            fact,
            tokens,
            kind=[cell.kind for cell in cells],
            layer=[cell.layer for cell in cells],
            position=[cell.position for cell in cells],
            value=subject.mean(1) - relation.mean(1),
            se=np.hypot(standard_error(subject), standard_error(relation)),
        )
        table["subject"], table["relation"] = subject.mean(1), relation.mean(1)
        clean = float(restored.clean)
        low, low_relation = (float(one.corrupted.mean()) for one in (restored, restored.relation))
        facts = fact_row(
            lm,
            fact,
            experiment.answer,
            said=experiment.said,
            clean=clean,
            corrupted=low,
            corrupted_relation=low_relation,
            total_effect=self._sign * (clean - low),
            total_effect_relation=self._sign * (clean - low_relation),
            sigma=experiment.sigma,
        )
        unit = f"share of the effect in {self.score}, of the subject's minus of the relation's"
        return Footprint(
            table=table,
            run=self._manifest(lm, fact, sigma=experiment.sigma, unit=unit, engine=restored.engine),
            extras={"facts": facts},
        )


def _relation(lm: LM, fact: Fact, tokens: Tokens) -> list[int]:
    """The positions of the prompt that are neither the subject's nor special tokens."""
    subject, special = tokens.at("subject")[0].tolist(), set(lm.tokenizer.all_special_ids)
    ids = tokens.ids[0, : tokens.lengths[0]].tolist()
    positions = [i for i, token in enumerate(ids) if not subject[i] and token not in special]
    if not positions:
        raise FactError(
            f"The prompt {fact.text!r} has no words beside its subject. Write the relation too, e.g. '{{}} is in'."
        )
    return positions


def _shares(restored: Restored) -> Float[np.ndarray, "cell sample"]:
    """What each cell brings back in each sample, in parts of the mean total effect."""
    cells, corrupted, clean = (x.cpu().double().numpy() for x in (restored.cells, restored.corrupted, restored.clean))
    shares: np.ndarray = (cells - corrupted) / (clean - corrupted.mean())
    return shares
