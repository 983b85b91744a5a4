"""A whole map of restorations in one pass over the layers: the same numbers as the plain loop, several times cheaper.

Restoring an output at token t and layer l changes nothing below layer l and nothing before token t. So:

1. One clean run and one corrupted run are kept: activations to restore, and for each layer the residual, keys and values.
2. A lane is one cell, or several cells that restore the same outputs, for all noise samples. It joins the batch at the first layer
   that it changes, with the corrupted residual of positions t and after; for those before t, the corrupted run's keys and values
   serve.
3. One walk up the layers moves all lanes. Each block is the model's own, called on a slice of positions with a cache that puts the
   kept keys and values in front. Inside its window, a lane's restored output is written by the block's taps.
4. At the top only the positions where the answer is predicted meet the final norm and the unembedding.

Cells before the corruption starts restore what is not changed: they have the corrupted run's score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.hooks import capture_calls, run, run_block
from workbench.metrics import lens_logits
from workbench.models import LM
from workbench.progress import track
from workbench.restoring import Cell, Restoration
from workbench.sites import Site, SiteKind

_STATES = ("resid_pre", "resid_post")
_CACHE_NAMES = ("past_key_values", "layer_past")

POSITIONS_AT_ONCE = 2048
"""Positions (rows x tokens) that go through a block together, so that intermediates stay small."""


def sweepable(lm: LM, cells: Sequence[Cell]) -> str:
    """Why this model or these cells cannot be swept, or an empty string where they can.

    A block must take a cache and an explicit mask; flash attention takes no mask, and the embedding is below all blocks.
    """
    attention = str(lm.model.config._attn_implementation)
    if attention not in ("eager", "sdpa"):
        return f"attention {attention!r} takes no explicit mask"
    if any(cell.kind == "embed" for cell in cells):
        return "the embedding is restored below the blocks"
    if len({parameter.device for parameter in lm.model.parameters()}) > 1:
        return "the blocks lie on several devices"
    return ""


@torch.no_grad()
def restore_by_sweep(lm: LM, problem: Restoration, cells: Sequence[Cell]) -> Float[Tensor, "cell sample"]:
    """The score of every cell for every noise sample, as `restore_by_loop` gives them, in the order of `cells`."""
    kinds: list[SiteKind] = sorted({cell.kind for cell in cells})
    clean = run(lm, problem.clean, read=kinds)
    below: list[SiteKind] = ["resid_pre", *([problem.sever] if problem.sever else [])]
    corrupted, calls = capture_calls(lm, problem.corrupted, read=below, write=problem.corruption())
    low = problem.score(problem.answer_logits(corrupted.logits))
    start = problem.first_changed()
    lanes = {_Lane.of(cell) for cell in cells if cell.position >= start}
    groups = [
        _Group(
            position=position, waiting=sorted((lane for lane in lanes if lane.position == position), key=_Lane.order)
        )
        for position in sorted({lane.position for lane in lanes})
    ]
    held = {site.layer: corrupted[site] for site in lm.sites(problem.sever)} if problem.sever else {}
    walk = _Walk(lm=lm, problem=problem, clean=clean.sites, held=held, calls=calls)
    for layer in track(range(lm.n_layers), "layers", lm.n_layers):
        hidden = corrupted[Site(layer=layer, kind="resid_pre")]
        above = corrupted[Site(layer=layer + 1, kind="resid_pre")] if layer + 1 < lm.n_layers else None
        memory = _Memory()
        top = run_block(lm, layer, walk.call(layer, hidden, 0, memory), write={})
        for group in groups:
            walk.join(group, layer, hidden)
            walk.through(group, layer, memory)
            walk.join_after(group, layer, top if above is None else above)
    scores = {lane: row for group in groups for lane, row in walk.scores(group)}
    return torch.stack([scores[_Lane.of(cell)] if cell.position >= start else low for cell in cells])


@dataclass(frozen=True)
class _Lane:
    """What one or several cells restore."""

    kind: SiteKind
    layers: range
    position: int

    @staticmethod
    def of(cell: Cell) -> _Lane:
        return _Lane(cell.kind, cell.layers, cell.position)

    def order(self) -> tuple[int, int, str]:
        return (self.layers.start, self.layers.stop, self.kind)


@dataclass(eq=False)
class _Group:
    """The lanes of one token: they carry the same positions."""

    position: int
    waiting: list[_Lane]
    aboard: list[_Lane] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    """One (sample, pos, d_model) a lane aboard."""


class _Memory:
    """Stands in for a key-value cache: notes a block's keys and values, or puts noted ones in front of a lane's own."""

    def __init__(self, prefix: tuple[Tensor, Tensor] | None = None) -> None:
        self.prefix, self.noted = prefix, (torch.empty(0), torch.empty(0))

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.prefix is None:
            self.noted = keys, values
            return keys, values
        return torch.cat((self.prefix[0], keys), dim=2), torch.cat((self.prefix[1], values), dim=2)

    def before(self, position: int, lanes: int) -> _Memory:
        """The noted keys and values before a position, for so many lanes of the same samples."""
        keys, values = (noted[:, :, :position].repeat(lanes, 1, 1, 1) for noted in self.noted)
        return _Memory((keys, values))

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.prefix is None else self.prefix[0].shape[2]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Walk:
    """What all lanes of a sweep share."""

    lm: LM
    problem: Restoration
    clean: Mapping[Site, Tensor]
    held: Mapping[int, Tensor]
    """By layer, the corrupted output that is held at the restored token; empty without a severed path."""

    calls: Mapping[int, Mapping[str, Any]]
    """By layer, the arguments the model itself calls the block with."""

    def join(self, group: _Group, layer: int, hidden: Tensor) -> None:
        """Lanes whose first change is in this block, or is the state before it, come aboard."""
        for lane in list(group.waiting):
            if lane.kind != "resid_post" and lane.layers.start == layer:
                state = hidden[:, group.position :]
                self._board(group, lane, self._restored(lane, layer, state) if lane.kind == "resid_pre" else state)

    def join_after(self, group: _Group, layer: int, hidden: Tensor) -> None:
        """Lanes that restore the state after this block come aboard."""
        for lane in list(group.waiting):
            if lane.kind == "resid_post" and lane.layers.start == layer:
                self._board(group, lane, self._restored(lane, layer, hidden[:, group.position :]))

    def _restored(self, lane: _Lane, layer: int, state: Tensor) -> Tensor:
        state = state.clone()
        state[:, 0] = self.clean[Site(layer=layer, kind=lane.kind)][0, lane.position]
        return state

    @staticmethod
    def _board(group: _Group, lane: _Lane, state: Tensor) -> None:
        group.waiting.remove(lane)
        group.aboard.append(lane)
        group.hidden.append(state)

    def through(self, group: _Group, layer: int, memory: _Memory) -> None:
        """All lanes aboard go through a block, some at a time."""
        if not group.aboard:
            return
        samples, positions, _ = group.hidden[0].shape
        at_once = max(1, POSITIONS_AT_ONCE // (samples * positions))
        for first in range(0, len(group.aboard), at_once):
            some = slice(first, first + at_once)
            lanes = group.aboard[some]
            call = self.call(
                layer, torch.cat(group.hidden[some]), group.position, memory.before(group.position, len(lanes))
            )
            out = run_block(self.lm, layer, call, write=self._writes(lanes, layer, samples))
            group.hidden[some] = out.split(samples)

    def _writes(self, lanes: Sequence[_Lane], layer: int, samples: int) -> dict[SiteKind, Callable[[Tensor], Tensor]]:
        """What to write in this block: restored outputs of the lanes inside their window, held outputs for all."""
        writes: dict[SiteKind, Callable[[Tensor], Tensor]] = {}
        inside = [i for i, lane in enumerate(lanes) if lane.kind not in _STATES and layer in lane.layers]
        for kind in {lanes[i].kind for i in inside}:
            mine = [i for i in inside if lanes[i].kind == kind]
            value = self.clean[Site(layer=layer, kind=kind)][0, lanes[0].position]
            rows = torch.tensor([i * samples + s for i in mine for s in range(samples)], device=value.device)
            writes[kind] = _put(value, rows)
        if self.held and self.problem.sever is not None:
            value = self.held[layer][:, lanes[0].position].repeat(len(lanes), 1)
            writes[self.problem.sever] = _put(value, torch.arange(len(value), device=value.device))
        return writes

    def call(self, layer: int, hidden: Tensor, position: int, memory: _Memory) -> dict[str, Any]:
        """The block's own arguments, cut to the positions from `position` on, for these rows."""
        rows, length, _ = hidden.shape
        whole = position + length
        call = dict(self.calls[layer])
        call["hidden_states"] = hidden
        if (ids := call.get("position_ids")) is not None:
            call["position_ids"] = ids[:1, position:].expand(rows, -1)
        if (rotary := call.get("position_embeddings")) is not None:
            call["position_embeddings"] = tuple(x[:1, position:] for x in rotary)
        if (alibi := call.get("alibi")) is not None:  # BLOOM's has batch and heads in one dimension
            heads = self.lm.n_heads
            call["alibi"] = alibi[:heads].repeat(rows, 1, 1) if alibi.dim() == 3 else alibi[:1].expand(rows, -1, -1, -1)
        mask = call.get("attention_mask")
        if mask is None:
            mask = torch.zeros(1, 1, whole, whole, dtype=hidden.dtype, device=hidden.device)
            mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), torch.finfo(hidden.dtype).min)
        call["attention_mask"] = mask[:1, :, position:whole, :whole].expand(rows, -1, -1, -1)
        call["use_cache"] = True
        for name in _CACHE_NAMES:
            if name in call:
                call[name] = memory
        return call

    def scores(self, group: _Group) -> Iterator[tuple[_Lane, Tensor]]:
        """The score of every lane of a group: final norm and unembedding at the answer's positions alone."""
        samples = len(group.hidden[0])
        first = self.problem.corrupted.lengths[0] - 1 - group.position
        at_once = max(1, POSITIONS_AT_ONCE // (samples * self.problem.steps))
        for begin in range(0, len(group.aboard), at_once):
            some = slice(begin, begin + at_once)
            hidden = torch.cat([h[:, first : first + self.problem.steps] for h in group.hidden[some]])
            scored = self.problem.score(lens_logits(self.lm, hidden))
            yield from zip(group.aboard[some], scored.split(samples), strict=True)


def _put(value: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Writes `value` at the first position of some rows."""

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[rows, 0] = value.to(x)
        return x

    return write
