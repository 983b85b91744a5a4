"""Restoring clean activations in a corrupted run: the experiment behind every causal trace, and its plain loop.

The loop is the reference: one forward pass per cell, batched over noise samples only, with nothing shared between cells. Faster
engines take the same `Restoration` and the same cells, and must give the same numbers.

Other experiments are the same one with other runs: patching between two prompts, from either into the other, is a `corrupted` of
another text; zeroing (`put="zero"`) has the same prompt on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.hooks import Activations, Write, run
from workbench.metrics import Score
from workbench.models import LM, Tokens
from workbench.progress import track
from workbench.sites import Site, SiteError, SiteKind


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of a map: at one token, the outputs of some layers are set to their clean values.

    Raises:
        SiteError: a head or a neuron of several layers.
    """

    kind: SiteKind
    """Which outputs."""

    layer: int
    """The layer the cell is drawn at, 0-based."""

    layers: range
    """The layers restored together; only `layer` for a single state."""

    position: int
    """The token, from 0."""

    head: int | None = None
    """0-based: only this head of `z`, in one layer; None for the whole output."""

    neuron: int | None = None
    """0-based: only this neuron of `mlp_post`, in one layer; None for the whole output."""

    def __post_init__(self) -> None:
        if self.single and len(self.layers) != 1:
            raise SiteError(
                f"{self.site(self.layer)} was asked for in {len(self.layers)} layers. A head or a neuron is of one layer."
            )

    @property
    def single(self) -> bool:
        """Whether it is one head or one neuron."""
        return self.head is not None or self.neuron is not None

    def site(self, layer: int) -> Site:
        """What is restored at a layer, at all tokens."""
        return Site(layer=layer, kind=self.kind, head=self.head, neuron=self.neuron)


@dataclass(frozen=True, kw_only=True, eq=False)
class Restoration:
    """A clean prompt, its corrupted copies, and how an outcome is scored."""

    clean: Tokens
    """The prompt: one row."""

    corrupted: Tokens
    """One row a sample: the same prompt, to which noise is added, or a prompt with another subject."""

    noise: Float[Tensor, "sample pos d_model"] | None = None
    """Added to the token embeddings of the corrupted rows, zero outside of the subject; None where the text differs instead."""

    replace: bool = False
    """Put the noise in the place of the subject's embeddings instead of adding it."""

    put: Literal["clean", "zero"] = "clean"
    """What is put at a cell: the clean run's activation, or zero."""

    sever: SiteKind | None = None
    """`attn_out` or `mlp_out`: these outputs, at the restored token in all layers, are held at their corrupted values."""

    steps: int = 1
    """How many tokens of the answer are scored: at so many positions, from the prompt's last token on, logits are needed."""

    score: Score
    """What is measured there."""

    def answer_logits(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row step d_vocab"]:
        """The logits at the positions where the answer is predicted."""
        first = self.clean.lengths[0] - 1
        return logits[:, first : first + self.steps]

    def first_changed(self) -> int:
        """The first position at which a corrupted row with a cell restored may differ from the clean one."""
        if self.put == "zero":
            return 0
        changed = (self.corrupted.ids != self.clean.ids).any(0)
        if self.noise is not None:
            changed = changed | (self.noise != 0).any(-1).any(0).to(changed.device)
        return int(changed.nonzero()[0]) if bool(changed.any()) else self.clean.ids.shape[1]

    def corruption(self) -> dict[Site, Write]:
        """What to write to get the corrupted run."""
        noise = self.noise
        if noise is None:
            return {}
        replace, touched = self.replace, (noise != 0).any(-1, keepdim=True)

        def corrupt(x: Tensor) -> Tensor:
            added = noise.to(x)
            return torch.where(touched.to(x.device), added, x) if replace else x + added

        return {Site(layer=0, kind="embed"): corrupt}

    def corrupted_run(self, lm: LM, *, read: Sequence[SiteKind] = ()) -> Activations:
        """The corrupted run with nothing restored."""
        return run(lm, self.corrupted, read=read, write=self.corruption())


@dataclass(frozen=True, kw_only=True, eq=False)
class Restored:
    """The scores of a clean run, of a corrupted one, and of that one with each cell restored."""

    clean: Float[Tensor, ""]
    """The clean prompt's score."""

    corrupted: Float[Tensor, " sample"]
    """With nothing restored."""

    cells: Float[Tensor, "cell sample"]
    """With a cell restored, in the order the cells were given."""

    engine: str
    """What computed them, in words for the manifest."""

    taken: Bool[Tensor, "cell sample"] | None = None
    """Which of `cells` were computed; None: all. The others are NaN, see `workbench.shortcuts`."""

    estimated: Bool[Tensor, " cell"] | None = None
    """Which cells are estimates; None: none of them."""

    estimate: Float[Tensor, " cell"] | None = None
    """Where some are: what every cell's mean effect was estimated to be."""


def part_of(lm: LM, site: Site, x: Float[Tensor, "... width"]) -> Float[Tensor, "... part"]:
    """The columns of a whole activation that are the site's head or neuron, as a view; all of them where it names neither."""
    if site.part is None:
        return x
    parts = lm.n_heads if site.head is not None else x.shape[-1]
    part: Tensor = x.unflatten(-1, (parts, -1))[..., site.part, :]
    return part


def restore_by_loop(lm: LM, problem: Restoration, cells: Sequence[Cell]) -> Restored:
    """The score of every cell for every noise sample, one forward pass at a time.

    1. One clean run: the activations to restore, and one corrupted run: the outputs that a severed path is held at.
    2. For each cell: corrupt the prompt, hold the severed outputs at the cell's token in all layers, restore the cell's
       outputs, score.
    """
    clean = run(lm, problem.clean, read=sorted({cell.site(layer) for cell in cells for layer in cell.layers}))
    corrupted = problem.corrupted_run(lm, read=(problem.sever,) if problem.sever else ())
    scores = []
    for cell in track(cells, "cells", len(cells)):
        write = problem.corruption()
        for site in lm.sites(problem.sever) if problem.sever else ():
            write[Site(layer=site.layer, kind=site.kind, token=cell.position)] = corrupted[site]
        for layer in cell.layers:
            value = clean[cell.site(layer)]
            put = value if problem.put == "clean" else torch.zeros_like(value)
            write[replace(cell.site(layer), token=cell.position)] = put
        scores.append(problem.score(problem.answer_logits(run(lm, problem.corrupted, write=write).logits)))
    return Restored(
        clean=problem.score(problem.answer_logits(clean.logits))[0],
        corrupted=problem.score(problem.answer_logits(corrupted.logits)),
        cells=torch.stack(scores) if scores else torch.empty(0, len(problem.corrupted)),
        engine="loop",
    )
