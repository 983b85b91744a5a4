"""Neurons' contributions sum to the MLP's, and each is what the logit loses without the neuron once all norms stand still."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch

from tests.examples import FACTS, MESSI, SAID, ZURICH, fresh_lm
from workbench.directions import frozen_direction, post_norm
from workbench.facts import FactError
from workbench.hooks import run
from workbench.locators.direct_logit_attribution import DirectLogitAttribution
from workbench.locators.value_vectors import ValueVectors
from workbench.models import LM
from workbench.sites import Role, Site
from workbench.vocabulary import Projection, neuron_tokens, words


@pytest.mark.parametrize("token", ["last", "subject_last"])
def test_neurons_and_biases_sum_to_the_mlps_direct_contribution(lm: LM, token: Role) -> None:
    locator = ValueVectors(token=token)
    here, scores = locator(lm, [SAID]), locator.neuron_scores(lm, SAID)
    layers, whole = here.extras["layers"], here.whole()
    summed = scores.sum(1).numpy() + layers["bias"]
    np.testing.assert_allclose(whole["value"], summed, atol=1e-4)
    np.testing.assert_allclose(whole["value"], layers["contribution"])
    np.testing.assert_allclose(layers["sizes"], scores.abs().sum(1))
    assert whole["value"].abs().max() > 0.1


def test_whole_rows_are_those_of_direct_logit_attribution(lm: LM) -> None:
    for centred in (False, True):
        expected = DirectLogitAttribution(centred=centred)(lm, [ZURICH]).of(kind="mlp_out")
        found = ValueVectors(centred=centred)(lm, [ZURICH]).whole()
        np.testing.assert_allclose(found["value"], expected["value"], atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "phi"])
def test_a_neurons_contribution_is_what_its_output_alone_says(family: str) -> None:
    """By the model's own projection, one neuron at a time: its output on top of the others', read with the norms frozen."""
    lm = fresh_lm(family)
    lm.model.double()
    tokens, top = lm.encode([SAID]), Site(layer=lm.n_layers - 1, kind="resid_post")
    clean = run(lm, tokens, read=["mlp_post", "mlp_out", top])
    last, scores = tokens.lengths[0] - 1, ValueVectors().neuron_scores(lm, SAID)
    answer = int(clean.last_logits[0].argmax())
    direction = frozen_direction(lm, clean[top][0, [last]], [answer])[0][0, 0]
    for layer in (0, lm.n_layers - 1):
        k = clean[Site(layer=layer, kind="mlp_post")][0, last]
        down, norm = lm.part(layer, lm.layout.down_proj), post_norm(lm, layer, "mlp_out")
        with torch.no_grad():
            full, scale = down(k[None]), torch.ones(1, dtype=torch.float64)
            if norm is not None:  # an RMSNorm: an elementwise product, divided by a number that is held
                scale = norm(full) / full
            for neuron in range(0, lm.d_mlp, 17):
                without = k.clone()
                without[neuron] = 0
                lost = float(((full - down(without[None])) * scale)[0] @ direction)
                assert float(scores[layer, neuron]) == pytest.approx(lost, rel=1e-5, abs=1e-9)


def test_a_neuron_of_the_last_layer_moves_the_logit_by_its_contribution_but_for_the_norm() -> None:
    """A small step along a neuron's activation: with the divisor frozen the logit moves by just so much."""
    lm = fresh_lm("gpt2")
    lm.model.double()
    tokens, layer = lm.encode([SAID]), lm.n_layers - 1
    top = Site(layer=layer, kind="resid_post")
    clean = run(lm, tokens, read=["mlp_post", top])
    answer = int(clean.last_logits[0].argmax())
    direction, constant = (x[0, 0] for x in frozen_direction(lm, clean[top][0, [-1]], [answer]))
    neuron = int(ValueVectors().neuron_scores(lm, SAID)[layer].argmax())
    site = Site(layer=layer, kind="mlp_post", token="last", neuron=neuron)
    moved = run(lm, tokens, read=[top], write={site: lambda k: 1.1 * k})
    change = moved[top][0, -1] @ direction + constant - clean.last_logits[0, answer]
    score = float(ValueVectors().neuron_scores(lm, SAID)[layer, neuron])
    assert float(change) == pytest.approx(0.1 * score, rel=1e-6)
    assert score > 0


def test_rows_of_neurons_are_the_largest_of_the_model_or_of_each_layer(gpt2: LM) -> None:
    scores = ValueVectors().neuron_scores(gpt2, SAID).numpy()
    one = ValueVectors(neurons=7)(gpt2, [SAID])
    rows = one.neurons()
    assert rows["value"].tolist() == sorted(scores.ravel(), reverse=True)[:7]
    layers, neurons = rows[["layer", "neuron"]].to_numpy(int).T
    assert scores[layers, neurons].tolist() == rows["value"].tolist()
    each = ValueVectors(neurons=3, per="layer")(gpt2, [SAID]).neurons()
    assert each["value"].is_monotonic_decreasing
    for layer in range(gpt2.n_layers):
        assert each.loc[each["layer"] == layer, "value"].tolist() == sorted(scores[layer], reverse=True)[:3]
    none = ValueVectors(neurons=0)(gpt2, [SAID, ZURICH])
    assert none.neurons().empty
    assert none.extras["neurons"].empty


@pytest.mark.parametrize("projection", get_args(Projection))
def test_the_table_of_neurons_says_what_they_are(gpt2: LM, projection: Projection) -> None:
    here = ValueVectors(neurons=5, tokens=3, projection=projection)(gpt2, [SAID])
    clean = run(gpt2, gpt2.encode([SAID]), read=["mlp_post"])
    table, sizes = here.extras["neurons"], here.extras["layers"]["sizes"].to_numpy()
    assert table["contribution"].tolist() == here.neurons()["value"].tolist()
    for i, (layer, neuron) in enumerate(zip(table["layer"], table["neuron"], strict=True)):
        site = Site(layer=layer, kind="mlp_post", token="last", neuron=neuron)
        assert table["k"][i] == float(run(gpt2, clean.tokens, read=[site])[site])
        assert table["share"][i] == pytest.approx(table["contribution"][i] / sizes[layer])
        tokens = neuron_tokens(gpt2, layer, neuron, projection=projection, k=3)["token_id"]
        assert table["promoted"][i] == words(gpt2, tokens[:3])
        assert table["suppressed"][i] == words(gpt2, tokens[3:])
    assert set(table["projection"]) == {projection}


def test_an_answer_may_be_named_and_its_first_token_counts(gpt2: LM) -> None:
    named = replace(SAID, target_true="Rome")
    first = gpt2.target_ids(named.text, "Rome")[0]
    facts = ValueVectors()(gpt2, [named]).extras["facts"]
    logits = run(gpt2, gpt2.encode([named])).last_logits[0]
    assert facts["logit"][0] == pytest.approx(float(logits[first]), rel=1e-6)
    assert facts["clean"][0] == pytest.approx(float(logits.softmax(-1)[first]), rel=1e-5)
    assert not np.allclose(ValueVectors().neuron_scores(gpt2, named), ValueVectors().neuron_scores(gpt2, SAID))


def test_a_role_of_several_tokens_or_none_is_refused_before_any_work(gpt2: LM) -> None:
    with pytest.raises(FactError, match="tokens of 'The Eiffel Tower is in' are 'subject', expected 1"):
        ValueVectors(token="subject")(gpt2, [ZURICH, SAID])
    with pytest.raises(FactError, match=r"0 tokens of .* are 'first_after_subject', expected 1"):
        ValueVectors(token="first_after_subject")(gpt2, [MESSI])
    wrong: list[dict[str, Any]] = [{"neurons": -1}, {"tokens": 0}, {"per": "all"}, {"projection": "other"}]
    for settings in wrong:
        with pytest.raises(FactError, match="expected"):
            ValueVectors(**settings)


def test_several_facts_are_the_single_ones_together(gpt2: LM) -> None:
    together = ValueVectors(neurons=4)(gpt2, FACTS)
    for name in ("neurons", "layers", "facts"):
        single = pd.concat([ValueVectors(neurons=4)(gpt2, [fact]).extras[name] for fact in FACTS], ignore_index=True)
        pd.testing.assert_frame_equal(together.extras[name], single)
