"""A mask closes what the answer can do without, and keeps what it needs."""

from __future__ import annotations

import math

import pytest
import torch

from tests.examples import EIFFEL, SAID, tiny_lm
from workbench.facts import FactError
from workbench.hooks import run
from workbench.loading import load
from workbench.locators.hard_concrete import RANGES, HardConcrete
from workbench.models import LM
from workbench.sites import Site
from workbench.zoo import load_facts


@pytest.fixture(scope="module")
def organism() -> LM:
    return load("organism-tiny", device="cpu")


def test_without_a_penalty_and_a_step_too_small_to_matter_all_gates_stay_where_they_began(gpt2: LM) -> None:
    scores = HardConcrete(steps=1, rate=1e-12, start=0.9, penalty=0).neuron_scores(gpt2, EIFFEL)
    assert scores.shape == (gpt2.n_layers, gpt2.d_mlp)
    torch.testing.assert_close(scores, torch.full_like(scores, 1.0 / 1.2))  # (0.9 + 0.1) / (1.1 + 0.1)


def test_the_penalty_alone_closes_every_gate_by_the_rate_each_step(gpt2: LM) -> None:
    """Adam moves a parameter whose gradient keeps its size by `rate` a step; the answer's share is drowned."""
    scores = HardConcrete(steps=10, rate=0.01, penalty=1e9).neuron_scores(gpt2, EIFFEL)
    expected = 1 / (1 + math.exp(10 * 0.01))
    torch.testing.assert_close(scores, torch.full_like(scores, expected), rtol=0, atol=1e-3)


def test_a_neuron_the_answer_does_not_see_closes_before_those_it_needs(organism: LM) -> None:
    """Closing the mask's best tenth costs the answer more than closing its worst half does."""
    fact = load_facts("organism-tiny")[0]
    scores = HardConcrete().neuron_scores(organism, fact)
    order = scores.flatten().argsort(descending=True)
    tokens = organism.encode([fact])
    answer = organism.target_ids(fact.text, fact.target_true)[0]

    def probability_without(closed: torch.Tensor) -> float:
        gates = torch.ones(scores.numel())
        gates[closed] = 0
        write = {
            Site(layer=layer, kind="mlp_post"): gate.mul for layer, gate in enumerate(gates.view_as(scores).unbind())
        }
        return float(run(organism, tokens, write=write).last_logits[0].softmax(-1)[answer])

    tenth, half = len(order) // 10, len(order) // 2
    clean = probability_without(order[:0])
    assert probability_without(order[:tenth]) < 0.1 * clean
    assert probability_without(order[-half:]) > 0.5 * clean


def test_rows_are_the_layers_means_and_the_best_neurons(gpt2: LM) -> None:
    locator = HardConcrete(steps=5, neurons=7)
    scores = locator.neuron_scores(gpt2, SAID).double()
    footprint = locator(gpt2, [SAID])
    whole, best = footprint.whole(fact=SAID.id, kind="mlp_post"), footprint.neurons(fact=SAID.id)
    assert whole["value"].to_list() == pytest.approx(scores.mean(1).tolist(), abs=1e-6)
    assert best["value"].to_list() == pytest.approx(scores.flatten().topk(7).values.tolist(), abs=1e-6)
    at = scores.numpy()[best["layer"].to_numpy(), best["neuron"].to_numpy(dtype=int)]
    assert best["value"].to_list() == pytest.approx(at.tolist(), abs=1e-6)
    assert set(footprint.table["token"]) == {"all"}


def test_another_seed_draws_other_gates() -> None:
    lm = tiny_lm("llama")
    one, other = (HardConcrete(steps=5, seed=seed).neuron_scores(lm, SAID) for seed in (0, 1))
    assert not one.equal(other)
    assert one.equal(HardConcrete(steps=5).neuron_scores(lm, SAID))


def test_it_works_where_gradients_are_off_and_says_where_it_cannot(gpt2: LM) -> None:
    locator = HardConcrete(steps=2)
    with torch.no_grad():
        off = locator.neuron_scores(gpt2, SAID)
    assert off.equal(locator.neuron_scores(gpt2, SAID))
    with torch.inference_mode(), pytest.raises(FactError, match="no mask can be learned"):
        locator.neuron_scores(gpt2, SAID)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"steps": 10**9}, {"neurons": -1}, {"start": 1.0}, {"temperature": 0.0}, {"temperature": 1e-320},
        {"temperature": math.inf}, {"rate": -1.0}, {"rate": math.inf}, {"rate": 1e308}, {"penalty": math.inf},
        {"penalty": 1e308}, {"penalty": math.nan}, {"seed": -1}, {"seed": 2**64},
    ],
)  # fmt: skip
def test_numbers_that_make_no_mask_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FactError, match="expected"):
        HardConcrete(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_of_the_ranges_give_numbers(gpt2: LM, name: str, end: int) -> None:
    scores = HardConcrete(steps=20, **{name: RANGES[name][end]}).neuron_scores(gpt2, EIFFEL)  # type: ignore[arg-type]
    assert scores.isfinite().all()
