"""The gradients are those of small steps towards the clean run, they add up along a path and over a window, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.examples import EIFFEL, SAID, TURNED, ZURICH, fresh_lm
from workbench.facts import FactError
from workbench.gradients import At, estimate
from workbench.hooks import run
from workbench.locators.attribution_patching import AttributionPatching
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.restoring import Cell, Restoration
from workbench.sites import Site, SiteKind

ENDS: tuple[At, ...] = ("corrupted", "middle", "clean", "both")
KINDS: tuple[SiteKind, ...] = ("embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_post")


def precise(family: str) -> LM:
    """A tiny model of one's own in float64 (some families compute their norms and softmax in float32 all the same)."""
    lm = fresh_lm(family)
    lm.model.double()
    return lm


def posed(lm: LM, trace: CausalTrace) -> tuple[Restoration, list[Cell]]:
    """The experiment and the cells of a trace of one fact."""
    experiment = trace._experiment(lm, SAID)
    return experiment.problem, experiment.cells


def step(lm: LM, problem: Restoration, cell: Cell, size: float) -> Tensor:
    """The scores after a part of the way from the corrupted activations of a cell to what is put there, in all of its layers."""
    sites = [Site(layer=layer, kind=cell.kind) for layer in cell.layers]
    clean, corrupted = run(lm, problem.clean, read=sites), problem.corrupted_run(lm, read=[cell.kind])

    def towards(site: Site) -> Any:
        change = torch.zeros_like(corrupted[site])
        put = clean[site][0, cell.position] * (problem.put == "clean")
        change[:, cell.position] = size * (put - corrupted[site][:, cell.position])
        return corrupted[site] + change if cell.kind == "embed" else lambda x: x + change

    write = {**problem.corruption(), **{site: towards(site) for site in sites}}
    return problem.score(problem.answer_logits(run(lm, problem.corrupted, write=write).logits))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt", "gemma2", "bloom", "falcon", "falcon_sequential", "llama"])
def test_an_estimate_is_the_slope_of_a_small_step_towards_the_clean_run(family: str) -> None:
    """Steps are small where all is float64 (and a ReLU has corners), and larger where rounding to float32 would drown them."""
    lm = precise(family)
    trace = CausalTrace(kinds=KINDS, samples=2, window=2, noise=0.3)
    problem, cells = posed(lm, trace)
    estimated = estimate(lm, problem, cells)
    assert estimated.dtype == torch.float64
    assert estimated.shape == (len(cells), 2)
    size, start = 1e-6 if family in ("gpt2", "opt", "falcon") else 3e-3, problem.first_changed()
    for kind in KINDS:
        own = [i for i, cell in enumerate(cells) if cell.kind == kind and cell.position >= start]
        for i in own[:: max(1, len(own) // 3)]:
            slope = (step(lm, problem, cells[i], size) - step(lm, problem, cells[i], -size)) / (2 * size)
            torch.testing.assert_close(estimated[i], slope, rtol=2e-3, atol=2e-5)
    strongest = max(range(len(cells)), key=lambda i: float(estimated[i].abs().min()))
    slope = (step(lm, problem, cells[strongest], size) - step(lm, problem, cells[strongest], -size)) / (2 * size)
    assert slope.abs().min() > 3e-3
    torch.testing.assert_close(estimated[strongest], slope, rtol=2e-3, atol=2e-5)


def test_a_cell_that_is_set_to_zero_is_estimated_by_its_way_to_zero() -> None:
    lm = precise("gpt2")
    problem, cells = posed(lm, CausalTrace(samples=1, window=2))
    zeroing = replace(problem, corrupted=problem.clean, noise=None, put="zero")
    estimated = estimate(lm, zeroing, cells)
    for i in range(0, len(cells), 7):
        slope = (step(lm, zeroing, cells[i], 1e-6) - step(lm, zeroing, cells[i], -1e-6)) / 2e-6
        torch.testing.assert_close(estimated[i], slope, rtol=1e-4, atol=1e-8)
    assert (estimated != 0).float().mean() > 0.7


@pytest.mark.parametrize("at", ENDS)
@pytest.mark.parametrize("corrupt", ["noise", "swap"])
def test_the_embeddings_estimates_sum_to_the_total_effect_on_a_path_of_many_steps(at: At, corrupt: Any) -> None:
    """Completeness of integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365, proposition 1)."""
    lm = precise("gpt2")
    trace = CausalTrace(kinds=("embed",), samples=3, corrupt=corrupt, substitutes=(TURNED,))
    problem, cells = posed(lm, trace.resolved(lm, [SAID]))
    clean = problem.score(problem.answer_logits(run(lm, problem.clean).logits))
    total = clean - problem.score(problem.answer_logits(problem.corrupted_run(lm).logits))
    assert total.abs().min() > 0.01

    def gap(steps: int) -> float:
        return float((estimate(lm, problem, cells, steps=steps, at=at).sum(0) - total).abs().max())

    few, many = gap(64), gap(128)
    order = 1 if at in ("corrupted", "clean") else 2
    assert few < {1: 1e-2, 2: 1e-3}[order]
    assert many == pytest.approx(few / 2**order, rel=0.05)


def test_one_step_at_both_ends_is_the_mean_of_either(gpt2: LM) -> None:
    problem, cells = posed(gpt2, CausalTrace(samples=2, window=3))
    found = {at: estimate(gpt2, problem, cells, at=at) for at in ENDS}
    torch.testing.assert_close(found["both"], (found["corrupted"] + found["clean"]) / 2, rtol=1e-4, atol=1e-7)
    assert (found["corrupted"] - found["clean"]).abs().max() > 1e-2
    steps = {at: estimate(gpt2, problem, cells, at=at, steps=2) for at in ENDS}
    torch.testing.assert_close(steps["corrupted"], (found["corrupted"] + found["middle"]) / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(steps["clean"], (found["middle"] + found["clean"]) / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(steps["both"], (steps["corrupted"] + steps["clean"]) / 2, rtol=1e-4, atol=1e-7)


def test_a_window_sums_its_layers_and_a_sample_knows_nothing_of_the_others(lm: LM) -> None:
    trace = AttributionPatching(samples=2, window=3)
    wide, narrow = trace(lm, [SAID]), replace(trace, window=1)(lm, [SAID])
    for kind in ("mlp_out", "attn_out"):
        single = narrow.grid(kind=kind).to_numpy()
        padded = np.pad(single, ((0, 0), (1, 1)))
        expected = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
        np.testing.assert_allclose(wide.grid(kind=kind), expected, rtol=0, atol=1e-6)
    states = wide.of(kind="resid_post").reset_index(drop=True)
    pd.testing.assert_frame_equal(states, narrow.of(kind="resid_post").reset_index(drop=True), rtol=1e-4, atol=1e-7)
    assert wide.table["value"].abs().max() > 1e-2
    alone = replace(trace, samples=1)(lm, [SAID])
    samples = wide.extras["samples"]
    first = samples[samples["sample"] == 0]
    np.testing.assert_allclose(first["score"], alone.table["score"], rtol=0, atol=1e-6)


def test_the_rows_are_those_of_the_causal_trace(lm: LM) -> None:
    """The same cells of the same experiment; where restoring changes nothing, the estimate is 0 too."""
    settings: dict[str, Any] = {"samples": 2, "window": 3, "kinds": ("resid_post", "mlp_out", "z")}
    exact, found = CausalTrace(**settings)(lm, [SAID]), AttributionPatching(**settings)(lm, [SAID])
    factors = [column for column in exact.table.columns if column not in ("value", "se", "score")]
    pd.testing.assert_frame_equal(found.table[factors], exact.table[factors])
    facts, expected = found.extras["facts"], exact.extras["facts"]
    shared = [column for column in facts.columns if column in expected.columns]
    assert {"fact", "answer", "clean", "corrupted", "total_effect", "sigma", "correct"} <= set(shared)
    pd.testing.assert_frame_equal(facts[shared], expected[shared], rtol=1e-4, atol=1e-6)
    assert (found.table.loc[found.table["token"] == "before_subject", "value"] == 0).all()
    top = found.grid(kind="resid_post").iloc[:-1, -1]
    np.testing.assert_allclose(top, 0, atol=1e-9)
    np.testing.assert_allclose(found.table["value"], found.table["score"] - facts["corrupted"][0], atol=1e-12)
    assert found.run["unit"] == "estimated indirect effect in p"
    assert found.run["engine"] == "gradient: 1 step, corrupted"


def test_a_small_corruption_is_estimated_to_its_second_order() -> None:
    """The error of the estimate falls with the square of the noise while the effects fall in proportion."""
    lm = precise("gpt2")

    def gap(noise: float) -> tuple[float, float]:
        settings: dict[str, Any] = {"samples": 2, "noise": noise, "window": 1}
        exact, found = CausalTrace(**settings)(lm, [SAID]).table, AttributionPatching(**settings)(lm, [SAID]).table
        return float((exact["value"] - found["value"]).abs().max()), float(exact["value"].abs().max())

    (error, effect), (smaller_error, smaller_effect) = gap(1e-3), gap(1e-4)
    assert smaller_effect == pytest.approx(effect / 10, rel=0.1)
    assert error < 0.1 * effect
    assert smaller_error < error / 50


@pytest.mark.parametrize("score", ["p", "p_target", "logp", "logit_diff", "kl"])
@pytest.mark.parametrize("at", ENDS)
def test_every_score_but_rank_has_estimates_whose_sign_is_the_effects(gpt2: LM, score: Any, at: At) -> None:
    exact = CausalTrace(score=score, samples=3, window=1)(gpt2, [EIFFEL])
    found = AttributionPatching(score=score, samples=3, window=1, at=at, steps=3)(gpt2, [EIFFEL])
    assert found.extras["facts"]["total_effect"][0] == pytest.approx(exact.extras["facts"]["total_effect"][0], rel=1e-4)
    assert np.corrcoef(found.table["value"], exact.table["value"])[0, 1] > 0.6


def test_a_kl_is_flat_at_its_clean_end(gpt2: LM) -> None:
    flat = AttributionPatching(score="kl", samples=2, at="clean")(gpt2, [ZURICH]).table["value"]
    assert flat.abs().max() < 1e-5
    assert AttributionPatching(score="kl", samples=2)(gpt2, [ZURICH]).table["value"].abs().max() > 1e-3


def test_weights_that_want_no_gradient_serve_and_get_none() -> None:
    lm = fresh_lm("gpt2")
    expected = AttributionPatching(samples=2)(lm, [SAID]).table
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    lm.model.requires_grad_(False)
    pd.testing.assert_frame_equal(AttributionPatching(samples=2)(lm, [SAID]).table, expected)
    with torch.no_grad():
        pd.testing.assert_frame_equal(AttributionPatching(samples=2)(lm, [SAID]).table, expected)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"score": "rank"}, "score is 'rank', expected one of p, p_target, logp, logit_diff, kl"),
        ({"steps": 0}, "expected 1 to 1000"),
        ({"steps": 10**6}, "expected 1 to 1000"),
        ({"steps": 1.5}, "whole number"),
        ({"at": "start"}, "at is 'start', expected one of corrupted, "),
        ({"samples": 0}, "expected 1 to"),
    ],
)
def test_parameters_that_estimate_nothing_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(FactError, match=says):
        AttributionPatching(**settings)


def test_what_has_no_derivative_or_is_cut_at_one_token_is_refused(gpt2: LM) -> None:
    problem, cells = posed(gpt2, CausalTrace(score="rank", samples=2))
    with pytest.raises(ValueError, match="no derivative"):
        estimate(gpt2, problem, cells)
    problem, cells = posed(gpt2, CausalTrace(sever="mlp_out", kinds=("resid_post",), samples=2))
    with pytest.raises(ValueError, match="cannot be severed at the restored one alone"):
        estimate(gpt2, problem, cells)
    problem, cells = posed(gpt2, CausalTrace(samples=2))
    with pytest.raises(ValueError, match="steps is 0"):
        estimate(gpt2, problem, cells, steps=0)
