"""A whole map of restorations in one pass over the layers: the same numbers as the plain loop, several times cheaper.

Restoring an output at token t and layer l changes nothing below layer l and nothing before token t. So:

1. One clean row and the corrupted rows go up the stack, one layer at a time; the corrupted ones without the tokens before the
   first change, whose keys and values are the clean row's.
2. A lane is one cell, or several cells that restore the same outputs, for all noise samples. It comes aboard above the first
   layer it changes: the corrupted states of tokens t and after, of which only t's is another. For those before t the corrupted
   run's keys and values serve. Where t is the first changed token its restored state stays clean for good, so that only the tokens
   after it are carried, behind clean keys and values.
3. Windows that start at the same layer share a lane up to where the shorter one ends; there it forks. Inside its window a lane's
   restored output is put in place and not computed.
4. A single head or neuron is restored between its corrupted neighbours, which a plain corrupted run tells.
5. All lanes of all tokens, and of several prompts, go through a block together. In the last block, and in the unembedding, only
   the tokens where the answer is predicted are computed.

Cells before the corruption starts restore what is not changed: they have the corrupted run's score.

Two engines do the work of a block. `InPieces` takes it apart and computes no more than is needed; `Whole` calls the model's
unmodified block on slices of tokens, with a stand-in cache, which every family can. The first one is checked against the model's
own activations in each sweep, and gives way to the second where they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from workbench.hooks import has_foreign_hooks, is_patched
from workbench.models import LM
from workbench.products import fast_products
from workbench.progress import track
from workbench.restoring import Cell, Restoration, Restored, restore_by_loop
from workbench.sweep.blocks import no_pieces
from workbench.sweep.engine import Engine
from workbench.sweep.in_pieces import InPieces
from workbench.sweep.lanes import Lane, Plan, Run, budget, give_places, in_walks, set_leaders
from workbench.sweep.whole import Whole

__all__ = ["restore", "restore_by_sweep", "sweepable"]


def sweepable(lm: LM, problem: Restoration, cells: Sequence[Cell]) -> str:
    """Why this model or these cells cannot be swept, or an empty string where they can.

    A block must take a cache and an explicit mask; flash attention takes no mask. Whoever changes activations, with `patched` or
    hooks of his own, may mean certain tokens, which slices of a prompt do not have.
    """
    if is_patched():
        return "the model is patched"
    if has_foreign_hooks(lm):
        return "there are other hooks on the model"
    if getattr(lm.part(0, lm.layout.attn), "is_causal", True) is False:
        return "attention is not causal"
    attention = str(lm.model.config._attn_implementation)
    if attention not in ("eager", "sdpa"):
        return f"attention {attention!r} takes no explicit mask"
    if problem.put == "zero" and any(cell.kind == "embed" for cell in cells):
        return "the embedding is zeroed below the blocks"
    if len({parameter.device for parameter in lm.model.parameters()}) > 1:
        return "the blocks lie on several devices"
    return ""


def restore(
    lm: LM, problems: Sequence[Restoration], cells: Sequence[Sequence[Cell]], *, memory: int | None = None
) -> list[Restored]:
    """`restore_by_sweep` where that can be, else `restore_by_loop`; `engine` says which, and why."""
    reasons = (sweepable(lm, problem, mine) for problem, mine in zip(problems, cells, strict=True))
    why_not = next(filter(None, reasons), "")
    if not why_not:
        return restore_by_sweep(lm, problems, cells, memory=memory)
    loops = (restore_by_loop(lm, problem, mine) for problem, mine in zip(problems, cells, strict=True))
    return [replace(one, engine=f"loop: {why_not}") for one in loops]


def restore_by_sweep(
    lm: LM,
    problems: Sequence[Restoration],
    cells: Sequence[Sequence[Cell]],
    *,
    memory: int | None = None,
    tolerance: float | None = None,
) -> list[Restored]:
    """The scores of every cell of every problem for every noise sample, as `restore_by_loop` gives them.

    For what is `sweepable`; `restore` looks. Where the model does something that a sweep does not foresee, the plain loop is taken;
    `engine` says so.

    Several problems, of any lengths, go up together; what comes out for one does not depend on the others.

    Args:
        lm: the model.
        problems: the experiments.
        cells: for each of them, what to restore.
        memory: bytes that the lanes' states may take; where they need more, the cells are computed in several walks. None: half of
            what is free.
        tolerance: not exact: a lane whose states differ from the corrupted run's by less than this part of their norm, in every
            token and sample, is not carried further; its cells get the corrupted run's score. None: every lane goes to the top.

    Raises:
        InputError: not even one lane fits into the memory.
    """
    with torch.inference_mode(), fast_products(lm.device, lm.dtype):
        why_not = no_pieces(lm) or _not_in_pieces(problems, cells)
        if not why_not:
            found, error, top = _restore(lm, problems, cells, memory, tolerance, InPieces)
            if error <= _TOLERANCE[lm.dtype] and top <= _TOP_TOLERANCE[lm.dtype]:
                return found
            why_not = f"in pieces they differ by {error:.1e} of their output from the model's own"
        found, _, top = _restore(lm, problems, cells, memory, tolerance, Whole)
        if not top <= _TOP_TOLERANCE[lm.dtype]:
            why_not = f"the last states say the answer with a log-probability {top:.1e} from the model's own"
            loops = [restore_by_loop(lm, problem, mine) for problem, mine in zip(problems, cells, strict=True)]
            return [replace(one, engine=f"loop: {why_not}") for one in loops]
    return [replace(one, engine=f"sweep, whole blocks: {why_not}") for one in found]


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
"""How far a block in pieces may be from the model's own, in parts of what the block adds; a wrong wiring is off by about 1."""


_TOP_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}
"""How far the answer's log-probability, from the last states by norm and unembedding, may be from the model's own."""


def _not_in_pieces(problems: Sequence[Restoration], cells: Sequence[Sequence[Cell]]) -> str:
    for problem, mine in zip(problems, cells, strict=True):
        inner = {cell.kind for cell in mine} & {"z", "mlp_post", "resid_mid"}
        if inner and (problem.sever or problem.put == "zero"):
            return f"{', '.join(sorted(inner))} with other outputs held or zeroed"
    return ""


def _restore(
    lm: LM,
    problems: Sequence[Restoration],
    cells: Sequence[Sequence[Cell]],
    memory: int | None,
    tolerance: float | None,
    engine: type[Engine],
) -> tuple[list[Restored], float, float]:
    """What `restore_by_sweep` gives, and by how much the engine's clean run differs from the model's, in blocks and above them."""
    runs = [Run(lm, problem, mine) for problem, mine in zip(problems, cells, strict=True)]
    plans = [Plan(run, mine) for run, mine in zip(runs, cells, strict=True)]
    walks = in_walks([lane for plan in plans for lane in plan.lanes], budget(lm, memory))
    at_work = engine(lm, runs)
    layers = track(range(lm.n_layers * len(walks)), "layers", lm.n_layers * len(walks))
    for lanes in walks:
        for run in runs:
            run.begin()
        _walk(lm, at_work, runs, lanes, layers, tolerance)
    next(layers, None)  # so that the progress says all
    found = [plan.scores() for plan in plans]
    return found, at_work.error(), max(float(run.top_error()) for run in runs)


def _walk(
    lm: LM,
    engine: Engine,
    runs: Sequence[Run],
    lanes: Sequence[Lane],
    layers: Iterator[int],
    tolerance: float | None,
) -> None:
    """Takes the clean and corrupted runs and some lanes up all layers."""
    forks = set_leaders(lanes)
    give_places(lanes)
    for lane in lanes:
        if lane.enters == 0:
            lane.board()
    for layer in range(lm.n_layers):
        next(layers)
        engine.enter(layer)
        aboard = [lane for lane in lanes if lane.aboard]
        engine.through(layer, aboard)
        for lane in aboard:
            lane.fresh = False
        joining = [lane for lane in lanes if lane.enters == layer + 1 and lane.leader is None]
        restored = engine.restored(layer, [lane for lane in joining if lane.kind is not None])
        for run in runs:
            run.rise()
        for lane in joining:
            lane.board(restored.get(lane))
        for lane in forks.get(layer + 1, ()):
            lane.fork()
        if tolerance is not None and layer + 1 < lm.n_layers:
            for lane in lanes:
                if lane.aboard and lane.decayed(layer + 1, tolerance):
                    lane.drop()
    for run in runs:
        mine = [lane for lane in lanes if lane.aboard and lane.group.run is run]
        if mine:
            scores = run.problem.score.of_states(lm, torch.cat([lane.state for lane in mine]))
            for lane, score in zip(mine, scores.split(run.samples), strict=True):
                lane.leave(score)
        dropped = [lane for lane in lanes if lane.dropped and lane.group.run is run]
        if dropped:
            low = run.low()
            for lane in dropped:
                lane.score = low
