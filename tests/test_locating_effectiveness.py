"""KLoB's numbers and the distance to a known place, by hand; and the tiny planted model from end to end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from analyses.fact_sets import nonsense, same_subject, spread, wordings
from analyses.injection import CHANCE
from analyses.locating_effectiveness import (
    MEASURES,
    _relative_deviation,
    _relative_similarity,
    against_band,
    app,
    area_under_curve,
    default_locators,
    effectiveness_markdown,
    ground_truth,
    ground_truth_markdown,
    locating_effectiveness,
    overlap,
    relative_deviation,
    relative_similarity,
)
from analyses.series import _neurons, locate_each, top
from tests.examples import SAID, ZURICH
from workbench.facts import FactError
from workbench.loading import load
from workbench.locators import Locator
from workbench.locators.causal_trace import CausalTrace
from workbench.locators.hard_concrete import HardConcrete
from workbench.models import LM
from workbench.results import Result
from workbench.zoo import load_facts, owners

TRACE = CausalTrace(kinds=("mlp_out",), window=1, samples=2)


@cache
def organism() -> LM:
    return load("organism-tiny", device="cpu")


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_the_top_layers_are_the_largest_and_of_equal_ones_the_lower() -> None:
    values = np.array([[0.1, 0.9, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0], [np.nan, 1.0, np.nan, 2.0]])
    assert top(values, 1).tolist() == [[False, True, False, False], [True, False, False, False], [False] * 3 + [True]]
    assert top(values, 2)[:2].tolist() == [[False, True, False, True], [True, True, False, False]]
    assert top(values, 4).sum(1).tolist() == [4, 4, 2]


def test_overlap_is_the_share_of_layers_in_common() -> None:
    sets = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=bool)
    assert overlap(sets).tolist() == [[1, 0.5, 0, 0.5], [0.5, 1, 0.5, 0.5], [0, 0.5, 1, 0], [0.5, 0.5, 0, 1]]
    assert overlap(np.zeros((2, 3), dtype=bool)).tolist() == [[0, 0], [0, 0]]


def test_relative_similarity_by_hand() -> None:
    """Facts a, b have layer 0; c has layer 1 and d layer 2. Pairs: 1 equal of 6."""
    locations = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    ids = pd.Index(list("abcd"))
    same = _relative_similarity(ids, [["a", "b"], ["c", "d"]], locations, 100, 0)
    assert same is not None
    assert (same["own"], same["n"]) == (0.5, 2)  # 1 and 0
    assert same["all"] == pytest.approx(1 / 6)
    assert same["value"] == pytest.approx((1 / 2 - 1 / 6) / (1 - 1 / 6))
    crossed = _relative_similarity(ids, [["a", "c"], ["b", "d"]], locations, 100, 0)
    assert crossed is not None
    assert crossed["value"] == 0  # less alike inside of the sets than everywhere
    assert _relative_similarity(ids, [["a"], ["b", "not located"]], locations, 100, 0) is None


def test_relative_similarity_ends_at_zero_and_one_and_is_missing_where_all_are_equal() -> None:
    assert relative_similarity(1.0, 0.25) == 1.0
    assert relative_similarity(0.25, 0.25) == 0.0
    assert np.isnan(relative_similarity(1.0, 1.0))


def test_relative_deviation_by_hand() -> None:
    """Profiles (0, 4) and (0, 8) have deviations 2 and 4, (1, 3) and (5, 5) have 1 and 0: 1 - 0.5 / 3."""
    factual, empty = np.array([[0.0, 4.0], [0.0, 8.0]]), np.array([[1.0, 3.0], [5.0, 5.0]])
    told = _relative_deviation(factual, empty, 200, 0)
    assert (told["own"], told["all"]) == (0.5, 3.0)
    assert told["value"] == pytest.approx(5 / 6)
    assert 0.5 <= told["low"] <= told["value"] <= told["high"] <= 1
    assert _relative_deviation(empty, factual, 10, 0)["value"] == 0
    assert np.isnan(relative_deviation(1.0, 0.0))


def test_the_area_under_the_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    for n in range(3, 9):
        values = rng.integers(0, 4, n).astype(float)  # with ties
        inside = np.arange(n) < rng.integers(1, n)
        pairs = list(product(values[inside], values[~inside]))
        expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert area_under_curve(values, inside) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0, 1, 0, 0, 0], {"hit": 1, "distance": 0, "owner_hit": 1, "owner_distance": 0}),
        ([0, 0, 0, 1, 0, 0], {"hit": 1, "distance": 0, "owner_hit": 0, "owner_distance": 1}),
        ([1, 0, 0, 0, 0, 0], {"hit": 0, "distance": 2, "owner_hit": 0, "owner_distance": 2}),
        ([0, 0, 0, 0, 0, 1], {"hit": 0, "distance": 2, "owner_hit": 0, "owner_distance": 3}),
        ([0, 0, 1, 0, 0, 1], {"hit": 0.5, "distance": 1, "owner_hit": 0.5, "owner_distance": 1.5}),
        ([np.nan, -2, -1, np.nan, -3, np.nan], {"hit": 1, "distance": 0, "owner_hit": 1, "owner_distance": 0}),
    ],
)
def test_a_peak_against_layers_2_and_3_of_6_with_owner_2(values: Sequence[float], expected: dict[str, float]) -> None:
    inside = np.array([False, False, True, True, False, False])
    found = against_band(np.array(values, dtype=float), inside, owner=2)
    assert {name: found[name] for name in found if name != "auc"} == expected
    assert "owner_hit" not in against_band(np.array(values, dtype=float), inside)


# -- the tiny planted model --------------------------------------------------------------------------------------------


@cache
def truth() -> Result:
    facts = spread(load_facts("organism-tiny"), 6)
    return ground_truth(
        organism(),
        facts,
        band=range(1, 2),
        locators=[TRACE, HardConcrete(steps=20)],
        owner=owners("organism-tiny"),
        reference=load_facts("organism-tiny"),
        resamples=100,
    )


def test_chance_is_any_layer_and_tracing_finds_the_planted_one() -> None:
    value = truth().table.set_index(["method", "measure"])["value"]
    assert value[CHANCE, "hit"] == value[CHANCE, "owner_hit"] == pytest.approx(1 / 4)
    assert value[CHANCE, "distance"] == pytest.approx((1 + 0 + 1 + 2) / 4)
    assert value[CHANCE, "auc"] == pytest.approx(1 / 2)
    assert value["CausalTrace", "hit"] > 0.75
    assert value["CausalTrace", "auc"] > 0.9


def test_the_table_has_every_series_and_measure_with_its_interval(tmp_path: Path) -> None:
    table, each = truth().table, truth().extras["each"]
    assert list(table["label"].unique()) == [CHANCE, "CausalTrace mlp_out", "HardConcrete mlp_post"]
    assert list(table["measure"].unique()) == list(MEASURES)
    assert set(table["n"]) == {6}
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    assert len(each) == 6 * len(table)
    assert list(truth().extras["methods"]["facts"]) == [6, 6]
    truth().save(tmp_path / "truth")
    assert Result.load(tmp_path / "truth").key == truth().key
    lines = ground_truth_markdown(truth()).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].startswith("| CausalTrace | mlp_out |")
    assert {line.count("|") for line in lines} == {10}


def test_klobs_criteria_for_every_series_and_size() -> None:
    facts = load_facts("organism-tiny")
    chosen = spread(facts, 3)
    result = locating_effectiveness(
        organism(),
        locators=[TRACE, HardConcrete(steps=5)],
        consistency=wordings(chosen, most=2),
        relevance=same_subject(facts)[:2],
        nonsense=nonsense("organism-tiny", 3),
        neuron_ks=(1, 5),
        resamples=50,
    )
    table = result.table
    layers = table[(table["unit"] == "layers") & (table["measure"] != "unbiasedness")]
    assert set(map(tuple, layers[["method", "measure", "k"]].to_numpy())) == set(
        product(["CausalTrace", "HardConcrete"], ["consistency", "relevance"], [1, 2, 3, 4])
    )
    assert layers[layers["k"] == 4]["value"].isna().all()
    assert layers[layers["k"] == 4]["own"].eq(1).all()
    assert layers["value"].dropna().between(0, 1).all()
    assert set(table[table["unit"] == "neurons"]["method"]) == {"HardConcrete"}
    unbiased = table[table["measure"] == "unbiasedness"]
    assert list(unbiased["method"]) == ["CausalTrace", "HardConcrete"]
    assert unbiased["k"].isna().all()
    assert len(effectiveness_markdown(result, ks=(1, 2)).splitlines()) == 2 + 2


def test_neurons_of_a_role_are_those_of_its_tokens_in_the_facts_that_have_it() -> None:
    rows = [
        ("a", 0, 1, "subject_last", 0, 0.9), ("a", 0, 1, "subject_last", 1, 0.1),
        ("a", 0, 2, "last", 0, 0.3), ("a", 0, 2, "last", 1, 0.2),
        ("b", 0, 1, "subject_last", 0, 8), ("b", 0, 1, "subject_last", 1, 7),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["fact", "layer", "position", "token", "neuron", "value"])
    footprint: Any = SimpleNamespace(neurons=lambda kind: table)

    def read(facts: pd.Index[str], token: Any) -> Any:
        return _neurons(footprint, "mlp_post", facts, token)

    np.testing.assert_array_equal(read(pd.Index(["a"]), "last"), [[0.3, 0.2]])
    np.testing.assert_array_equal(read(pd.Index(["a", "b"]), None), [[0.9, 0.2], [8, 7]])
    assert read(pd.Index(["c"]), "last") is None


def test_a_fact_that_a_method_cannot_locate_costs_only_itself() -> None:
    swap = CausalTrace(kinds=("mlp_out",), corrupt="swap", window=1, samples=1, substitutes=("Tower Eiffel",))
    found = locate_each(organism(), [swap, TRACE], [SAID, ZURICH], reference=[SAID, ZURICH])
    told = found.methods.set_index(found.methods.index)
    assert list(told["left_out"]) == [1, 0]
    assert "substitutes" in told["reason"][0]
    assert found.footprints[0].facts == (SAID.id,)
    with pytest.raises(FactError, match="No method can locate any of the 1 facts"):
        locate_each(organism(), [swap], [ZURICH], reference=[ZURICH])


def test_nothing_to_ask_is_said() -> None:
    lm = organism()
    with pytest.raises(FactError, match="no fact to locate"):
        ground_truth(lm, [], band=range(1, 2), locators=[TRACE])
    for band in (range(4), range(3, 5), range(2, 2)):
        with pytest.raises(FactError, match="expected some of them and not all"):
            ground_truth(lm, [SAID], band=band, locators=[TRACE])
    with pytest.raises(FactError, match="no set of facts"):
        locating_effectiveness(lm, locators=[TRACE], nonsense=[SAID])
    with pytest.raises(FactError, match="There is no method 'Guess'"):
        default_locators(lm, ["Guess"])


def test_methods_are_chosen_by_name() -> None:
    lm = organism()
    chosen: list[Locator] = default_locators(lm, ["HardConcrete", "CausalTrace"], without=["CausalTrace"])
    assert chosen == [HardConcrete()]
    (trace,) = default_locators(lm, ["CausalTrace"])
    assert isinstance(trace, CausalTrace)
    assert trace.window == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "organism-plain"], "'organism-plain' is no bundled model with planted facts"),
        (["--model", "nosuch"], "'nosuch' is no bundled model with planted facts"),
        (["--method", "nosuch"], "There is no method 'nosuch'"),
        (["--method", "LogitLens", "--without", "LogitLens"], "Without LogitLens no method is left"),
    ],
)
def test_wrong_input_gets_one_sentence_before_a_model_is_loaded(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    ran = CliRunner().invoke(app, ["--out", str(tmp_path), *arguments])
    assert ran.exit_code == 2
    assert sentence in ran.output
    assert len(ran.output.strip().splitlines()) == 1


def test_the_command_prints_the_table_of_a_planted_model(tmp_path: Path) -> None:
    ran = CliRunner().invoke(
        app, ["--out", str(tmp_path), "--model", "organism-tiny", "--method", "LogitLens", "--facts", "2"]
    )
    assert ran.exit_code == 0, ran.output
    assert "| LogitLens | resid_post |" in ran.output
