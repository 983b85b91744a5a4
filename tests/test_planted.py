"""Places that are known: the tiny planted model from end to end, and what its numbers must be by construction."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest

import analyses.planted as module
from analyses.answers import log_p
from analyses.locating_effectiveness import ground_truth
from analyses.planted import PAPERS, LocatorName, band_of, chart, planted, summary
from tests.examples import EIFFEL, tiny_lm
from workbench.charts import CellPlot, DotPlot, LinePlot
from workbench.editors.rome import Rome
from workbench.facts import FactError
from workbench.loading import load
from workbench.locators import all_locators, locator_named
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
        return planted(
            organism(), FACTS, locators=("LogitLens", "RepresentationZeroing"), editors=("ROME", "FT"), probes=1, inserted=1,
            layers=(0,), resamples=50, store=Store(folder=folder),
        )  # fmt: skip


def test_every_locator_has_a_way_its_paper_reads_it() -> None:
    assert set(PAPERS) == set(get_args(LocatorName)) == set(all_locators())


def test_the_band_is_that_of_the_bundled_model() -> None:
    assert band_of("somewhere/organism-mid") == range(4, 7)
    assert band_of("organism-plain") is None
    assert band_of("gpt2") is None


def test_the_default_reading_is_that_of_ground_truth(result: Result, folder: Path) -> None:
    lm = organism()
    truth = ground_truth(
        lm, FACTS, band=range(1, 2), locators=[locator_named("RepresentationZeroing").fitted(lm)],
        reference=load_facts("organism-tiny"), store=Store(folder=folder),
    )  # fmt: skip
    expected = truth.table.query("method == 'RepresentationZeroing'").set_index("measure")["value"]
    found = result.table.query("part == 'locators' and who == 'RepresentationZeroing' and by == 'default'")
    assert found.set_index("measure")["value"].to_dict() == pytest.approx(
        expected[["hit", "distance", "auc"]].to_dict()
    )
    hits = result.table.query("part == 'locators' and measure == 'hit'").pivot(
        index="who", columns="by", values="value"
    )
    assert (hits["best"] >= hits["default"]).all()


def test_success_at_a_layer_is_that_of_the_editor(result: Result) -> None:
    lm, fact = organism(), FACTS[1]
    each = result.extras["edits"]
    assert len(each) == 2 * len(FACTS) * lm.n_layers
    assert (each["place"] == np.where(each["layer"] < 1, "below", np.where(each["layer"] > 1, "above", "inside"))).all()
    row = each.query("editor == 'ROME' and layer == 1 and fact == @fact.id").iloc[0]
    neighbor = next(one for one in fact.neighbors if one.target != fact.target_new)
    with Rome.fitted(lm, layers=(1,), prefix_lengths=(), essence=())(lm, [fact]).on(lm):
        new, old = log_p(lm, [fact.text] * 2, [fact.target_new or "", fact.target_true])
        theirs, ours = log_p(lm, [neighbor.prompt] * 2, [neighbor.target, fact.target_new or ""])
    assert row["efficacy"] == float(new > old)
    assert row["specificity"] == float(theirs > ours)
    assert row["p_new"] == pytest.approx(float(new.exp()), abs=2e-3)
    means = result.table.query("part == 'editors' and who == 'ROME' and by == 'inside' and measure == 'p_new'")
    assert means["value"].item() == pytest.approx(each.query("editor == 'ROME' and layer == 1")["p_new"].mean())


def test_edits_are_looked_for_where_they_were_made(result: Result) -> None:
    each = result.extras["inserted"]
    assert set(each["editor"]) == {"ROME", "FT"}
    assert set(each["layer"]) == {0}
    assert each["hit"].between(0, 1).all()
    assert ((each["distance"] == 0) == (each["hit"] == 1)).all()
    assert each["untouched"].notna().all()


def test_a_locator_that_points_at_the_change_finds_it(monkeypatch: pytest.MonkeyPatch, result: Result) -> None:
    """Profiles by hand: their peak at layer 0 on the edited model, at layer 2 without the edit."""
    lm = organism()
    own = {("hand", FACTS[0].id): np.array([0.0, 0.0, 1.0, 0.0])}
    edited = {("hand", FACTS[0].id): np.array([1.0, 0.0, 0.5, 0.0])}
    answers = iter([own, edited])
    monkeypatch.setattr(module, "_profiles", lambda located: next(answers))
    monkeypatch.setattr(module, "_asked_of", lambda *_: result_of(pd.DataFrame({"left_out": [0]})))
    found = module._inserted(lm, FACTS[:1], FACTS, [], ("FT",), [0], None, None, {}, None)  # type: ignore[arg-type]
    assert found[["hit", "distance", "untouched"]].to_numpy().tolist() == [[1.0, 0.0, 0.0]]


def test_a_locator_that_cannot_follow_an_edit_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pd.DataFrame({"method": ["CausalTrace"], "left_out": [1], "reason": ["No effect."]})
    monkeypatch.setattr(module, "_profiles", lambda located: {})
    monkeypatch.setattr(module, "_asked_of", lambda *_: result_of(refused))
    left_out: dict[str, str] = {}
    module._inserted(organism(), FACTS[:1], FACTS, [], ("FT",), [0], None, None, left_out, None)  # type: ignore[arg-type]
    assert left_out == {f"CausalTrace after FT at 0: {FACTS[0].id}": "No effect."}


def result_of(methods: pd.DataFrame) -> Any:
    """What was located, as far as its methods."""
    return SimpleNamespace(methods=methods)


@pytest.mark.parametrize(
    ("span", "place"),
    [((0, 4), "below"), ((2, 5), "across"), ((4, 7), "inside"), ((6, 9), "across"), ((7, 10), "above")],
)
def test_a_window_that_touches_the_band_is_not_below_it(span: tuple[int, int], place: str) -> None:
    assert module.place_of(range(*span), range(4, 7)) == place


def test_the_subject_is_one_of_the_ways_to_read_a_map(result: Result) -> None:
    each = result.extras["locators"]
    assert set(each.loc[each["method"] == "RepresentationZeroing", "tokens"]) == set(module.TOKENS)


def test_chart_and_summary(result: Result) -> None:
    drawn = chart(result)
    dots, works, stays, cells = drawn.plots
    assert isinstance(dots, DotPlot)
    assert dots.lines == {"chance": 0.25}
    assert isinstance(works, LinePlot)
    assert isinstance(stays, LinePlot)
    assert works.shade == stays.shade == range(1, 2)
    assert isinstance(cells, CellPlot)
    assert list(cells.values.columns) == ["ROME at 0", "FT at 0"]
    text = summary(result)
    assert "planted layers 1 to 1" in text
    assert "efficacy: below" in text
    assert "without the edit" in text


def test_a_model_without_planted_layers_is_asked_for_edits_alone(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    fact = replace(EIFFEL, target_true="Paris")
    found = planted(lm, [fact], locators=("LogitLens",), editors=("FT",), layers=(1,), store=Store(folder=tmp_path))
    assert set(found.table["part"]) == {"inserted"}
    assert "no planted layers" in found.run["note"]
    assert "no planted layers" in summary(found)
    assert len(chart(found).plots) == 1


def test_refusals() -> None:
    with pytest.raises(FactError, match="target_new"):
        planted(organism(), [replace(FACTS[0], target_new=None)])
    with pytest.raises(FactError, match="Layer 9"):
        planted(organism(), FACTS, layers=(9,))
