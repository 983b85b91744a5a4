"""Which layers to edit: the sweep against single edits, the score against a plain mean, and files that are read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analyses import layers_to_edit as module
from analyses.edit_quality import edit_quality
from analyses.layers_to_edit import chart, harmonic, layers_to_edit, summary, write_recommended
from tests.examples import EIFFEL, tiny_lm
from tests.test_edits import edit_of
from workbench.charts import LinePlot
from workbench.easyedit import read_hparams
from workbench.editors.alpha_edit import AlphaEdit
from workbench.editors.fine_tune import FineTune
from workbench.editors.lora import Lora
from workbench.editors.memit import Memit
from workbench.editors.recommending import recommend_layers
from workbench.editors.rome import Rome
from workbench.edits import EditError
from workbench.facts import FactError
from workbench.loading import load
from workbench.results import Result
from workbench.store import Store
from workbench.zoo import load_facts


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    lm, facts = load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[:3]
    store = Store(folder=tmp_path_factory.mktemp("store"))
    return layers_to_edit(lm, facts, editors=("FineTune",), sweep_facts=2, store=store)


def test_the_score_is_the_harmonic_mean_of_what_is_there() -> None:
    values = np.array([[0.5, 1.0, 0.25], [1.0, 0.0, 1.0], [0.5, np.nan, 1.0], [np.nan, np.nan, np.nan]])
    found = harmonic(values)
    assert found[0] == pytest.approx(stats.hmean(values[0]))
    assert found[1] == 0
    assert found[2] == pytest.approx(stats.hmean([0.5, 1.0]))
    assert np.isnan(found[3])


def test_every_place_is_edited_and_scored_as_a_single_edit_is(result: Result) -> None:
    lm, facts = load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[:3]
    table = result.table
    assert len(table) == 4 * 2
    editor = replace(FineTune.fitted(lm), layers=(2,))
    fact = next(fact for fact in facts if fact.id == table["fact"].iloc[0])
    other = edit_quality(lm, [fact], {"FineTune": editor}).table.iloc[0]
    own = table[(table["first"] == 2) & (table["fact"] == fact.id)].iloc[0]
    assert own[["efficacy", "paraphrase", "neighborhood"]].tolist() == pytest.approx(
        other[["efficacy", "paraphrase", "neighborhood"]].tolist()
    )
    same = [other["neighborhood_same"]] * len(fact.neighbors[:5]) + [other["other_same"]] * len(fact.locality[:5])
    assert own["specificity"] == pytest.approx(np.mean(same))


def test_the_trace_recommends_what_editors_take_themselves(result: Result) -> None:
    lm, facts = load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[:3]
    own = recommend_layers(lm, facts, n=1)
    row = result.extras["recommended"].set_index("by").loc["trace"]
    assert row["layers"] == str(own.layers[0])
    curve = result.extras["curve"]
    assert curve["value"].tolist() == pytest.approx(own.curve["value"].tolist())
    assert (curve["low"] <= curve["value"]).all()
    assert (curve["high"] >= curve["value"]).all()


def test_the_sweep_recommends_the_best_place(result: Result) -> None:
    places = result.extras["places"]
    row = result.extras["recommended"].set_index("by").loc["sweep"]
    best = places["score"].max()
    assert places.loc[places["score"] == best, "first"].min() == int(row["layers"])
    assert row["score"] <= best, "a fact is scored where the others are edited best"
    assert 1 <= row["as_good"] <= row["of"] == 4
    means = result.table.groupby("first")[["efficacy", "paraphrase", "neighborhood"]].mean()
    assert places.set_index("first")["score"].to_dict() == pytest.approx(
        {int(str(first)): stats.hmean(row) for first, row in zip(means.index, means.to_numpy(), strict=True)}
    )


def test_of_equal_places_the_lower_one_is_taken_and_worse_ones_are_told() -> None:
    rows = [
        {"editor": "A", "first": first, "last": first + 1, "fact": fact, "efficacy": 1.0, "paraphrase": value,
         "neighborhood": 1.0, "specificity": 1.0}
        for first, value in ((0, 0.2), (1, 0.9), (2, 0.9)) for fact in "abc"
    ]  # fmt: skip
    places = module._places(pd.DataFrame(rows), resamples=100, seed=0)
    assert module._best(places, "A") == [1, 2]
    told = module._score_at(places, "A", [0, 1])
    assert told["score"] == pytest.approx(stats.hmean([1, 0.2, 1]))
    assert (told["as_good"], told["of"]) == (2, 3)


def test_no_fact_is_scored_at_a_place_that_it_has_chosen() -> None:
    """Each fact is edited well at a place of its own alone, so the others choose wrong for it."""
    rows = [
        {"editor": "A", "first": first, "last": first, "fact": fact, "efficacy": 1.0, "paraphrase": value,
         "neighborhood": 1.0, "specificity": 1.0}
        for first, well in enumerate("abc") for fact in "abc" for value in [1.0 if fact == well else 0.1]
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    assert module._places(table, resamples=10, seed=0)["score"].tolist() == pytest.approx(
        [stats.hmean([1, 0.4, 1])] * 3
    )
    held = module._chosen_by_others(table, resamples=10, seed=0)
    assert held["score"] == pytest.approx(stats.hmean([1, 0.1, 1]))
    single = module._chosen_by_others(table[table["fact"] == "a"], resamples=10, seed=0)
    assert np.isnan(single["score"])


def test_the_files_are_read_back_as_the_editor_at_these_layers(result: Result, tmp_path: Path) -> None:
    again = Result.load(result.save(tmp_path / "r"))
    (path,) = write_recommended(again, tmp_path / "hparams")
    row = again.extras["recommended"].set_index("by").loc["sweep"]
    read = read_hparams(path).editor
    assert isinstance(read, FineTune)
    assert path.name == "FineTune.yaml"
    assert read.layers == (int(row["layers"]),)
    assert read.learning_rate == FineTune.fitted(load("organism-tiny", dtype="float32")).learning_rate
    none = replace(again, extras={**again.extras, "recommended": again.extras["recommended"].assign(yaml="")})
    with pytest.raises(EditError, match="EasyEdit has none"):
        write_recommended(none, tmp_path / "none")


def test_windows_are_as_wide_as_the_editor_and_files_have_them_all() -> None:
    lm = load("organism-tiny", dtype="float32")
    widths: list[tuple[Any, int]] = [
        (Memit(layers=(1, 2)), 2), (Memit(), 1), (Rome(), 1), (FineTune(), 1), (AlphaEdit(layers=(0, 1, 2)), 3), (Lora(), 4),
    ]  # fmt: skip
    for editor, width in widths:
        assert module._width(lm, editor, [EIFFEL]) == width
    assert "layers: [1, 2]" in module._yaml(lm, Memit(layers=(0, 1)), (1, 2))
    assert module._quick(Rome(), 2).prefix_lengths == (5, 5)
    assert module._quick(Rome(), None) == Rome()
    assert module._quick(FineTune(), 0) == FineTune()


def test_figure_and_words_say_the_same(result: Result) -> None:
    trace, score, efficacy, specificity = chart(result).plots
    for plot in (trace, score, efficacy, specificity):
        assert isinstance(plot, LinePlot)
        assert plot.by_layer
        assert plot.shade == range(1, 2)
        assert plot.rows["x"].tolist() == [0, 1, 2, 3]
    row = result.extras["recommended"].set_index("by").loc["sweep"]
    assert f"by sweep {row['layers']}: {row['score']:.2f}" in summary(result)
    assert "FineTune" in chart(result).caption


def test_without_old_answers_and_probes_nothing_is_measured_that_is_not_there() -> None:
    lm = tiny_lm("gpt2")
    edit = edit_of(lm, "transformer.h.2.mlp.c_proj.weight")
    found = module._scored(lm, EIFFEL, edit, [], 5)
    assert found["efficacy"] in (0.0, 1.0)
    assert all(np.isnan(found[name]) for name in ("paraphrase", "neighborhood", "specificity"))
    assert all(np.isnan(value) for value in module._scored(lm, replace(EIFFEL, target_true=""), edit, [], 5).values())


def test_what_cannot_be_swept_is_refused_in_a_sentence() -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(FactError, match="KnowledgeNeuronEdit has no layers to choose"):
        layers_to_edit(lm, [EIFFEL], editors=("KnowledgeNeuronEdit",))
    with pytest.raises(FactError, match="sweep_facts is 0"):
        layers_to_edit(lm, [EIFFEL], sweep_facts=0)
    with pytest.raises(FactError, match="No editor was named"):
        layers_to_edit(lm, [EIFFEL], editors=())
    with pytest.raises(FactError, match="No fact could be edited"):
        layers_to_edit(lm, [replace(EIFFEL, target_new=None)], editors=("FineTune",))
