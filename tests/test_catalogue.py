"""Every analysis of the catalogue runs on a bundled model, is drawn on screen and paper, and is found again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analyses.catalogue import all_analyses, analysis_named
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


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(FactError, match="No analysis is called 'nothing'"):
        analysis_named("nothing")
