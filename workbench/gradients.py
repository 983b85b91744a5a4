"""What restoring would do, to first order: a whole map from two forward passes and one backward (attribution patching).

Nanda 2023 ("Attribution patching"); Syed et al. 2023 (arXiv 2310.10348); along a path EAP-IG, Hanna et al. 2024 (arXiv 2403.17806).

1. Clean run and corrupted run: for each noise sample the difference of every activation, which restoring would make up (or, where
   zero is put at a cell, the difference to zero).
2. One backward pass from the sum of all rows' scores: the rows do not see each other, so each gets its own gradient.
3. A cell's estimate is difference times gradient, summed over the activation's width and over the layers of the cell's window.

The score is far from linear in an activation, so gradients can be averaged over several points. They lie on the straight path from
the corrupted to the clean *input embeddings*, alpha = 0 to 1, cut into `steps` equal parts; `at` says where on each part the
gradient is taken. `at="clean"` is the sum of the EAP-IG paper, alpha = k / steps for k = 1 .. steps; versions of its code run from
0 to steps - 1, which is `at="corrupted"` here. The differences are those of the two ends, whatever the number of steps.

In a window, every layer's difference counts in full, as if it were added and the layers above it answered. Restoring a window
overwrites those answers: what one layer of it hands to the next is counted twice here and once there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks import Activations, Write, run
from workbench.models import LM
from workbench.products import fast_products
from workbench.progress import track
from workbench.restoring import Cell, Restoration, Restored, part_of
from workbench.sites import Site, SiteKind

At = Literal["corrupted", "middle", "clean", "both"]
"""Where on each part of the path the gradient is taken:

- `corrupted`: at its corrupted end, as attribution patching does with a single step
- `middle`: in its middle
- `clean`: at its clean end, as the EAP-IG paper does with several steps
- `both`: at both ends, and averaged; neighbouring parts share theirs, so `steps` parts need `steps + 1` gradients
"""

_EMBED = Site(layer=0, kind="embed")


def estimate(
    lm: LM, problem: Restoration, cells: Sequence[Cell], *, steps: int = 1, at: At = "corrupted"
) -> Float[Tensor, "cell sample"]:
    """By how much the score would change in every noise sample if a cell were restored, to first order.

    Cells before the first corrupted token restore what is not changed: theirs is 0. Arguments and errors as `restore_by_gradient`.

    Returns:
        Estimated score of the restored run minus score of the corrupted run, in the score's unit; float64 on the CPU.
    """
    restored = restore_by_gradient(lm, problem, cells, steps=steps, at=at)
    return restored.cells - restored.corrupted


def restore_by_gradient(
    lm: LM, problem: Restoration, cells: Sequence[Cell], *, steps: int = 1, at: At = "corrupted"
) -> Restored:
    """The score of every cell for every noise sample as a gradient foretells it, in the order of `cells`.

    Args:
        lm: the model.
        problem: the experiment. Its score must have a derivative.
        cells: what would be restored.
        steps: into how many parts the path from corrupted to clean embeddings is cut.
        at: where on each part the gradient is taken.

    Returns:
        Scores, in float64 on the CPU; those of the clean and of the corrupted run are exact. An estimate may be no possible score,
        e.g. a probability below 0.

    Raises:
        InputError: less than one step, an unknown `at`, a severed path, or a score without a derivative.
    """
    if steps < 1 or at not in get_args(At):
        raise InputError(
            f"steps is {steps} and at is {at!r}, expected 1 or more, and one of {', '.join(get_args(At))}."
        )
    if torch.is_inference_mode_enabled():
        raise InputError(
            "Inside of torch.inference_mode() there are no gradients, so nothing can be estimated. Leave it."
        )
    if problem.sever is not None:
        raise InputError(
            f"A gradient runs through all tokens at once, so {problem.sever} cannot be severed at the restored one alone. "
            "Compute severed traces exactly."
        )
    restored = {cell.site(layer) for cell in cells for layer in cell.layers}
    whole = {site: Site(layer=site.layer, kind=site.kind) for site in restored}
    clean, corrupted, products = _products(lm, problem, sorted(set(whole.values())), steps, at)
    effects = {site: part_of(lm, site, products[whole[site]]).sum(-1).cpu().double() for site in restored}
    start, none = problem.first_changed(), torch.zeros(len(problem.corrupted), dtype=torch.float64)
    change = torch.stack([_sum(effects, cell) if cell.position >= start else none for cell in cells])
    high, low = (problem.score(problem.answer_logits(x.logits)).cpu().double() for x in (clean, corrupted))
    return Restored(
        clean=high[0],
        corrupted=low,
        cells=low + change,
        engine=f"gradient: {steps} {'step' if steps == 1 else 'steps'}, {at}",
    )


def estimate_entries(lm: LM, problem: Restoration, kind: SiteKind) -> Float[Tensor, "layer sample pos width"]:
    """By how much the score would change if one entry of an activation were restored, to first order: difference times gradient in
    the corrupted run. For `mlp_post`, an entry is a neuron.

    Returns:
        For each layer, sample, token (those of the answer included, where it is scored whole) and entry, in the score's unit.
    """
    _, _, products = _products(lm, problem, lm.sites(kind), 1, "corrupted")
    return torch.stack([products[site] for site in lm.sites(kind)])


def _products(
    lm: LM, problem: Restoration, sites: Sequence[Site], steps: int, at: At
) -> tuple[Activations, Activations, dict[Site, Float[Tensor, "sample pos width"]]]:
    """The clean run, the corrupted run, and difference times gradient at every site."""
    clean = run(lm, problem.clean, read=[_EMBED, *sites])
    corrupted: Activations | None = None
    slopes: dict[Site, Tensor] = {}
    points = _points(steps, at)
    for alpha, weight in track(points.items(), "gradients", len(points)) if len(points) > 1 else points.items():
        met, gradients = _gradients(lm, problem, sites, clean[_EMBED], alpha)
        corrupted = met if alpha == 0 else corrupted
        for site, gradient in gradients.items():
            slopes[site] = slopes[site] + weight * gradient if site in slopes else weight * gradient
    if corrupted is None:
        corrupted = run(lm, problem.corrupted, read=sites, write=problem.corruption())
    products = {}
    for site, slope in slopes.items():
        put = clean[site] if problem.put == "clean" else torch.zeros_like(clean[site])
        products[site] = (put.to(slope) - corrupted[site]) * slope
    return clean, corrupted, products


def _points(steps: int, at: At) -> dict[float, float]:
    """The places on the path, 0 (corrupted) to 1 (clean), and the weight of the gradient at each; weights sum to 1."""
    offsets = {"corrupted": (0.0,), "middle": (0.5,), "clean": (1.0,), "both": (0.0, 1.0)}[at]
    points = Counter((k + offset) / steps for k in range(steps) for offset in offsets)
    return {alpha: count / points.total() for alpha, count in sorted(points.items())}


def _gradients(
    lm: LM, problem: Restoration, sites: Sequence[Site], clean: Float[Tensor, "1 pos d_model"], alpha: float
) -> tuple[Activations, dict[Site, Tensor]]:
    """The activations and the score's gradients (sample, pos, width) at one point of the path.

    At its clean end all rows are equal, and one, which broadcasts, stands for all.
    """
    met: dict[Site, Tensor] = {}
    tokens = problem.clean if alpha == 1 else problem.corrupted
    corrupt = problem.corruption().get(_EMBED)

    def embed(x: Tensor) -> Tensor:
        if alpha < 1:
            x = x if corrupt is None else corrupt(x) if callable(corrupt) else corrupt.to(x)
            x = x.lerp(clean.expand_as(x), alpha)
        met[_EMBED] = x.detach().clone().requires_grad_()
        return met[_EMBED]

    def meet(site: Site) -> Write:
        """Notes the very tensor that the model goes on with; what `run` reads may be a copy beside the way to the logits."""

        def write(x: Tensor) -> Tensor:
            met[site] = x.clone()
            return met[site]

        return write

    writes: dict[Site, Write] = {site: meet(site) for site in sites if site != _EMBED}
    with torch.enable_grad(), fast_products(lm.device, lm.dtype, weights_fixed=True):  # gradients may have been off
        logits = run(lm, tokens, write={**writes, _EMBED: embed}, grad=True).logits
        total = problem.score(problem.answer_logits(logits)).sum()
    if not total.requires_grad:
        raise InputError(
            "This score has no derivative, so restoring cannot be estimated. Use p, logp, logit_diff or kl."
        )
    gradients = torch.autograd.grad(total, [met[site] for site in sites])
    kept = torch.float64 if lm.dtype == torch.float64 else torch.float32
    return (
        Activations(tokens=tokens, logits=logits.detach(), sites={site: met[site].detach() for site in sites}),
        {site: gradient.to(kept) for site, gradient in zip(sites, gradients, strict=True)},
    )


def _sum(effects: Mapping[Site, Float[Tensor, "sample pos"]], cell: Cell) -> Float[Tensor, " sample"]:
    layers = [effects[cell.site(layer)][:, cell.position] for layer in cell.layers]
    return torch.stack(layers).sum(0)
