"""Maps for less than the exact sweep costs, each by giving something up; `CausalTrace` has an option for each.

- `restore_until_sure`: a cell gets no more noise samples once its mean is known well enough
- `restore_screened`: only cells that matter by their gradient are computed, the others estimated

The third, dropping lanes that have become the corrupted run's, is the sweep's own `tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.gradients import restore_by_gradient
from workbench.models import LM
from workbench.restoring import Cell, Restoration, Restored
from workbench.sites import SiteKind

Restore = Callable[[Restoration, Sequence[Cell]], Restored]
"""An exact engine, e.g. one problem's sweep."""

FIRST_SAMPLES = 4
"""So many samples are taken of every cell; fewer say nothing about their spread. Then as many again, and so on."""


NOTABLE = 0.025
"""A screened map goes on while it meets effects above this part of the total effect: half of what it should not miss (5 %)."""


def restore_until_sure(restore: Restore, problem: Restoration, cells: Sequence[Cell], *, target: float) -> Restored:
    """Scores of cells with fewer samples where fewer do.

    After every few samples, the cells of one kind and token are done where the standard error of each is at most `target` times the
    kind's largest mean effect. They stop together, so that neighbouring layers rest on the same samples. The corrupted run
    gets all samples, and kinds do not matter to each other.

    Standard errors of a few samples are themselves uncertain, so some cells stop early by chance, and theirs is then too small: the
    price.

    Args:
        restore: what computes cells.
        problem: the experiment; its samples are taken in their order.
        cells: what to restore.
        target: the standard error that is good enough, in parts of the largest effect of the cell's kind.

    Returns:
        As from `restore`, with `taken`, and NaN where nothing was.
    """
    n = len(problem.corrupted)
    left = torch.arange(len(cells))
    whole = restore(problem, [])
    low = whole.corrupted.cpu().double()
    kinds, rows = [cell.kind for cell in cells], [(cell.kind, cell.position) for cell in cells]
    scores, taken = (
        torch.full((len(cells), n), torch.nan, dtype=torch.float64),
        torch.zeros(len(cells), n, dtype=torch.bool),
    )
    first = 0
    while first < n and len(left):
        some = slice(first, min(first + FIRST_SAMPLES, n))
        part = restore(_samples(problem, some), [cells[i] for i in left.tolist()])
        scores[left, some], taken[left, some] = low[some] + _effects(part), True
        first = some.stop
        effects = scores - low
        count = taken.sum(1)
        mean = effects.nanmean(1)
        spread = ((effects - mean[:, None]) ** 2).nansum(1) / (count - 1).clamp(min=1)
        largest = {kind: max(abs(float(mean[i])) for i, own in enumerate(kinds) if own == kind) for kind in set(kinds)}
        sure = (spread / count).sqrt() <= target * torch.tensor([largest[kind] for kind in kinds], dtype=mean.dtype)
        open_rows = {row for row, done in zip(rows, sure.tolist(), strict=True) if not done}
        left = torch.tensor([i for i in left.tolist() if rows[i] in open_rows], dtype=torch.long)
    return Restored(
        clean=whole.clean, corrupted=low, cells=scores, engine=f"{whole.engine}, adaptive samples", taken=taken
    )


def _effects(part: Restored) -> Tensor:
    """Scores (cell, sample) minus those of the same walk's corrupted run, which another walk's match up to rounding only."""
    return part.cells.cpu().double() - part.corrupted.cpu().double()


def _samples(problem: Restoration, some: slice) -> Restoration:
    """The same experiment with some of its noise samples."""
    if problem.noise is None:
        return problem
    noise = problem.noise[some]
    return replace(problem, noise=noise, corrupted=problem.clean.repeat(len(noise)))


def restore_screened(
    lm: LM, restore: Restore, problem: Restoration, cells: Sequence[Cell], *, share: float, more: bool = True
) -> Restored:
    """Scores of cells that matter computed, of the others estimated by a gradient.

    1. One gradient halfway between corrupted and clean embeddings estimates every cell (`workbench.gradients`, `at="middle"`).
    2. The `share` of each kind's cells with the largest estimates is computed. Cells before the first corrupted token are known.
    3. With `more`: while cells with notable effects turn up, their neighbours in layer and token, and the next `share` of the
       ranking, are computed too.

    Meant to leave no cell above 5 % of the total effect to an estimate; `analyses.screening` measures how that works out.
    Kinds do not matter to each other.

    Args:
        lm: the model.
        restore: what computes cells.
        problem: the experiment; its score must have a derivative, and no path be severed.
        cells: the map.
        share: of a kind's cells that are not known.
        more: whether to go on after the first share.

    Returns:
        As from `restore`, with `estimated` and every cell's `estimate`.
    """
    guess = restore_by_gradient(lm, problem, cells, at="middle")
    scores, estimate = guess.cells.clone(), (guess.cells - guess.corrupted).mean(1)
    place = {(cell.kind, cell.layer, cell.position): i for i, cell in enumerate(cells)}
    ranking: dict[SiteKind, list[int]] = {}
    start = problem.first_changed()
    known = {i for i, cell in enumerate(cells) if cell.position < start}  # restoring them changes nothing
    for i in estimate.abs().argsort(descending=True).tolist():
        if i not in known:
            ranking.setdefault(cells[i].kind, []).append(i)
    at_once = {kind: math.ceil(share * len(ranked)) for kind, ranked in ranking.items()}
    done, low, engine = set(known), guess.corrupted, "sweep"
    least = NOTABLE * abs(float(guess.clean) - float(low.mean()))
    batch = {i for kind, ranked in ranking.items() for i in ranked[: at_once[kind]]}
    while batch:
        order = sorted(batch)
        part = restore(problem, [cells[i] for i in order])
        engine = part.engine
        scores[order] = low + _effects(part)
        done |= batch
        effects = (scores - low).mean(1)
        notable = [cells[i] for i in order if abs(float(effects[i])) > least]
        near = {
            place.get((cell.kind, cell.layer + up, cell.position + along))
            for cell in notable
            for up, along in ((1, 0), (-1, 0), (0, 1), (0, -1))
        }
        batch = {i for i in near if i is not None} - done
        for kind in {cell.kind for cell in notable}:
            batch |= set([i for i in ranking[kind] if i not in done][: at_once[kind]])
        if not more:
            break
    return Restored(
        clean=guess.clean,
        corrupted=low,
        cells=scores,
        engine=f"{engine}, screened by gradient",
        estimated=torch.tensor([i not in done for i in range(len(cells))]),
        estimate=estimate,
    )
