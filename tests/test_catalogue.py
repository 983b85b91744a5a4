"""Every analysis of the catalogue runs on a bundled model, is drawn on screen and paper, and is found again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analyses.catalogue import LEAST, all_analyses, analysis_named
from workbench import charts_paper, charts_screen, zoo
from workbench.facts import FactError, spread
from workbench.loading import load
from workbench.models import LM
from workbench.results import Result
from workbench.store import Store

ANALYSES = all_analyses()


QUICK = {
    "planted": {"locators": ("CausalTrace", "DirectLogitAttribution"), "editors": ("ROME",), "inserted": 1},
    "layers_to_edit": {"editors": ("Rome", "FineTune"), "sweep_facts": 2},
}
"""Options of those that take long; the others run with their defaults."""


@pytest.fixture(scope="module", autouse=True)
def kept_moments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Second moments are read once for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield


@pytest.fixture(scope="module")
def lm() -> LM:
    """The smallest bundled model."""
    return load("organism-tiny", device="cpu")


def test_the_catalogue_has_what_the_project_is_for() -> None:
    assert {"located_vs_edited", "does_localization_inform_editing", "planted", "lifelong", "forensics"} <= set(
        ANALYSES
    )
    for analysis in ANALYSES.values():
        assert analysis.title.endswith((".", "?")), analysis.name
        assert all(field.help for field in analysis.form), analysis.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_it_runs_is_drawn_and_found_again(name: str, lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path / "results"))
    facts = spread([fact for fact in zoo.load_facts("organism-tiny") if fact.target_new], 3)
    analysis, store, weights = ANALYSES[name], Store(folder=tmp_path / "store"), lm.weight_hash
    options: dict[str, Any] = QUICK.get(name, {})
    result = analysis(lm, facts, store=store, **options)
    assert lm.weight_hash == weights
    assert len(result.table)
    assert result.run["cost"]["seconds"] > 0
    assert "layer" not in result.table or result.table["layer"].dropna().between(-1, lm.n_layers - 1).all()
    again = analysis(lm, facts, store=store, **options)
    assert again.run == result.run
    assert type(again) is Result
    chart = analysis.chart(again)
    assert charts_screen.draw(chart, theme="dark").data
    charts_paper.draw(chart, run=again.run).savefig(tmp_path / "figure.svg")
    assert analysis.summary(again).strip()


@pytest.mark.parametrize("name", ANALYSES)
def test_an_option_that_it_has_not_is_refused(name: str, lm: LM) -> None:
    with pytest.raises(FactError, match="has no option 'nothing'"):
        ANALYSES[name](lm, [], nothing=1)


@pytest.mark.parametrize(
    ("name", "option", "value", "says"),
    [
        ("weight_change", "seed", -1, "seed is -1, expected a whole number from 0 to 4294967295. Give e.g. 0."),
        ("weight_change", "seed", 2**32, "seed is 4294967296"),
        ("weight_change", "seed", "one", "seed is 'one', expected a whole number"),
        ("weight_change", "resamples", 0, "resamples is 0, expected a whole number from 1 on. Give e.g. 2000."),
        ("weight_change", "resamples", None, "resamples is None"),
        ("weight_change", "editors", (), "editors is empty, expected one or more. Name some, e.g. Rome,Memit,"),
        ("weight_change", "editors", "Rome", "editors is 'Rome', expected several"),
        ("planted", "locators", (), "locators is empty"),
        ("planted", "inserted", -1, "inserted is -1"),
        ("planted", "probes", -1, "probes is -1"),
        ("planted", "bound", float("nan"), "bound is nan, expected a number above 0, or none. Give e.g. 0.01."),
        ("planted", "layers", (-1,), "layers is -1, expected whole numbers from 0 on. Give e.g. 0."),
        ("does_localization_inform_editing", "problems", [], "problems is empty"),
        ("does_localization_inform_editing", "bound", 0.0, "bound is 0.0"),
        ("does_localization_inform_editing", "bound", float("inf"), "bound is inf"),
        ("does_localization_inform_editing", "width", 0, "width is 0, expected a whole number from 1 on. Give e.g. 1."),
        ("does_localization_inform_editing", "essence", -1, "essence is -1"),
        ("edit_detection", "folds", 1, "folds is 1, expected a whole number from 2 on. Give e.g. 5."),
        ("edit_detection", "stumps", 0, "stumps is 0"),
        ("forensics", "dropped", (1, 0), "dropped is 0, expected whole numbers from 1 on. Give e.g. 1,2,5."),
        ("forensics", "dropped", (), "dropped is empty"),
        ("forensics", "others", -1, "others is -1"),
        ("layers_to_edit", "sweep_facts", 0, "sweep_facts is 0"),
        ("layers_to_edit", "contexts", -1, "contexts is -1"),
        ("lifelong", "checkpoints", (), "checkpoints is empty"),
        ("lifelong", "held_out", 0, "held_out is 0"),
        ("lifelong", "traced", -1, "traced is -1"),
        ("located_vs_edited", "permutations", 0, "permutations is 0"),
        ("located_vs_edited", "kinds", (), "kinds is empty"),
        ("robustness", "sentences", 0, "sentences is 0"),
        ("robustness", "tokens", 0, "tokens is 0"),
        ("subject_vs_relation", "samples", 0, "samples is 0"),
        ("superposition", "edits", -1, "edits is -1"),
        ("superposition", "keys", (), "keys is empty"),
        ("superposition", "layers", (), "layers is empty, expected one or more"),
        ("superposition", "moment_tokens", 0, "moment_tokens is 0"),
        ("trace_before_after", "width", -2, "width is -2"),
        ("changed_columns_to_vocabulary", "columns", 0, "columns is 0"),
        ("changed_columns_to_vocabulary", "hits", (5, 0), "hits is 0"),
    ],
)  # fmt: skip
def test_a_senseless_value_is_refused_before_anything_else(
    name: str, option: str, value: Any, says: str, lm: LM
) -> None:
    with pytest.raises(FactError) as error:
        ANALYSES[name](lm, [], **{option: value})
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("name", ANALYSES)
def test_the_defaults_and_none_where_it_is_allowed_are_taken(name: str) -> None:
    analysis = ANALYSES[name]
    defaults = {field.name: field.default for field in analysis.form}
    assert analysis.checked(defaults) == defaults
    none = {field.name: None for field in analysis.form if field.optional}
    assert analysis.checked(none) == none


def test_every_whole_number_of_every_analysis_has_a_least_value() -> None:
    numbers = {field.name for one in ANALYSES.values() for field in one.form if field.type in ("integer", "integers")}
    assert numbers <= set(LEAST)


def test_what_is_named_twice_counts_once_and_asks_the_same(lm: LM) -> None:
    analysis = ANALYSES["changed_columns_to_vocabulary"]
    twice: dict[str, Any] = {"hits": [5, 1, 1], "editors": ("Rome", "Memit", "Rome")}
    once: dict[str, Any] = {"hits": (5, 1), "editors": ("Rome", "Memit")}
    assert analysis.checked(twice) == once
    assert analysis.question(lm.protocol, [], twice) == analysis.question(lm.protocol, [], once)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(FactError, match="No analysis is called 'nothing'"):
        analysis_named("nothing")
