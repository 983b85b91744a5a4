"""The engine for every family: the model's own blocks, whole, on slices of tokens behind a stand-in cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from workbench.hooks import run_block
from workbench.models import LM
from workbench.sites import Site, SiteKind
from workbench.sweep.engine import Engine, chunks
from workbench.sweep.lanes import Lane, Run

_CACHE_NAMES = ("past_key_values", "layer_past")


class Whole(Engine):
    """The model's own blocks on slices of tokens, with a stand-in cache."""

    def __init__(self, lm: LM, runs: Sequence[Run]) -> None:
        super().__init__(lm, runs)
        self.clean: dict[Run, Cache] = {}
        self.corrupted: dict[Run, Cache] = {}
        self.held: dict[Run, Tensor] = {}

    def enter(self, layer: int) -> None:
        for run in self.runs:
            clean, corrupted = Cache(), Cache()
            run_block(self.lm, layer, block_call(run, layer, run.clean_state(layer)[None], 0, clean))
            if run.start:
                corrupted.prefix = clean.before(run.start, run.samples)
            sever: tuple[SiteKind, ...] = (run.problem.sever,) if run.problem.sever else ()
            run.above, read = run_block(
                self.lm, layer, block_call(run, layer, run.hidden, run.start, corrupted), read=sever
            )
            self.clean[run], self.corrupted[run] = clean, corrupted
            if run.problem.sever:
                self.held[run] = read[run.problem.sever]

    def restored(self, layer: int, lanes: Sequence[Lane]) -> dict[Lane, Tensor]:
        found: dict[Lane, Tensor] = {}
        for (group, output), alike in groupby(lanes, key=lambda lane: (lane.group, lane.output)):
            run, position = group.run, group.position
            for some in chunks(list(alike)):
                cache = Cache(self.corrupted[run].before(position, len(some)))
                hidden = run.hidden[:, [position - run.length]].repeat(len(some), 1, 1)
                put = [lane.put(layer).expand(run.samples, -1) for lane in some]
                writes = self._held(run, position, len(some))
                writes[output] = _put(torch.cat(put), slice(None))
                above, _ = run_block(self.lm, layer, block_call(run, layer, hidden, position, cache), write=writes)
                found.update(zip(some, above[:, 0].split(run.samples), strict=True))
        return found

    def through(self, layer: int, lanes: Sequence[Lane]) -> None:
        for _, mine in groupby(lanes, key=lambda lane: lane.group):
            for some in chunks(list(mine)):
                self._chunk(layer, some)
        if layer + 1 == self.lm.n_layers:
            for lane in lanes:
                lane.state = lane.state[:, -lane.group.run.problem.steps :]

    def _chunk(self, layer: int, lanes: Sequence[Lane]) -> None:
        group = lanes[0].group
        run, n = group.run, group.run.samples
        before = (self.clean if group.clean_prefix else self.corrupted)[run]
        cache = Cache(before.before(group.first, len(lanes) if before.rows == n else len(lanes) * n))
        hidden = torch.cat([lane.state for lane in lanes])
        writes = {} if group.clean_prefix else self._held(run, group.position, len(lanes))
        inside = [i for i, lane in enumerate(lanes) if lane.inside(layer)]
        for kind in {lanes[i].output for i in inside}:
            rows = torch.cat([torch.arange(i * n, (i + 1) * n) for i in inside if lanes[i].kind == kind])
            writes[kind] = _put(run.put(Site(layer=layer, kind=kind), group.position), rows.to(hidden.device))
        above, _ = run_block(self.lm, layer, block_call(run, layer, hidden, group.first, cache), write=writes)
        for lane, state in zip(lanes, above.split(n), strict=True):
            lane.keep(state)

    def _held(self, run: Run, position: int, lanes: int) -> dict[SiteKind, Callable[[Tensor], Tensor]]:
        """The write that holds a severed output at its corrupted value."""
        if run.problem.sever is None:
            return {}
        value = self.held[run][:, position - run.length].repeat(lanes, 1)
        return {run.problem.sever: _put(value, slice(None))}


class Cache:
    """Stands in for a key-value cache: puts keys and values (row, head, pos, d_head) in front of a block's own, notes both."""

    def __init__(self, prefix: tuple[Tensor, Tensor] | None = None) -> None:
        self.prefix = prefix
        self.noted: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> int:
        """Rows of what was noted."""
        assert self.noted is not None
        return len(self.noted[0])

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.prefix is not None:
            keys, values = (torch.cat((old, new), dim=2) for old, new in zip(self.prefix, (keys, values), strict=True))
        self.noted = keys, values
        return keys, values

    def before(self, position: int, times: int) -> tuple[Tensor, Tensor]:
        """The noted keys and values before a position, so many times over."""
        assert self.noted is not None
        keys, values = (noted[:, :, :position].repeat(times, 1, 1, 1) for noted in self.noted)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.prefix is None else self.prefix[0].shape[2]


def block_call(run: Run, layer: int, hidden: Tensor, first: int, cache: Cache) -> dict[str, Any]:
    """The block's own arguments, cut to the positions of `hidden` (row, pos, d_model), which begin at `first`."""
    rows, length, _ = hidden.shape
    whole = first + length
    call = dict(run.calls[layer])
    call["hidden_states"] = hidden
    if (ids := call.get("position_ids")) is not None:
        call["position_ids"] = ids[:1, first:whole].expand(rows, -1)
    if (rotary := call.get("position_embeddings")) is not None:
        call["position_embeddings"] = tuple(x[:1, first:whole] for x in rotary)
    if (alibi := call.get("alibi")) is not None:  # BLOOM's has batch and heads in one dimension
        alibi = alibi[..., :whole]
        call["alibi"] = (
            alibi[: run.lm.n_heads].repeat(rows, 1, 1) if alibi.dim() == 3 else alibi[:1].expand(rows, -1, -1, -1)
        )
    call["attention_mask"] = run.mask(layer)[None, :, first:whole, :whole].expand(rows, -1, -1, -1)
    call["use_cache"] = True
    for name in _CACHE_NAMES:
        if name in call:
            call[name] = cache
    return call


def _put(value: Tensor, rows: Tensor | slice) -> Callable[[Tensor], Tensor]:
    """Writes `value` (row or 1, width) at the first position of some rows."""

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[rows, 0] = value.to(x)
        return x

    return write
