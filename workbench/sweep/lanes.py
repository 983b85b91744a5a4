"""What a sweep carries: the clean and the corrupted run of each problem, and the lanes that depart from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import psutil
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks import capture_calls, run_below
from workbench.metrics import Score
from workbench.models import LM
from workbench.restoring import Cell, Restoration, Restored, part_of
from workbench.sites import Site, SiteKind

_STATES: set[SiteKind] = {"embed", "resid_pre", "resid_post"}
SUBLAYER: dict[SiteKind, SiteKind] = {"z": "attn_out", "mlp_post": "mlp_out"}
"""What an inner activation decides, and nothing but that."""


class Run:
    """The clean and the corrupted run of one problem, as far up as the walk has come."""

    def __init__(self, lm: LM, problem: Restoration, cells: Sequence[Cell]) -> None:
        kinds, single = {cell.kind for cell in cells}, {cell.kind for cell in cells if cell.single}
        outputs: list[SiteKind] = sorted((kinds | {SUBLAYER.get(kind, kind) for kind in kinds}) - _STATES)
        self.lm, self.problem = lm, problem
        top = Site(layer=lm.n_layers - 1, kind="resid_post")
        self.clean, self.calls = capture_calls(lm, problem.clean, read=["resid_pre", top, *outputs])
        self.length = problem.clean.ids.shape[1]
        self.scored = self.length - problem.steps
        """The first token whose logits are needed."""

        self.start = min(problem.first_changed(), self.scored)
        """The first token carried in the corrupted rows."""

        self._below: Tensor = run_below(lm, problem.corrupted, write=problem.corruption())[:, self.start :]
        self.samples = len(self._below)
        self.corrupted = problem.corrupted_run(lm, read=sorted(single)) if single else None
        """For single heads and neurons: what stands beside them."""

        self.begin()

    def begin(self) -> None:
        """Back to the first layer."""
        self.hidden, self.above = self._below, self._below

    def rise(self) -> None:
        """To the next layer: what the engine put into `above` is what enters it."""
        self.hidden = self.above

    def top_error(self) -> Tensor:
        """By how much the answer's log-probability differs between the model's own logits and those made of its last states."""
        answer = self.problem.score.answer
        score = Score(kind="logp", answer=replace(answer, ids=answer.ids[:1]))
        last = self.clean_state(self.lm.n_layers)[None, self.scored : self.scored + 1]
        own = score(self.problem.answer_logits(self.clean.logits)[:, :1])
        return (score.of_states(self.lm, last) - own).abs()[0]

    def low(self) -> Tensor:
        """The corrupted run's score (sample,), once the walk is at the top."""
        return self.problem.score.of_states(self.lm, self.hidden[:, -self.problem.steps :])

    def clean_state(self, layer: int) -> Tensor:
        """The clean states (pos, d_model) that enter a layer, or leave the last one."""
        if layer < self.lm.n_layers:
            return self.clean[Site(layer=layer, kind="resid_pre")][0]
        return self.clean[Site(layer=layer - 1, kind="resid_post")][0]

    def put(self, site: Site, position: int) -> Tensor:
        """What is put at a restored output: (1, width); for a single head or neuron (sample, width), as all others stay."""
        whole = Site(layer=site.layer, kind=site.kind)
        value = self.clean[whole][:, position]
        value = value if self.problem.put == "clean" else torch.zeros_like(value)
        if site.part is None:
            return value
        assert self.corrupted is not None  # as the cells told
        row = self.corrupted[whole][:, position].clone()
        part_of(self.lm, site, row)[:] = part_of(self.lm, site, value)
        return row

    def mask(self, layer: int) -> Tensor:
        """What is added to attention's scores: (1 or head, query, key). Falcon's has its ALiBi in it, head by head."""
        given = self.calls[layer].get("attention_mask")
        dtype, device, square = self.hidden.dtype, self.hidden.device, (self.length, self.length)
        if given is not None and given.dtype != torch.bool:
            mask: Tensor = given[0, :, -self.length :, : self.length].to(dtype)
            return mask
        if given is None:
            seen = torch.ones(square, dtype=torch.bool, device=device).tril()[None]
        else:
            seen = given[0, :, -self.length :, : self.length]
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)


@dataclass(eq=False)
class Group:
    """The lanes of one token: they carry the same tokens behind the same keys and values."""

    run: Run
    position: int
    """The restored token."""

    first: int
    """The first token carried."""

    clean_prefix: bool
    """Whether the clean run's keys and values stand before it, and not the corrupted run's."""


@dataclass(eq=False)
class Lane:
    """What one or several cells restore, and the states of all noise samples with it restored."""

    group: Group
    kind: SiteKind | None
    """The output restored; None for a whole state."""

    layers: range
    """Where; empty for a state."""

    enters: int
    """The layer that it enters with a state changed at its token alone."""

    single: Site | None = None
    """The head or neuron, where it restores a single one."""

    leader: Lane | None = None
    """The lane that it forks from, where a longer window starts with its own."""

    state: Tensor = field(default_factory=lambda: torch.empty(0))
    """(sample, pos, d_model): the tokens carried; after the last layer those where the answer is predicted."""

    place: Tensor = field(default_factory=lambda: torch.empty(0))
    """Where its states are kept: memory for all tokens carried, a part of what the whole walk takes."""

    aboard: bool = False
    """Whether it has joined the walk and is not yet scored."""

    fresh: bool = False
    """Whether only the restored token differs from the corrupted run."""

    dropped: bool = False
    """Whether it was given up, as it hardly differed from the corrupted run."""

    score: Tensor = field(default_factory=lambda: torch.empty(0))
    """(sample,), when it is done."""

    @property
    def output(self) -> SiteKind:
        """The output that a lane with a window restores."""
        assert self.kind is not None
        return self.kind

    def put(self, layer: int) -> Tensor:
        """What stands there at its token, (sample or 1, width)."""
        return self.group.run.put(self.single or Site(layer=layer, kind=self.output), self.group.position)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(sample, pos, d_model) of its states."""
        run = self.group.run
        return run.samples, run.length - self.group.first, run.lm.d_model

    def board(self, restored: Tensor | None = None) -> None:
        """Comes aboard with the corrupted states of its tokens, and the restored one (sample, d_model) of the first."""
        group, run = self.group, self.group.run
        top = self.enters == run.lm.n_layers
        first = max(group.first, run.scored) if top else group.first
        state = run.hidden[:, run.hidden.shape[1] - (run.length - first) :]
        self.keep(state)
        if not group.clean_prefix and group.position >= first:
            if restored is None:
                clean = run.clean_state(self.enters)[group.position]
                restored = clean if run.problem.put == "clean" else torch.zeros_like(clean)
            self.state[:, 0] = restored
        self.fresh, self.aboard = True, True

    def fork(self) -> None:
        """Comes aboard where its window ends and its leader's goes on."""
        assert self.leader is not None
        self.keep(self.leader.state)
        self.fresh, self.aboard = self.leader.fresh, True

    def keep(self, state: Tensor) -> None:
        """Its states from now on: (sample, pos, d_model), all tokens carried or the last of them."""
        self.state = self.place[:, -state.shape[1] :]
        self.state.copy_(state)

    def leave(self, score: Tensor) -> None:
        """Ends the walk with its score."""
        self.score, self.state, self.place, self.aboard = score, torch.empty(0), torch.empty(0), False

    def decayed(self, layer: int, tolerance: float) -> bool:
        """Whether nothing will be put in place any more and the states that enter a layer are the corrupted run's, but for a
        small part of their norm."""
        if self.group.clean_prefix or layer < self.layers.stop:
            return False
        corrupted = self.group.run.hidden[:, -self.state.shape[1] :]
        return bool(((self.state - corrupted).norm(dim=-1) <= tolerance * corrupted.norm(dim=-1)).all())

    def drop(self) -> None:
        """Ends the walk early."""
        self.state, self.place, self.aboard, self.dropped = torch.empty(0), torch.empty(0), False, True

    def inside(self, layer: int) -> bool:
        """Whether its output is put in place at this layer."""
        return self.kind is not None and layer in self.layers and self.leader is None


def set_leaders(lanes: Sequence[Lane]) -> dict[int, list[Lane]]:
    """Lets the widest of the windows that start together lead; the others fork at the layer after their last."""
    for lane in lanes:
        lane.leader = None
    forks: dict[int, list[Lane]] = {}
    windows = [lane for lane in lanes if lane.kind is not None]

    def start(lane: Lane) -> tuple[int, str, str, int]:
        return id(lane.group), lane.output, str(lane.single), lane.layers.start

    by_start = sorted(windows, key=lambda lane: (start(lane), -lane.layers.stop))
    for _, together in groupby(by_start, key=start):
        leader, *others = together
        for lane in others:
            lane.leader = leader
            forks.setdefault(lane.layers.stop, []).append(lane)
    return forks


def give_places(lanes: Sequence[Lane]) -> None:
    """Memory for all lanes of a walk at once. Taken piece by piece in every layer it would be torn into small holes."""
    for run in {lane.group.run: None for lane in lanes}:
        mine = [lane for lane in lanes if lane.group.run is run]
        sizes = [math.prod(lane.shape) for lane in mine]
        for lane, place in zip(mine, run.hidden.new_empty(sum(sizes)).split(sizes), strict=True):
            lane.place = place.view(lane.shape)


class Plan:
    """Which lane gives which cell."""

    def __init__(self, run: Run, cells: Sequence[Cell]) -> None:
        self.run = run
        self._groups: dict[tuple[int, bool], Group] = {}
        self._lanes: dict[tuple[int, SiteKind | None, range, int, Site | None], Lane] = {}
        self._of = [self._place(cell) for cell in cells]

    @property
    def lanes(self) -> list[Lane]:
        """All of them, those of one group together, in the order of their tokens."""
        return sorted(self._lanes.values(), key=lambda lane: (lane.group.position, lane.group.first, lane.enters))

    def _place(self, cell: Cell) -> Lane | str:
        """The lane of a cell, or which of the two runs it does not differ from."""
        run, kind, layers = self.run, cell.kind, cell.layers
        free = run.problem.put == "clean" and not run.problem.sever
        state = {"embed": 0, "resid_pre": layers.start, "resid_post": layers.stop}.get(kind)
        if kind == "resid_mid" and free:
            state = layers.stop  # the MLP then gives its clean output
        if free and state is None and not cell.single:  # an inner activation decides its sublayer's output
            kind = SUBLAYER.get(kind, kind)
        enters = layers.start + 1 if state is None else state
        if cell.position < run.start or (enters == run.lm.n_layers and cell.position < run.scored):
            return "corrupted"
        stays_clean = free and state is not None and cell.position == run.start
        if stays_clean and cell.position == run.length - 1:
            return "clean"
        stays_clean = stays_clean and cell.position < run.scored
        group = self._groups.setdefault(
            (cell.position, stays_clean),
            Group(run, cell.position, cell.position + int(stays_clean), stays_clean),
        )
        what, where = (None, range(0)) if state is not None else (kind, layers)
        single = cell.site(cell.layer) if cell.single else None
        key = (cell.position, what, where, enters, single)
        return self._lanes.setdefault(key, Lane(group, what, where, enters, single))

    def scores(self) -> Restored:
        """The score of every cell."""
        run, problem = self.run, self.run.problem
        clean = problem.score(problem.answer_logits(run.clean.logits))
        corrupted = run.low()
        same = {"clean": clean.expand(run.samples).to(corrupted.dtype), "corrupted": corrupted}
        cells = [same[of] if isinstance(of, str) else of.score for of in self._of]
        return Restored(
            clean=clean[0],
            corrupted=corrupted,
            cells=torch.stack(cells) if cells else corrupted.new_empty(0, run.samples),
            engine="sweep",
        )


def budget(lm: LM, memory: int | None) -> int:
    """Bytes that lanes may take: as asked for, or half of what is free."""
    if memory is not None:
        if not memory > 0:
            raise InputError(f"memory is {memory}, expected a number of bytes above 0, e.g. 2 * 10**9.")
        return memory
    free = torch.cuda.mem_get_info(lm.device)[0] if lm.device.type == "cuda" else psutil.virtual_memory().available
    return int(free) // 2


def in_walks(lanes: Sequence[Lane], budget: int) -> list[list[Lane]]:
    """The lanes in as few walks as the budget of bytes allows."""
    walks: list[list[Lane]] = [[]]
    used = 0
    for lane in lanes:
        size = math.prod(lane.shape) * lane.group.run.hidden.element_size()
        if size > budget:
            raise InputError(
                f"One restored run takes {size:,} bytes of memory, but only {budget:,} are allowed. "
                "Give it more memory, or take fewer samples."
            )
        if used + size > budget:
            walks.append([])
            used = 0
        walks[-1].append(lane)
        used += size
    return walks
