"""The sweep gives the plain loop's numbers, for every family, kind, window and score, and says so when it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples import EIFFEL, FACTS, JOBS, SAID, SAO_PAULO, TURNED, fresh_lm, tiny_lm
from workbench import sweep
from workbench.errors import InputError
from workbench.facts import Fact
from workbench.hooks import patched
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM, Tokens
from workbench.restoring import Cell, Restoration, Restored, restore_by_loop
from workbench.sites import Site, SiteError, SiteKind
from workbench.sweep import engine, restore_by_sweep
from workbench.sweep.blocks import WIRINGS

FEW: dict[str, Any] = {"samples": 2, "noise": "s3", "window": 3}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "three maps": FEW,
    "window of one": {**FEW, "window": 1},
    "even window of the paper": {**FEW, "window": 2, "window_rule": "paper"},
    "window wider than the model": {**FEW, "window": 10},
    "MLP severed": {**FEW, "kinds": ("resid_post",), "sever": "mlp_out"},
    "attention severed": {**FEW, "kinds": ("resid_post", "mlp_out"), "sever": "attn_out"},
    "inner sites": {**FEW, "kinds": ("resid_pre", "z", "mlp_post")},
    "whole answer": {**FEW, "score": "logp"},
    "distance of the answers": {**FEW, "score": "kl"},
    "last subject token only": {**FEW, "token": "subject_last"},
    "noise instead of the embedding": {**FEW, "replace": True},
    "another subject": {**FEW, "corrupt": "swap", "substitutes": ("Tower Eiffel",)},
}


def experiment(lm: LM, fact: Fact, **protocol: Any) -> tuple[Restoration, list[Cell]]:
    """What a trace runs for a fact."""
    trace = CausalTrace(**{**FEW, **protocol}).resolved(lm, [fact])
    made = trace._experiment(lm, fact)
    return made.problem, made.cells


def agree(lm: LM, problem: Restoration, cells: Sequence[Cell], *, tolerance: float = 1e-6) -> Restored:
    """Asserts that sweep and loop give the same, and gives what the sweep does."""
    fast, slow = restore_by_sweep(lm, [problem], [cells])[0], restore_by_loop(lm, problem, cells)
    effect = float((slow.cells - slow.corrupted).abs().max())
    for name in ("clean", "corrupted", "cells"):
        error = float((getattr(fast, name) - getattr(slow, name)).abs().max())
        assert error < min(tolerance, 1e-3 * effect), name  # the map is not flat, so the comparison says something
    return fast


def single_cells(lm: LM, tokens: Tokens) -> list[Cell]:
    """Two heads and two neurons at every token and layer."""
    places = [(layer, position) for layer in range(lm.n_layers) for position in range(tokens.lengths[0])]
    return [
        *(_single("z", *place, head=head) for place in places for head in (0, lm.n_heads - 1)),
        *(_single("mlp_post", *place, neuron=neuron) for place in places for neuron in (1, lm.d_mlp - 1)),
    ]


def _single(kind: SiteKind, layer: int, position: int, **part: int) -> Cell:
    return Cell(kind=kind, layer=layer, layers=range(layer, layer + 1), position=position, **part)


def gap(lm: LM, fact: Fact, **protocol: Any) -> tuple[float, float]:
    """The largest difference between sweep and loop, and the largest effect."""
    trace = CausalTrace(**protocol)
    fast, slow = (replace(trace, engine=engine)(lm, [fact]) for engine in ("sweep", "loop"))
    assert fast.run["engine"].startswith("sweep")
    assert slow.run["engine"].startswith("loop")
    columns = ["fact", "site", "layer", "kind", "token", "position", "text"]
    assert fast.table[columns].equals(slow.table[columns])
    assert np.allclose(fast.extras["samples"]["score"], slow.extras["samples"]["score"], atol=1e-5, rtol=0)
    return float((fast.table["score"] - slow.table["score"]).abs().max()), float(slow.table["value"].abs().max())


IN_PIECES = sorted(set(WIRINGS) | {"gpt_neox_sequential", "gemma3"} - {"gemma3_text"})
"""Tiny models whose blocks are taken to pieces."""


def test_every_family_is_swept_exactly(lm: LM, family: str) -> None:
    error, effect = gap(lm, EIFFEL, **FEW)
    assert error < 1e-6
    assert error < 1e-3 * effect  # the map is not flat, so the comparison says something
    engine = CausalTrace(**FEW)(lm, [EIFFEL]).run["engine"]
    assert engine == "sweep" if family in IN_PIECES else engine.startswith("sweep, whole blocks: no wiring")


def test_whole_blocks_give_the_same_in_every_family(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "no_pieces", lambda lm: "not now")
    found = agree(lm, *experiment(lm, EIFFEL))
    assert found.engine == "sweep, whole blocks: not now"


def test_pieces_that_do_not_make_the_block_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that somebody changed is still traced as it is."""
    lm = fresh_lm("llama")
    block: Any = lm.blocks[2]
    whole = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: 0.9 * whole(*args, **kwargs))
    found = agree(lm, *experiment(lm, EIFFEL))
    assert "differ by" in found.engine
    monkeypatch.undo()
    assert agree(lm, *experiment(lm, EIFFEL)).engine == "sweep"


@pytest.mark.parametrize(("family", "path"), [("gpt2", "attn.c_attn"), ("phi3", "self_attn.qkv_proj")])
def test_a_fused_projection_that_somebody_changed_is_called_and_not_read(
    family: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = fresh_lm(family)
    fused: Any = lm.part(1, path)
    whole = fused.forward
    monkeypatch.setattr(fused, "forward", lambda x: 1.5 * whole(x))
    assert agree(lm, *experiment(lm, EIFFEL)).engine == "sweep"


def test_an_unembedding_that_somebody_changed_is_called_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh_lm("gpt2")
    head: Any = lm.unembed
    whole = head.forward
    monkeypatch.setattr(head, "forward", lambda x: 3 * whole(x))
    assert agree(lm, *experiment(lm, EIFFEL)).engine == "sweep"


def test_logits_made_otherwise_than_by_norm_and_unembedding_are_left_to_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = fresh_lm("gpt2")
    model: Any = lm.model
    whole = model.forward

    def scaled(**inputs: Any) -> Any:
        out = whole(**inputs)
        out.logits = 3 * out.logits
        return out

    monkeypatch.setattr(model, "forward", scaled)
    found = restore_by_sweep(lm, [(made := experiment(lm, EIFFEL))[0]], [made[1]])[0]
    assert found.engine.startswith("loop: the last states")
    assert torch.allclose(found.cells, restore_by_loop(lm, *made).cells)


def test_patches_and_hooks_that_may_mean_a_token_are_left_to_the_loop() -> None:
    lm = fresh_lm("gpt2")
    made = experiment(lm, EIFFEL)
    assert sweep.sweepable(lm, *made) == ""
    with patched(lm, {Site(layer=1, kind="resid_pre"): lambda x: 1.3 * x}):
        assert sweep.sweepable(lm, *made) == "the model is patched"
        assert CausalTrace(**FEW)(lm, [EIFFEL]).run["engine"] == "loop: the model is patched"
    handle = lm.blocks[1].register_forward_hook(lambda module, args, out: out)
    assert "other hooks" in sweep.sweepable(lm, *made)
    handle.remove()
    assert sweep.sweepable(lm, *made) == ""


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_model_once_asked_for_its_hidden_states_is_still_swept(family: str) -> None:
    """transformers hooks its blocks to collect them, and leaves those hooks there."""
    lm = fresh_lm(family)
    before = CausalTrace(**FEW)(lm, [EIFFEL])
    hooks = sum(len(module._forward_hooks) for module in lm.model.modules())
    with torch.no_grad():
        lm.model(input_ids=lm.encode([EIFFEL]).ids, output_hidden_states=True)
    assert sum(len(module._forward_hooks) for module in lm.model.modules()) > hooks
    after = CausalTrace(**FEW)(lm, [EIFFEL])
    assert after.run["engine"].startswith("sweep")
    assert after.table.equals(before.table)


def test_no_cells_give_the_two_baselines(gpt2: LM) -> None:
    problem, _ = experiment(gpt2, EIFFEL)
    for found in (restore_by_sweep(gpt2, [problem], [[]])[0], restore_by_loop(gpt2, problem, [])):
        assert found.cells.shape == (0, 2)
        assert found.corrupted.shape == (2,)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "falcon"])
def test_patching_between_two_prompts_goes_both_ways(family: str) -> None:
    """Denoising puts the clean run's activations into the other prompt's, noising the other way round."""
    lm = tiny_lm(family)
    problem, cells = experiment(lm, EIFFEL, corrupt="swap", substitutes=(TURNED,))
    agree(lm, problem, cells)
    agree(lm, replace(problem, clean=problem.corrupted, corrupted=problem.clean), cells)


def test_single_heads_and_neurons_are_swept_exactly_in_every_family(lm: LM) -> None:
    problem, _ = experiment(lm, SAID, corrupt="swap", substitutes=(TURNED,))
    agree(lm, problem, single_cells(lm, problem.clean), tolerance=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "bloom"])
@pytest.mark.parametrize(
    "protocol", ["three maps", "MLP severed", "attention severed", "noise instead of the embedding"]
)
def test_single_heads_and_neurons_among_noise_and_severed_paths(family: str, protocol: str) -> None:
    lm = tiny_lm(family)
    problem, cells = experiment(lm, JOBS, **PROTOCOLS[protocol])
    agree(lm, problem, [*cells, *single_cells(lm, problem.clean)])


@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_zeroed_heads_and_neurons_are_swept_exactly(family: str) -> None:
    lm = tiny_lm(family)
    problem, _ = experiment(lm, JOBS)
    zeroing = replace(problem, corrupted=problem.clean, noise=None, put="zero")
    agree(lm, zeroing, single_cells(lm, problem.clean))


def test_an_mlp_that_adds_more_than_its_neurons_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons are restored at the down projection's input; where that is not all of the MLP's output, blocks are called whole."""
    lm = fresh_lm("llama")
    mlp: Any = lm.part(1, "mlp")
    whole = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: 1.5 * whole(x))
    problem, cells = experiment(lm, JOBS)
    assert agree(lm, problem, cells).engine == "sweep"
    assert "differ by" in agree(lm, problem, single_cells(lm, problem.clean)).engine


def test_a_head_in_several_layers_is_refused() -> None:
    with pytest.raises(SiteError, match=r"L2\.z\[1\] was asked for in 3 layers"):
        Cell(kind="z", layer=2, layers=range(1, 4), position=0, head=1)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "falcon"])
@pytest.mark.parametrize("kinds", [("resid_pre", "resid_post", "mlp_out", "attn_out"), ("z", "mlp_post")])
def test_zeroing_is_swept_exactly(family: str, kinds: Any) -> None:
    lm = tiny_lm(family)
    problem, cells = experiment(lm, EIFFEL, kinds=kinds)
    zeroing = replace(problem, corrupted=problem.clean, noise=None, put="zero")
    found = agree(lm, zeroing, cells)
    assert found.cells.shape == (len(cells), 1)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom"])
def test_restored_embeddings_are_swept_exactly(family: str) -> None:
    lm = tiny_lm(family)
    agree(lm, *experiment(lm, EIFFEL, kinds=("embed", "resid_pre")))


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_float64_agrees_to_the_last_digits(family: str) -> None:
    lm = fresh_lm(family)
    lm = LM(lm.model.double(), lm.tokenizer)
    agree(lm, *experiment(lm, EIFFEL), tolerance=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_facts_of_several_lengths_share_a_sweep_and_do_not_matter_to_each_other(family: str) -> None:
    lm = tiny_lm(family)
    made = [experiment(lm, fact) for fact in FACTS]
    assert len({problem.clean.ids.shape[1] for problem, _ in made}) > 2
    together = restore_by_sweep(lm, [problem for problem, _ in made], [cells for _, cells in made])
    for (problem, cells), found in zip(made, together, strict=True):
        alone = restore_by_sweep(lm, [problem], [cells])[0]
        assert torch.allclose(found.cells, alone.cells, atol=1e-7, rtol=0)
        assert torch.allclose(found.cells, restore_by_loop(lm, problem, cells).cells, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_small_memory_takes_several_walks_for_the_same_map(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(family)
    problem, cells = experiment(lm, EIFFEL)
    walks: list[int] = []
    walk = sweep._walk

    def counted(lm: LM, at_work: Any, runs: Any, lanes: Any, *others: Any) -> None:
        walks.append(len(lanes))
        walk(lm, at_work, runs, lanes, *others)

    monkeypatch.setattr(sweep, "_walk", counted)
    whole = restore_by_sweep(lm, [problem], [cells])[0]
    least = 2 * problem.clean.ids.shape[1] * lm.d_model * 4
    small = restore_by_sweep(lm, [problem], [cells], memory=2 * least)[0]
    assert walks[0] == sum(walks[1:])
    assert len(walks) > 10
    assert torch.allclose(small.cells, whole.cells, atol=1e-7, rtol=0)
    with pytest.raises(InputError, match="only 100 are allowed"):
        restore_by_sweep(lm, [problem], [cells], memory=100)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_protocol_is_swept_exactly(family: str, protocol: str) -> None:
    lm = tiny_lm(family)
    options = PROTOCOLS[protocol]
    error, _ = gap(lm, EIFFEL, **options)
    assert error < (1e-4 if options.get("score") in ("logp", "kl") else 1e-6)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_the_subject_may_stand_anywhere(fact: Fact) -> None:
    for family in ("gpt2", "llama"):
        error, _ = gap(tiny_lm(family), fact, **FEW)
        assert error < 1e-6


def test_chunks_change_nothing(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CausalTrace(**FEW)(gpt2, [JOBS]).table["score"]
    monkeypatch.setattr(engine, "POSITIONS_AT_ONCE", 1)
    assert np.allclose(CausalTrace(**FEW)(gpt2, [JOBS]).table["score"], whole, atol=1e-7)


def test_a_fact_has_the_same_map_alone_and_among_others(gpt2: LM) -> None:
    trace = CausalTrace(samples=2, noise=0.5, window=3)
    together = trace(gpt2, FACTS)
    for fact in FACTS:
        alone = trace(gpt2, [fact]).table["score"].to_numpy()
        assert np.array_equal(alone, together.of(fact=fact.id)["score"].to_numpy())


def test_a_subject_at_the_end_leaves_only_its_own_cells(gpt2: LM) -> None:
    found = CausalTrace(**FEW)(gpt2, [SAO_PAULO])
    start = gpt2.encode([SAO_PAULO]).spans[0]
    assert start is not None
    before = found.table[found.table["position"] < start[0]]
    assert (before["value"] == 0).all()


def test_flash_attention_is_refused_in_words() -> None:
    lm = fresh_lm("llama")
    problem, cells = experiment(lm, EIFFEL)
    assert sweep.sweepable(lm, problem, cells) == ""
    lm.model.config._attn_implementation = "flash_attention_2"
    assert "no explicit mask" in sweep.sweepable(lm, problem, cells)
