"""Edits at every layer against traces: scores by hand, R^2 against least squares, and the tiny planted model from end to end."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import analyses.does_localization_inform_editing as module
from analyses.answers import log_p
from analyses.does_localization_inform_editing import (
    PUBLISHED,
    LocatorName,
    Problem,
    chart,
    does_localization_inform_editing,
    erased,
    explained,
    neighborhood_score,
    recovered,
    summary,
)
from analyses.layer_edits import EditorName
from workbench.charts import DotPlot, LinePlot
from workbench.editors.rome import Rome
from workbench.facts import FactError
from workbench.loading import load
from workbench.locators import all_locators
from workbench.models import LM
from workbench.results import Result
from workbench.store import Store
from workbench.zoo import load_facts


@cache
def organism() -> LM:
    return load("organism-tiny", device="cpu")


FACTS = [fact for fact in load_facts("organism-tiny") if fact.target_new][::7][:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(autouse=True)
def kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(folder))


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RESULTS", str(folder))
        return does_localization_inform_editing(
            organism(), FACTS, editors=("ROME", "MEMIT", "FT"), resamples=20, store=Store(folder=folder)
        )


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    after = np.array([0.2, 0.6, 1.0, 0.1])
    assert recovered(0.2, after) == pytest.approx([0.0, 0.5, 1.0, 0.0])
    assert erased(0.2, after) == pytest.approx([0.0, 0.0, 0.0, 0.5])
    assert neighborhood_score(0.2, after) == pytest.approx([1.0, 0.5, 0.0, 0.875])
    assert recovered(1.0, np.array([1.0]))[0] == 0.0
    assert erased(0.0, np.array([0.3]))[0] == 0.0


@pytest.mark.parametrize("seed", [0, 1])
def test_r2_and_f_are_those_of_least_squares_with_dummies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, n_layers = 9, 4
    x = rng.random((n, n_layers))
    y = 0.3 * x + np.arange(n_layers) + rng.normal(size=(n, n_layers))
    layers = np.tile(np.eye(n_layers), (n, 1))
    flat = x.reshape(-1, 1)

    def residuals(*columns: np.ndarray) -> float:
        matrix = np.hstack(columns)
        fit, *_ = np.linalg.lstsq(matrix, y.ravel(), rcond=None)
        return float(((y.ravel() - matrix @ fit) ** 2).sum())

    whole = residuals(np.ones((n * n_layers, 1)))
    layer, line, both = residuals(layers), residuals(np.ones_like(flat), flat), residuals(layers, layers * flat)
    found = explained(y, x, seed=0)
    assert found["r2_layer"] == pytest.approx(1 - layer / whole)
    assert found["r2_trace"] == pytest.approx(1 - line / whole)
    assert found["r2_both"] == pytest.approx(1 - both / whole)
    f = (layer - both) / n_layers / (both / (n * n_layers - 2 * n_layers))
    assert found["f"] == pytest.approx(f)
    assert found["p"] == pytest.approx(stats.f.sf(f, n_layers, n * n_layers - 2 * n_layers))
    assert found["r2_trace"] == pytest.approx(stats.linregress(flat[:, 0], y.ravel()).rvalue ** 2)


def test_a_trace_that_explains_all_beats_chance_and_one_that_explains_nothing_does_not() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.random((12, 5)), rng.random((12, 5))
    told = explained(2 * x + np.arange(5), x, seed=0)
    assert told["r2_both"] == pytest.approx(1)
    assert told["p_permuted"] < 0.02 < told["gain"] - told["chance"]
    assert 0 < told["low"] < told["more"] < told["high"]
    nothing = explained(noise, x, seed=0)
    assert nothing["chance"] > 0.02  # slopes of so few facts fit something
    assert nothing["low"] < 0 < nothing["high"]
    assert nothing["p_permuted"] > 0.05
    flat = explained(noise, np.zeros_like(x), seed=0)
    assert flat["gain"] == pytest.approx(0)
    assert flat["chance"] == 0
    assert np.isnan(flat["p"])
    same = explained(np.ones_like(x), x, seed=0)
    assert all(np.isnan(same[name]) for name in ("r2_layer", "gain", "chance", "more", "low", "high", "p_permuted"))


def test_chance_is_the_mean_gain_of_all_ways_to_shuffle_the_traces() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((5, 3)), rng.random((5, 3))
    x[:, 1] = 0.5  # where the trace is the same for all facts nothing is gained
    gains = [explained(y, x[list(order)], seed=0)["gain"] for order in permutations(range(5))]
    found = explained(y, x, seed=0)
    assert found["chance"] == pytest.approx(np.mean(gains))
    assert found["more"] == pytest.approx(found["gain"] - found["chance"])


def test_intervals_by_hand() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((8, 3)), rng.random((8, 3))
    found = explained(y, x, seed=0)
    rest = [explained(np.delete(y, i, 0), np.delete(x, i, 0), seed=0) for i in range(8)]
    t = stats.t.ppf(0.975, 7)
    wide = t * np.sqrt(7 / 8 * sum((one["r2_layer"] - np.mean([two["r2_layer"] for two in rest])) ** 2 for one in rest))
    assert found["r2_layer_high"] - found["r2_layer"] == pytest.approx(wide)
    assert found["r2_layer"] - found["r2_layer_low"] == pytest.approx(wide)
    roots = np.sqrt([one["gain"] for one in rest])
    wide = t * np.sqrt(7 / 8 * ((roots - roots.mean()) ** 2).sum())
    root = np.sqrt(found["gain"])
    assert found["high"] == pytest.approx((root + wide) ** 2 - found["chance"])
    assert found["low"] == pytest.approx(max(root - wide, 0) ** 2 - found["chance"])


@pytest.mark.parametrize("shared", [0.0, 1.0])
@pytest.mark.parametrize("layers_differ", [False, True])
def test_a_trace_that_says_nothing_has_an_interval_around_0(shared: float, layers_differ: bool) -> None:
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = (rng.normal(size=(15, 6)) + 3 * shared * rng.normal(size=(15, 1)) for _ in range(2))
        found.append(explained(y + layers_differ * np.arange(6), x, seed=0))
    table = pd.DataFrame(found)
    assert (table["low"].lt(0) & table["high"].gt(0)).mean() > 0.9
    assert abs(table["more"].mean()) < 3 * table["more"].sem()
    for name, low, high in (("more", "low", "high"), ("r2_layer", "r2_layer_low", "r2_layer_high")):
        assert table[name].between(table[low], table[high]).all()


def test_the_published_table_is_whole_and_adds_up() -> None:
    assert set(PUBLISHED) == {(p, e) for p in get_args(Problem) for e in get_args(EditorName)}
    assert all(layer <= both + 1e-9 and trace <= both + 0.04 for layer, trace, both in PUBLISHED.values())
    gains = {key: both - layer for key, (layer, _, both) in PUBLISHED.items()}
    assert max(gains, key=lambda key: gains[key]) == ("fact_forcing", "FT5")
    assert max(gains.values()) == pytest.approx(0.032)


def test_every_locator_can_take_the_traces_place() -> None:
    assert set(get_args(LocatorName)) == set(all_locators())


# -- from end to end ---------------------------------------------------------------------------------------------------


def test_there_is_a_row_for_every_problem_editor_fact_and_layer(result: Result) -> None:
    table = result.table
    n = len(table)
    assert n == table.groupby(["problem", "editor", "fact", "layer"]).ngroups
    left = {what.split(": ")[0] for what in result.run["left_out"]}
    assert left <= {"tracing_reversal", "fact_erasure"}
    injected = table[(table["problem"] == "error_injection") & (table["editor"] == "FT")]
    assert len(injected) == len(FACTS) * organism().n_layers
    assert table[["rewrite", "paraphrase", "neighborhood", "overall"]].apply(lambda x: x.between(0, 1)).all().all()
    assert np.allclose(table["overall"], table[["rewrite", "paraphrase", "neighborhood"]].mean(axis=1))
    assert table["trace"].ge(0).all()
    erasure = table[table["problem"] == "fact_erasure"]
    assert (erasure.groupby("editor")["after"].mean() < erasure.groupby("editor")["before"].mean()).all()
    assert np.allclose(erasure["rewrite"], np.maximum(0, 1 - erasure["after"] / erasure["before"]))


def test_an_injected_error_is_as_probable_as_after_the_editor(result: Result) -> None:
    lm, fact = organism(), FACTS[0]
    own = result.table.query("problem == 'error_injection' and editor == 'ROME'").set_index(["fact", "layer"])
    edit = Rome.fitted(lm, layers=(1,), prefix_lengths=(), essence=())(lm, [fact])
    with edit.on(lm):
        after = float(log_p(lm, [fact.text], [fact.target_new or ""]).exp())
    assert own.loc[(fact.id, 1), "after"] == pytest.approx(after, abs=2e-3)
    before = float(log_p(lm, [fact.text], [fact.target_new or ""]).exp())
    assert own.loc[(fact.id, 1), "before"] == pytest.approx(before, abs=1e-5)


def test_forcing_edits_the_noised_prompt(result: Result) -> None:
    before = result.table.drop_duplicates(["problem", "fact"]).pivot(index="fact", columns="problem", values="before")
    assert (before["fact_amplification"] == before["fact_erasure"]).all()
    assert (before["fact_forcing"] < before["fact_amplification"]).all()


def test_a_stopped_run_goes_on_from_the_store(result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("edited again")

    monkeypatch.setattr(module, "edit_every_layer", refuse)
    again = does_localization_inform_editing(
        organism(), FACTS, editors=("ROME", "FT"), problems=("fact_erasure",), resamples=20, store=Store(folder=folder)
    )
    old = result.table.query("problem == 'fact_erasure' and editor != 'MEMIT'").reset_index(drop=True)
    pd.testing.assert_frame_equal(
        again.table.sort_values(["editor", "fact", "layer"], ignore_index=True),
        old.sort_values(["editor", "fact", "layer"], ignore_index=True),
    )


def test_another_locator_and_essence(folder: Path) -> None:
    found = does_localization_inform_editing(
        organism(), FACTS[:1], editors=("ROME",), problems=("error_injection",), locator="RepresentationZeroing",
        essence=1, store=Store(folder=folder),
    )  # fmt: skip
    assert found.table["essence"].between(0, 1).all()
    assert found.extras["r2"].empty  # one fact explains nothing
    assert "RepresentationZeroing" in chart(found).caption
    assert "nothing to explain" in summary(found)


def test_the_chart_has_the_published_table_beside_ours(result: Result) -> None:
    drawn = chart(result)
    ours, published = drawn.plots[2:]
    assert isinstance(ours, DotPlot)
    assert isinstance(published, DotPlot)
    assert list(ours.rows["label"]) == list(published.rows["label"])
    row = published.rows.query("label == 'fact forcing, ROME' and series == 'both'")
    assert row["x"].item() == pytest.approx(0.425)
    first = drawn.plots[0]
    assert isinstance(first, LinePlot)
    assert first.shade == range(1, 2)
    text = summary(result)
    own = result.extras["r2"].query("score == 'rewrite'")
    row = own.to_dict("records")[0]
    assert f"{row['more']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in text
    cells = np.array(
        [PUBLISHED[problem, editor] for problem, editor in zip(own["problem"], own["editor"], strict=True)]
    )
    assert f"mean of the published tables {cells[:, 0].mean():.2f}" in text
    assert f"(published {(cells[:, 2] - cells[:, 0]).mean():+.3f})" in text
    assert "Cost: " in text
    assert text.count("\n") == 2 + len(result.extras["r2"].query("score == 'rewrite'"))


def test_refusals() -> None:
    lm = organism()
    with pytest.raises(FactError, match="target_new"):
        does_localization_inform_editing(lm, [replace(FACTS[0], target_new=None)])
    with pytest.raises(FactError, match="The model says"):
        does_localization_inform_editing(lm, [replace(FACTS[0], target_true=FACTS[0].target_new or "")])
    with pytest.raises(FactError, match="no fact to edit"):
        does_localization_inform_editing(lm, [])
