"""Integrated gradients are complete and those of a plain loop; the sets of neurons are those that their definitions say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch

from tests.examples import EIFFEL, SAID, TRACED, ZURICH, fresh_lm, tiny_lm
from workbench.errors import InputError
from workbench.facts import FactError
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.locators.knowledge_neurons import KnowledgeNeurons, Rule, _alphas, integrated_gradients
from workbench.models import LM
from workbench.results import join
from workbench.sites import Site

PARAPHRASED = replace(
    SAID,
    target_true="Paris",
    paraphrases=("The tower is in the city of", "The Eiffel Tower stands in", "Big Ben is in", "The capital of"),
)


NORMALISED = ("gemma2", "gemma3", "olmo2")
"""Families with a norm behind the MLP."""


def said(lm: LM) -> int:
    """The token that a model says after the example."""
    return int(run(lm, lm.encode([SAID])).last_logits[0].argmax())


def p_of(lm: LM, target: int, layer: int, w: torch.Tensor) -> float:
    """Its probability where a layer's neurons have the activations `w` at the last token."""
    write = {Site(layer=layer, kind="mlp_post", token="last"): w}
    return float(run(lm, lm.encode([SAID]), write=write).last_logits[0].double().softmax(-1)[target])


@pytest.mark.parametrize("family", [family for family in TRACED if family not in NORMALISED], indirect=True)
def test_attributions_of_a_layer_sum_to_what_zeroing_it_takes(lm: LM) -> None:
    """Completeness (Sundararajan et al. 2017, arXiv 1703.01365, proposition 1), with enough steps."""
    found = KnowledgeNeurons(steps=150, rule="middle")(lm, [SAID])
    clean = float(found.extras["facts"]["clean"][0])
    zero = torch.zeros(lm.d_mlp)
    lost = [clean - p_of(lm, said(lm), layer, zero) for layer in range(lm.n_layers)]
    np.testing.assert_allclose(found.whole()["value"], lost, atol=1e-3)
    assert max(map(abs, lost)) > 1e-2


@pytest.mark.parametrize("family", NORMALISED)
def test_where_a_norm_undoes_the_scaling_there_is_no_way_to_follow(family: str) -> None:
    """Half the activations are as good as all of them, and none are not: the probability jumps where the way begins."""
    lm = tiny_lm(family)
    site = lm.sites("mlp_post", "last")[1]
    w = run(lm, lm.encode([SAID]), read=[site])[site][0]
    none, half, whole = (p_of(lm, said(lm), 1, a * w) for a in (0.0, 0.5, 1.0))
    assert abs(whole - half) < 1e-4 < 1e-3 < abs(whole - none)
    with pytest.raises(ModelError, match="normalises what its MLPs add"):
        KnowledgeNeurons()(lm, [SAID])


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "opt"])
def test_an_attribution_is_the_mean_slope_along_the_way_times_the_activation(family: str, rule: Rule) -> None:
    """A plain loop over neurons and steps, with slopes from small steps; in float64, as far as the family computes in it."""
    lm = fresh_lm(family)
    lm.model.double()
    alphas, size = {"paper": (1 / 3, 2 / 3, 1), "ends": (0, 1 / 2, 1), "middle": (1 / 6, 1 / 2, 5 / 6)}[rule], 1e-3
    found = integrated_gradients(lm, lm.encode([SAID]), said(lm), _alphas(3, rule))
    for site in (lm.sites("mlp_post", "last")[0], lm.sites("mlp_post", "last")[-1]):
        w = run(lm, lm.encode([SAID]), read=[site])[site][0]
        strongest = int(found[site.layer].abs().argmax())
        for neuron in (0, 31, strongest):
            step = torch.zeros_like(w)
            step[neuron] = size
            slopes = [
                (p_of(lm, said(lm), site.layer, a * w + step) - p_of(lm, said(lm), site.layer, a * w - step))
                / (2 * size)
                for a in alphas
            ]
            expected = float(w[neuron]) * sum(slopes) / 3
            assert float(found[site.layer, neuron]) == pytest.approx(expected, rel=5e-3, abs=1e-6)
        assert found[site.layer, strongest].abs() > 1e-4


def test_little_memory_makes_several_passes_and_no_difference(gpt2: LM) -> None:
    tokens, alphas = gpt2.encode([ZURICH]), _alphas(7, "paper")
    one = integrated_gradients(gpt2, tokens, 5, alphas)
    torch.testing.assert_close(integrated_gradients(gpt2, tokens, 5, alphas, memory=1), one, rtol=1e-4, atol=1e-9)
    assert one.dtype == torch.float64
    assert one.shape == (gpt2.n_layers, gpt2.d_mlp)


def each_prompt(lm: LM, steps: int) -> list[np.ndarray]:
    """The attributions of all prompts of the example."""
    texts = [PARAPHRASED.text, *PARAPHRASED.paraphrases]
    firsts = [lm.target_ids(text, "Paris")[0] for text in texts]
    return [
        integrated_gradients(lm, lm.encode([text]), first, _alphas(steps, "paper")).numpy()
        for text, first in zip(texts, firsts, strict=True)
    ]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 1.0])
def test_the_refined_set_is_shared_by_enough_prompts(gpt2: LM, share: float) -> None:
    found = each_prompt(gpt2, 3)
    coarse = [{(int(i), int(j)) for i, j in np.argwhere(attributed > 0.1 * attributed.max())} for attributed in found]
    everywhere = set().union(*coarse)
    votes = {place: sum(place in own for own in coarse) for place in everywhere}
    expected = {place for place, n in votes.items() if n >= {0.2: 1, 0.5: 3, 0.7: 4, 1.0: 5}[share]}
    here = KnowledgeNeurons(steps=3, threshold=0.1, share=share)(gpt2, [PARAPHRASED])
    table = here.extras["neurons"]
    places = list(zip(table["layer"], table["neuron"], strict=True))
    assert set(places) == expected
    assert len(places) == len(expected)
    assert table["prompts"].tolist() == [votes[place] for place in places]
    rows = here.neurons()
    assert list(zip(rows["layer"], rows["neuron"], strict=True)) == places
    np.testing.assert_allclose(rows["value"], [found[0][place] for place in places], rtol=1e-4)
    np.testing.assert_allclose(table["mean"], [np.mean([one[place] for one in found]) for place in places], rtol=1e-4)
    assert here.extras["prompts"]["coarse"].tolist() == [len(own) for own in coarse]
    assert len(expected) > 0 or share == 1


def test_without_paraphrases_the_coarse_set_stays(gpt2: LM) -> None:
    alone = KnowledgeNeurons(steps=3)(gpt2, [replace(PARAPHRASED, paraphrases=())])
    first = each_prompt(gpt2, 3)[0]
    assert len(alone.neurons()) == (first > 0.2 * first.max()).sum() > 0
    one = KnowledgeNeurons(steps=3, prompts=1)(gpt2, [PARAPHRASED])
    pd.testing.assert_frame_equal(one.table, alone.table)
    assert one.extras["facts"]["prompts"][0] == 1


def test_scores_are_the_mean_over_prompts(gpt2: LM) -> None:
    scores = KnowledgeNeurons(steps=3).neuron_scores(gpt2, PARAPHRASED)
    np.testing.assert_allclose(scores, np.mean(each_prompt(gpt2, 3), 0), rtol=1e-4, atol=1e-9)
    two = KnowledgeNeurons(steps=3, prompts=2).neuron_scores(gpt2, PARAPHRASED)
    np.testing.assert_allclose(two, np.mean(each_prompt(gpt2, 3)[:2], 0), rtol=1e-4, atol=1e-9)


def test_a_fact_that_keeps_no_neuron_joins_the_others(gpt2: LM) -> None:
    strict = KnowledgeNeurons(steps=3, threshold=0.999, share=1.0)
    pieces = [strict(gpt2, [fact]) for fact in (PARAPHRASED, ZURICH)]
    assert pieces[0].neurons().empty
    assert len(pieces[1].neurons()) == 1
    whole = join(pieces)
    assert len(whole.extras["neurons"]) == 1
    assert whole.extras["neurons"].dtypes.equals(pieces[1].extras["neurons"].dtypes)
    assert whole.table["neuron"].dtype == "Int64"


def test_an_unnamed_answer_is_what_the_model_says_after_the_facts_own_prompt(gpt2: LM) -> None:
    unnamed = replace(PARAPHRASED, target_true="")
    here = KnowledgeNeurons(steps=2)(gpt2, [unnamed]).extras["prompts"]
    for text, p in zip(here["prompt"], here["p"], strict=True):
        logits = run(gpt2, gpt2.encode([text])).last_logits[0].double()
        assert p == pytest.approx(float(logits.softmax(-1)[said(gpt2)]), rel=1e-5)


def test_weights_that_want_no_gradient_serve_and_get_none() -> None:
    lm = fresh_lm("gpt2")
    expected = KnowledgeNeurons(steps=2)(lm, [EIFFEL]).table
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    lm.model.requires_grad_(False)
    with torch.no_grad():
        pd.testing.assert_frame_equal(KnowledgeNeurons(steps=2)(lm, [EIFFEL]).table, expected)
    with torch.inference_mode(), pytest.raises(InputError, match="no gradients"):
        integrated_gradients(lm, lm.encode([SAID]), 0, [1.0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "0 steps were asked for, expected 1 to 10000"),
        ({"steps": 1, "rule": "ends"}, "1 steps were asked for, expected 2 to"),
        ({"rule": "left"}, "expected one of paper, ends, middle"),
        ({"threshold": 0}, "threshold is 0, expected a number above 0"),
        ({"share": 1.1}, r"share is 1\.1, expected a number above 0, up to 1"),
        ({"share": "most"}, "share is 'most'"),
        ({"prompts": 0}, "prompts is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FactError, match=says):
        KnowledgeNeurons(**settings)
