"""Maps for less than the exact sweep costs, each by giving something up; `CausalTrace` has an option for each.

- `restore_until_sure`: a cell gets no more noise samples once its mean is known well enough
- `restore_screened`: only cells that matter by their gradient are computed, the others estimated

The third, dropping lanes that have become the corrupted run's, is the sweep's own `tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from workbench.restoring import Cell, Restoration, Restored

Restore = Callable[[Restoration, Sequence[Cell]], Restored]
"""An exact engine, e.g. one problem's sweep."""

FIRST_SAMPLES = 3
"""So many samples are taken of every cell; fewer say nothing about their spread. Then as many again, and so on."""


def restore_until_sure(restore: Restore, problem: Restoration, cells: Sequence[Cell], *, target: float) -> Restored:
    """Scores of cells with fewer samples where fewer do.

    After every few samples, cells whose standard error is at most `target` times the largest mean effect of all cells are done.
    Standard errors of three samples are themselves uncertain, so some cells stop early by chance: the price.

    Args:
        restore: what computes cells.
        problem: the experiment; its samples are taken in their order.
        cells: what to restore.
        target: the standard error that is good enough, in parts of the map's largest effect.

    Returns:
        As from `restore`, with `taken`, and NaN where nothing was.
    """
    n = len(problem.corrupted)
    left = torch.arange(len(cells))
    found: list[Restored] = []
    scores, taken = (
        torch.full((len(cells), n), torch.nan, dtype=torch.float64),
        torch.zeros(len(cells), n, dtype=torch.bool),
    )
    low = torch.full((n,), torch.nan, dtype=torch.float64)
    first = 0
    while first < n and len(left):
        some = slice(first, min(first + FIRST_SAMPLES, n))
        part = restore(_samples(problem, some), [cells[i] for i in left.tolist()])
        scores[left, some], taken[left, some] = part.cells.cpu().double(), True
        low[some] = part.corrupted.cpu().double()
        found.append(part)
        first = some.stop
        effects = (scores - low)[:, :first]
        count = taken.sum(1)
        mean = effects.nanmean(1)
        spread = ((effects - mean[:, None]) ** 2).nansum(1) / (count - 1).clamp(min=1)
        sure = (spread / count).sqrt() <= target * mean.abs().max()
        left = left[~sure[left]]
    return Restored(
        clean=found[0].clean,
        corrupted=low[:first],
        cells=scores[:, :first],
        engine=f"{found[0].engine}, until sure to {target:g}",
        taken=taken[:, :first],
    )


def _samples(problem: Restoration, some: slice) -> Restoration:
    """The same experiment with some of its noise samples."""
    if problem.noise is None:
        return problem
    noise = problem.noise[some]
    return replace(problem, noise=noise, corrupted=problem.clean.repeat(len(noise)))
