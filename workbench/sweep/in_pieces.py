"""The fast engine: blocks taken apart, so that nothing is computed that is known or not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from workbench.models import LM
from workbench.products import spare_rows_here
from workbench.sites import Site, SiteKind
from workbench.sweep.blocks import Pieces, Rotation
from workbench.sweep.engine import Engine, chunks
from workbench.sweep.lanes import SUBLAYER, Group, Lane, Run


@dataclass(eq=False)
class _Notes:
    """What lanes need of one run at one layer."""

    rotation: Rotation | None
    mask: Tensor
    clean_k: Tensor
    """(1, pos, kv, d_head), turned."""

    clean_v: Tensor
    q: Tensor
    """(sample, pos, head, d_head), turned, of the last positions: at the last layer those where the answer is predicted, else those
    from the first change on."""

    k: Tensor
    """(sample, pos, kv, d_head), turned, of all positions."""

    v: Tensor
    attn: Tensor
    """What attention adds (sample, pos, d_model), of the positions of `q`."""

    mlp: Tensor
    """What the MLP adds, of the same."""


class InPieces(Engine):
    """Blocks taken apart, so that nothing is computed that is known or not needed."""

    def __init__(self, lm: LM, runs: Sequence[Run]) -> None:
        super().__init__(lm, runs)
        self.pieces = [Pieces(lm, layer) for layer in range(lm.n_layers)]
        self.errors: list[Tensor] = []
        self.notes: dict[Run, _Notes] = {}

    def error(self) -> float:
        return float(torch.stack(self.errors).max())

    def enter(self, layer: int) -> None:
        for run in self.runs:
            self.notes[run] = self._enter(run, layer)

    def _enter(self, run: Run, layer: int) -> _Notes:
        pieces, mask = self.pieces[layer], run.mask(layer)[0]
        rotation = pieces.rotation(run.calls[layer])

        x = run.clean_state(layer)
        q, k, v = (part[None] for part in pieces.qkv(pieces.norm(x)))
        clean_k, clean_v = pieces.rotate(k, rotation, 0), v
        attn = pieces.out(pieces.attend(pieces.rotate(q, rotation, 0), clean_k, clean_v, mask)[0])
        above = x + attn + pieces.mlp(x if pieces.parallel else x + attn)
        self.errors.append(_difference(above, run.clean_state(layer + 1), x))
        if run.corrupted is not None and (neurons := Site(layer=layer, kind="mlp_post")) in run.corrupted.sites:
            added = run.clean[Site(layer=layer, kind="mlp_out")][0]
            self.errors.append(_difference(pieces.down(run.clean[neurons][0]), added, torch.zeros_like(added)))

        n, length = run.samples, run.length
        kept = run.scored if layer + 1 == self.lm.n_layers else run.start
        h = pieces.norm(run.hidden.flatten(0, 1))
        k, v = (part.unflatten(0, (n, -1)) for part in pieces.kv(h))
        k = pieces.rotate(k, rotation, run.start)
        k, v = (
            torch.cat((clean[:, : run.start].expand(n, -1, -1, -1), own), dim=1)
            for clean, own in ((clean_k, k), (clean_v, v))
        )
        x = run.hidden[:, run.hidden.shape[1] - (length - kept) :]
        q = pieces.rotate(pieces.q(pieces.norm(x.flatten(0, 1))).unflatten(0, (n, -1)), rotation, kept)
        flat = x.flatten(0, 1)
        attn = pieces.out(pieces.attend(q, k, v, mask[kept:]).flatten(0, 1))
        mlp = pieces.mlp(flat if pieces.parallel else flat + attn)
        run.above = (flat + attn + mlp).unflatten(0, (n, -1))
        return _Notes(rotation, mask, clean_k, clean_v, q, k, v, attn.unflatten(0, (n, -1)), mlp.unflatten(0, (n, -1)))

    def restored(self, layer: int, lanes: Sequence[Lane]) -> dict[Lane, Tensor]:
        pieces, found, unknown = self.pieces[layer], dict[Lane, Tensor](), list[Lane]()
        values = self._values(layer, lanes)
        for lane in lanes:
            run, notes = lane.group.run, self.notes[lane.group.run]
            here = lane.group.position - run.length  # from the end: at the last layer only the last positions are kept
            x, attn, mlp = run.hidden[:, here], notes.attn[:, here], notes.mlp[:, here]
            value, output = values[lane], SUBLAYER.get(lane.output, lane.output)
            if output == "mlp_out":
                found[lane] = x + attn + value
            elif pieces.parallel or run.problem.sever == "mlp_out":
                found[lane] = x + value + mlp
            else:
                found[lane] = x + value
                unknown.append(lane)
        if unknown:
            mid = torch.cat([found[lane] for lane in unknown])
            above = (mid + pieces.mlp(mid)).split([len(found[lane]) for lane in unknown])
            found.update(zip(unknown, above, strict=True))
        return found

    def _values(self, layer: int, lanes: Sequence[Lane]) -> dict[Lane, Tensor]:
        """What each lane's sublayer adds with the lane's output restored: (sample or 1, d_model)."""
        values = {lane: lane.put(layer) for lane in lanes}
        for kind, outwards in (("z", self.pieces[layer].out), ("mlp_post", self.pieces[layer].down)):
            inner = [lane for lane in lanes if lane.kind == kind]
            if inner:
                added = outwards(torch.cat([values[lane] for lane in inner]))
                values.update(zip(inner, added.split([len(values[lane]) for lane in inner]), strict=True))
        return values

    def through(self, layer: int, lanes: Sequence[Lane]) -> None:
        for fresh in (True, False):
            for some in chunks([lane for lane in lanes if lane.fresh is fresh]):
                self._chunk(layer, some)

    def _chunk(self, layer: int, lanes: Sequence[Lane]) -> None:
        """Some lanes, all of them fresh or none, through a block."""
        pieces, last = self.pieces[layer], layer + 1 == self.lm.n_layers
        parts = [_Part.of(list(mine), self.notes, last) for _, mine in groupby(lanes, key=lambda lane: lane.group)]
        x = _joined([lane.state[:, -part.queries :].flatten(0, 1) for part in parts for lane in part.lanes])
        heads = self._known(pieces, parts) if lanes[0].fresh else self._projected(pieces, parts, x)
        z = _joined([part.attend(pieces, *each).flatten(0, 1) for part, each in zip(parts, heads, strict=True)])
        attn = _added(pieces.out, z, self._pins("attn_out", layer, parts))
        mid = x + attn
        read = x if pieces.parallel else mid
        del heads, z, attn, x  # their memory serves the MLP
        sizes = [part.queries * part.samples for part in parts for _ in part.lanes]
        added = _added(pieces.mlp, read, self._pins("mlp_out", layer, parts))
        above = iter((mid + added)[: sum(sizes)].split(sizes))
        for part in parts:
            for lane in part.lanes:
                lane.keep(next(above).unflatten(0, (part.samples, -1)))

    def _projected(self, pieces: Pieces, parts: Sequence[_Part], x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Turned queries, keys and values of each part's lanes, from their states `x`."""
        if all(part.queries == part.carried for part in parts):
            q, k, v = pieces.qkv(pieces.norm(x))
        else:
            q = pieces.q(pieces.norm(x))
            whole = _joined([lane.state.flatten(0, 1) for part in parts for lane in part.lanes])
            k, v = pieces.kv(pieces.norm(whole))
        queries, keys = [part.rows * part.queries for part in parts], [part.rows * part.carried for part in parts]
        q, k, v = q[: sum(queries)], k[: sum(keys)], v[: sum(keys)]
        for part, *each in zip(parts, q.split(queries), k.split(keys), v.split(keys), strict=True):
            mine = [rows.unflatten(0, (part.rows, -1)) for rows in each]
            yield part.turned(pieces, *mine)

    def _known(self, pieces: Pieces, parts: Sequence[_Part]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same of lanes that differ from the corrupted run at most in their first token: the rest is noted already."""
        changed = [part for part in parts if not part.group.clean_prefix]
        first = [lane.state[:, 0] for part in changed for lane in part.lanes]
        projected = pieces.qkv(pieces.norm(_joined(first))) if first else ()
        sizes = [part.rows for part in changed]
        each = [rows[: sum(sizes), None].split(sizes) for rows in projected]
        own = {part: mine for part, *mine in zip(changed, *each, strict=True)}
        for part in parts:
            notes, group = part.notes, part.group
            q, k, v = notes.q[:, -part.queries :], notes.k[:, group.first :], notes.v[:, group.first :]
            if part in own:
                new = part.turned(pieces, *own[part])
                if part.queries < part.carried:  # the first token asks nothing in the last block
                    new = (new[0][:, :0], *new[1:])
                q, k, v = (
                    torch.cat((mine, part.repeated(noted[:, mine.shape[1] :])), dim=1)
                    for mine, noted in zip(new, (q, k, v), strict=True)
                )
                yield q, k, v
            else:
                yield part.repeated(q), part.repeated(k), part.repeated(v)

    def _pins(self, kind: SiteKind, layer: int, parts: Sequence[_Part]) -> list[tuple[int, _Part, Tensor | None]]:
        """For every lane: how many rows it has, and what is put at its first token (sample or 1, d_model), if anything."""
        pins: list[tuple[int, _Part, Tensor | None]] = []
        for part in parts:
            run, group, notes = part.group.run, part.group, part.notes
            seen = part.queries == part.carried and not group.clean_prefix
            for lane in part.lanes:
                value = None
                if seen and lane.kind == kind and lane.inside(layer):
                    value = lane.put(layer)
                elif seen and run.problem.sever == kind:
                    value = (notes.attn if kind == "attn_out" else notes.mlp)[:, group.position - run.length]
                pins.append((part.queries, part, value))
        return pins


@dataclass(eq=False)
class _Part:
    """The lanes of one group in a chunk."""

    group: Group
    lanes: list[Lane]
    notes: _Notes
    samples: int
    carried: int
    """Tokens of a row."""

    queries: int
    """The last so many of them are computed."""

    @staticmethod
    def of(lanes: list[Lane], notes: Mapping[Run, _Notes], last: bool) -> _Part:
        group = lanes[0].group
        run = group.run
        carried = run.length - group.first
        return _Part(group, lanes, notes[run], run.samples, carried, run.problem.steps if last else carried)

    @property
    def rows(self) -> int:
        """Lanes x samples."""
        return len(self.lanes) * self.samples

    def turned(self, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the last, and keys of all tokens carried, with their rotary embedding."""
        rotation, first = self.notes.rotation, self.group.first
        return (
            pieces.rotate(q, rotation, first + (k.shape[1] - q.shape[1])),
            pieces.rotate(k, rotation, first),
            v,
        )

    def repeated(self, x: Tensor) -> Tensor:
        """(sample or 1, ...) once for each lane: (row, ...)."""
        return x.expand(len(self.lanes), self.samples, *x.shape[1:]).flatten(0, 1)

    def attend(self, pieces: Pieces, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the tokens carried and those before them: (row, query, width)."""
        notes, group = self.notes, self.group
        before_k, before_v = (notes.clean_k, notes.clean_v) if group.clean_prefix else (notes.k, notes.v)
        k = torch.cat((self.repeated(before_k[:, : group.first]), k), dim=1)
        v = torch.cat((self.repeated(before_v[:, : group.first]), v), dim=1)
        return pieces.attend(q, k, v, notes.mask[-self.queries :])


def _difference(above: Tensor, model: Tensor, below: Tensor) -> Tensor:
    """By how much states above a block differ from the model's own, in parts of what the block adds: the worst token's.

    What rounding the states themselves may do is left out; in half precision it can be more than a block adds.
    """
    eps = torch.finfo(model.dtype).eps
    above, model, below = (x if x.dtype == torch.float64 else x.float() for x in (above, model, below))
    rounding = 4 * eps * model.norm(dim=-1)
    worst: Tensor = (((above - model).norm(dim=-1) - rounding).clamp(min=0) / (model - below).norm(dim=-1)).max()
    return worst


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """One after the other, and after them as many rows of zeros as products would add."""
    if spare := spare_rows_here(sum(map(len, rows))):
        return torch.cat([*rows, rows[0].new_zeros(spare, *rows[0].shape[1:])])
    return torch.cat(list(rows)) if len(rows) > 1 else rows[0]


def _added(
    function: Callable[[Tensor], Tensor], rows: Tensor, pins: Sequence[tuple[int, _Part, Tensor | None]]
) -> Tensor:
    """What a sublayer adds: `function` of the rows; at a lane's first token, where something is pinned, that instead."""
    if all(value is None for _, _, value in pins):
        return function(rows)
    sizes = [part.samples * n for n, part, _ in pins]
    each = torch.arange(sum(sizes), device=rows.device).split(sizes)
    kept, pinned, values = [], [], []
    for (n, part, value), mine in zip(pins, each, strict=True):
        if value is None:
            kept.append(mine)
        else:
            grid = mine.unflatten(0, (part.samples, n))
            kept.append(grid[:, 1:].flatten())
            pinned.append(grid[:, 0])
            values.append(value.expand(part.samples, -1))
    computed = torch.cat(kept)
    added = torch.empty_like(rows[:, :1]).expand(-1, values[0].shape[-1]).clone()
    if n := len(computed):
        added[computed] = function(_joined([rows[computed]]))[:n]
    added[sum(sizes) :] = 0  # what was joined for products alone
    added[torch.cat(pinned)] = torch.cat(values).to(added.dtype)
    return added
