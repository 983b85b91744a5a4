"""A card says what single runs of its facts say, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from analyses.neuron_card import neuron_card
from tests.examples import FACTS, SAID
from workbench.facts import FactError
from workbench.hooks import run
from workbench.locators.value_vectors import ValueVectors
from workbench.models import LM
from workbench.progress import reporting
from workbench.results import Result
from workbench.sites import Site
from workbench.vocabulary import Projection, VocabularyError, neuron_tokens

ALL = (*FACTS, SAID)


def test_contributions_are_those_of_value_vectors(lm: LM) -> None:
    scores = [ValueVectors().neuron_scores(lm, fact) for fact in ALL]
    for layer in (0, lm.n_layers - 1):
        neuron = int(scores[0][layer].abs().argmax())
        card = neuron_card(lm, ALL, layer=layer, neuron=neuron).table.set_index("fact")["contribution"]
        expected = [float(score[layer, neuron]) for score in scores]
        np.testing.assert_allclose(card[[fact.id for fact in ALL]], expected, rtol=2e-3, atol=1e-5)
        assert max(map(abs, expected)) > 1e-2


def test_strengths_are_the_largest_activations_of_each_prompt(gpt2: LM) -> None:
    table = neuron_card(gpt2, ALL, layer=2, neuron=17).table
    assert table["k"].abs().is_monotonic_decreasing
    assert sorted(table["fact"]) == sorted(fact.id for fact in ALL)
    for fact in ALL:
        tokens, row = gpt2.encode([fact]), table[table["fact"] == fact.id].iloc[0]
        k = run(gpt2, tokens, read=["mlp_post"])[Site(layer=2, kind="mlp_post")][0, :, 17].double().numpy()
        place = int(np.abs(k).argmax())
        assert row["k"] == pytest.approx(k[place], rel=1e-4)
        assert row["k_last"] == pytest.approx(k[-1], rel=1e-4, abs=1e-6)
        assert (row["position"], row["text"], row["token"]) == (place, tokens.texts[0][place], tokens.roles()[place])
        assert (row["prompt"], row["relation"]) == (fact.text, fact.relation)
    assert table["position"].nunique() > 1
    said = int(run(gpt2, gpt2.encode([SAID])).last_logits[0].argmax())
    assert table.set_index("fact")["answer"][["said", "zurich"]].tolist() == [gpt2.word(said).strip(), "German"]


def test_batches_make_no_difference(gpt2: LM) -> None:
    totals: list[int] = []
    whole = neuron_card(gpt2, ALL, layer=1, neuron=5)
    with reporting(lambda what, done, total: totals.append(total)):
        single = neuron_card(gpt2, ALL, layer=1, neuron=5, memory=1)
    assert set(totals) == {len(ALL)}
    pd.testing.assert_frame_equal(single.table, whole.table, rtol=1e-4, atol=1e-6)
    for name, table in whole.extras.items():
        pd.testing.assert_frame_equal(single.extras[name], table, rtol=1e-4, atol=1e-6)


def test_statistics_are_over_facts(gpt2: LM) -> None:
    card = neuron_card(gpt2, ALL, layer=3, neuron=8)
    statistics = card.extras["statistics"].set_index("measure")
    for measure in ("k", "k_last", "contribution"):
        values = card.table[measure].to_numpy()
        expected = [values.mean(), values.std(ddof=1), values.min(), values.max(), (values > 0).mean()]
        np.testing.assert_allclose(statistics.loc[measure].to_numpy(float), expected)
    assert np.isnan(neuron_card(gpt2, [SAID], layer=3, neuron=8).extras["statistics"]["sd"]).all()


def test_tokens_are_named_in_both_projections(gpt2: LM) -> None:
    tokens = neuron_card(gpt2, [SAID], layer=1, neuron=5, k=4).extras["tokens"]
    assert list(tokens.columns) == ["projection", "direction", "rank", "token_id", "text", "value"]
    for projection in get_args(Projection):
        own = tokens[tokens["projection"] == projection].reset_index(drop=True)
        expected = neuron_tokens(gpt2, 1, 5, projection=projection, k=4)
        pd.testing.assert_frame_equal(own[list(expected.columns)], expected)
        assert own["text"].tolist() == [gpt2.word(token) for token in own["token_id"]]


def test_a_card_is_saved_and_loaded_with_its_protocol(gpt2: LM, tmp_path: Path) -> None:
    card = neuron_card(gpt2, ALL, layer=1, neuron=5)
    again = Result.load(card.save(tmp_path / "card"))
    pd.testing.assert_frame_equal(again.table, card.table)
    assert again.run["parameters"] == {"layer": 1, "neuron": 5, "k": 10}
    assert again.run["weight_hash"] == gpt2.weight_hash
    assert again.key != neuron_card(gpt2, ALL, layer=1, neuron=6).key


def test_what_does_not_exist_is_refused(gpt2: LM) -> None:
    with pytest.raises(VocabularyError, match="no neuron 80 in layer 0"):
        neuron_card(gpt2, ALL, layer=0, neuron=80)
    with pytest.raises(FactError, match="at least one"):
        neuron_card(gpt2, [], layer=0, neuron=0)
