"""Located and edited mass: the measures against slow ones, the tests against chance, and what the analysis says of small models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from analyses import located_vs_edited as module
from analyses.editing import fitted_editors
from analyses.located_vs_edited import MEASURES, chart, compare, fact_chart, located_vs_edited, masses, summary
from tests.examples import EIFFEL, JOBS, MESSI, tiny_lm
from tests.test_edits import Doubling, Saying, edit_of
from workbench.charts import CellPlot, LinePlot
from workbench.edit_footprints import functional_footprint, weight_footprint
from workbench.edits import Edit
from workbench.facts import FactError
from workbench.loading import load
from workbench.profiles import layer_profiles
from workbench.results import Result
from workbench.store import Store
from workbench.zoo import load_facts

QUICK: dict[str, Any] = {
    "locators": ("ActivationPatching", "DirectLogitAttribution"), "editors": ("FineTune",), "permutations": 99,
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> Result:
    return located_vs_edited(load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[:3], **QUICK)


# --- measures ---


def test_mass_is_what_is_above_zero_and_adds_up_to_one() -> None:
    assert masses(np.array([[1.0, -5.0, 3.0], [0.0, 0.0, 2.0]])).tolist() == [[0.25, 0.0, 0.75], [0.0, 0.0, 1.0]]
    assert np.isnan(masses(np.array([-1.0, 0.0]))).all()


def test_the_measures_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    first, second = masses(rng.normal(size=(20, 9))), masses(rng.normal(size=(20, 9)))
    found = compare(first, second)
    layers = np.arange(9)
    for i in range(20):
        a, b = first[i], second[i]
        assert found["spearman"][i] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert found["earth_mover"][i] == pytest.approx(stats.wasserstein_distance(layers, layers, a, b))
        assert found["overlap"][i] == pytest.approx(1 - 0.5 * np.abs(a - b).sum())
        assert found["peak_distance"][i] == abs(int(a.argmax()) - int(b.argmax()))


def test_equal_profiles_are_as_close_as_can_be_and_distant_peaks_are_as_far_as_layers_lie() -> None:
    one = masses(np.array([1.0, 2.0, 4.0]))
    assert {name: float(value) for name, value in compare(one, one).items()} == pytest.approx(
        {"overlap": 1, "spearman": 1, "earth_mover": 0, "peak_distance": 0}
    )
    low, high = np.eye(6)[[0, 5]]
    far = compare(low, high)
    assert [float(far[name]) for name in ("overlap", "earth_mover", "peak_distance")] == [0, 5, 5]
    assert np.isnan(compare(np.full(4, 0.25), np.eye(4)[0])["spearman"])


# --- chance ---


def test_of_a_single_peak_the_p_is_one_over_the_number_of_layers() -> None:
    peaks = np.tile(np.eye(8)[3], (5, 1))
    told = module._chance(peaks, peaks, permutations=4000, seed=0)
    assert told["overlap"]["p"] == pytest.approx(1 / 8, abs=0.02)
    assert told["peak_distance"]["p"] == pytest.approx(1 / 8, abs=0.02)


def test_the_same_edit_for_all_facts_says_nothing_about_one() -> None:
    rng = np.random.default_rng(1)
    located = masses(rng.random((6, 8)))
    same = np.tile(np.eye(8)[2], (6, 1))
    for told in module._chance(located, same, permutations=200, seed=0).values():
        assert told["p_fact"] == 1


def test_an_edit_that_follows_its_fact_is_told_from_others() -> None:
    each = np.eye(8)[[0, 2, 5, 7, 1, 3, 6]]
    told = module._chance(each, each, permutations=999, seed=0)
    assert told["overlap"]["p_fact"] < 0.01
    assert told["overlap"]["others"] == 0
    assert told["earth_mover"]["p_fact"] < 0.01
    assert told["earth_mover"]["others"] > 2


def test_random_profiles_have_even_p_values() -> None:
    rng = np.random.default_rng(2)
    p = [
        module._chance(masses(rng.random((3, 7))), masses(rng.random((3, 7))), permutations=99, seed=i)["overlap"]["p"]
        for i in range(60)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01


# --- what is edited ---


def test_edited_mass_of_weights_is_the_relative_norm_of_a_layer(family: str) -> None:
    lm = tiny_lm(family)
    names = [f"{lm.layout.blocks}.{layer}.{lm.layout.down_proj}.weight" for layer in (1, 3)]
    edit = edit_of(lm, *names)
    rows = module._by_weights(lm, edit).set_index("layer")["value"]
    footprint = weight_footprint(lm, edit).table.set_index("layer")["value"]
    assert rows.to_dict() == pytest.approx(footprint.to_dict())
    assert (rows[[0, 2]] == 0).all()
    assert module.changed_layers(lm, edit) == {1, 3}


def test_matrices_of_one_layer_count_together() -> None:
    lm = tiny_lm("llama")
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    edit = edit_of(lm, *names)
    rows = module._by_weights(lm, edit)
    new = sum(float(torch.as_tensor(edit.changes[name]).norm()) ** 2 for name in names)
    old = sum(float(lm.model.get_parameter(name).detach().norm()) ** 2 for name in names)
    assert rows["value"].tolist() == pytest.approx([0, (new / old) ** 0.5, 0, 0], rel=1e-5)
    assert rows["kind"].unique().tolist() == ["mlp_out + z"]


def test_what_changes_no_weight_is_read_from_activations() -> None:
    lm = tiny_lm("llama")
    memory = Doubling(module="model.layers.1.mlp.down_proj", factor=torch.tensor(2.0))
    said = Saying(text="Imagine that. ")
    for side in (memory, said):
        edit = Edit(base=lm.weight_hash, sides=(side,), facts=(EIFFEL,))
        rows = module._by_activations(lm, edit, "mlp_out")
        profile = layer_profiles([functional_footprint(lm, edit)], kinds=["mlp_out"])
        assert rows["value"].tolist() == profile["value"].tolist()
    assert module.changed_layers(lm, Edit(base=lm.weight_hash, sides=(memory,))) == {1}
    assert module._by_activations(lm, Edit(base=lm.weight_hash, sides=(memory,), facts=(EIFFEL,)), "mlp_out")[
        "value"
    ].tolist()[:2] == pytest.approx([0, 1])


# --- the whole ---


def test_every_profile_is_one_fact_and_one_method_and_adds_up_to_one(result: Result) -> None:
    table = result.table
    assert list(table.columns) == ["fact", "layer", "kind", "method", "located", "edited", "value", "source"]
    assert (table["located"].isna() != table["edited"].isna()).all()
    mass = table["located"].fillna(table["edited"])
    sums = mass.groupby([table["fact"], table["method"], table["kind"]]).sum()
    assert np.allclose(sums, 1)
    assert set(table.loc[table["edited"].notna(), "source"]) == {"weights"}
    agreement = result.extras["agreement"]
    assert set(agreement["measure"]) == set(MEASURES)
    assert (agreement["n"] == 3).all()
    assert agreement["value"].between(agreement["low"] - 1e-9, agreement["high"] + 1e-9).all()
    assert (agreement["p_fact"] == 1).all()  # one layer for all facts
    assert (result.extras["places"].query("side == 'edited'")["planted"] == 1).all()


def test_the_agreement_is_that_of_the_table(result: Result) -> None:
    table = result.table
    a = table[table["method"] == "ActivationPatching"].pivot(index="fact", columns="layer", values="located")
    b = table[table["method"] == "FineTune"].pivot(index="fact", columns="layer", values="edited").loc[a.index]
    row = result.extras["agreement"].query("locator == 'ActivationPatching' and measure == 'earth_mover'").iloc[0]
    assert row["value"] == pytest.approx(compare(a.to_numpy(), b.to_numpy())["earth_mover"].mean())


def test_what_is_drawn_is_above_and_below_the_axis(result: Result) -> None:
    first, *matrices = chart(result).plots
    assert isinstance(first, LinePlot)
    assert first.shade == range(1, 2)
    down = first.rows["series"].str.startswith("edited")
    assert (first.rows.loc[down, "y"] <= 0).all()
    assert (first.rows.loc[~down, "y"] >= 0).all()
    assert (first.rows["low"] <= first.rows["y"] + 1e-9).all()
    assert (first.rows["high"] >= first.rows["y"] - 1e-9).all()
    assert len(matrices) == len(MEASURES)
    for plot in matrices:
        assert isinstance(plot, CellPlot)
        assert plot.values.shape == (2, 1)
        assert plot.texts is not None
        assert plot.texts.shape == (2, 1)
    assert "0-based" in chart(result).caption
    assert "settings, not measurements" in summary(result)


def test_one_fact_has_a_chart_of_its_own(result: Result, tmp_path: Path) -> None:
    again = Result.load(result.save(tmp_path / "r"))
    fact = again.table["fact"].iloc[0]
    lines, cells = fact_chart(again, fact=fact).plots
    assert isinstance(lines, LinePlot)
    assert isinstance(cells, CellPlot)
    assert np.allclose(lines.rows.groupby("series")["y"].sum().abs(), 1)
    with pytest.raises(FactError, match="no fact 'nobody'"):
        fact_chart(again, fact="nobody")


def test_activations_tell_facts_apart_where_weights_do_not() -> None:
    lm, facts = load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[:3]
    found = located_vs_edited(lm, facts, **{**QUICK, "reading": "activations"})
    edited = found.table[found.table["edited"].notna()]
    assert set(edited["source"]) == {"activations"}
    assert edited.groupby("layer")["edited"].nunique().max() == 3
    assert (edited.loc[edited["layer"] < 1, "edited"] == 0).all()
    assert "settings" not in summary(found)


def test_who_chose_the_layers_is_told() -> None:
    lm = tiny_lm("gpt2")
    editors = fitted_editors(lm, ("Rome", "FineTune"))
    assert not module._is_set(editors["Rome"])  # no preset, so it traces
    assert module._is_set(editors["FineTune"])
    assert module._is_set(replace(editors["Rome"], layers=(1,)))  # type: ignore[call-arg]


def test_what_cannot_be_located_or_edited_is_told_and_nothing_at_all_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    facts = [EIFFEL, replace(MESSI, target_new="Rome"), JOBS]  # one has no new answer
    options: dict[str, Any] = {**QUICK, "locators": ("DirectLogitAttribution", "AttentionKnockout"), "permutations": 9}
    found = located_vs_edited(lm, facts, store=Store(folder=tmp_path), **options)
    assert "no target_new" in found.run["left_out"]["FineTune: jobs"]
    assert set(found.extras["agreement"]["locator"]) == {"DirectLogitAttribution"}  # the other one has no MLP outputs
    assert "mlp_out" in found.run["left_out"]["AttentionKnockout: eiffel"]
    assert (found.extras["agreement"]["n"] == 2).all()
    with pytest.raises(FactError, match="both located and edited"):
        located_vs_edited(lm, [JOBS], store=Store(folder=tmp_path), **options)
    with pytest.raises(FactError, match="No editor is called"):
        located_vs_edited(lm, facts, **{**options, "editors": ("Nobody",)})
    with pytest.raises(FactError, match="No locating method is called"):
        located_vs_edited(lm, facts, **{**options, "locators": ("Nobody",)})


def test_a_single_fact_has_values_without_intervals() -> None:
    lm = tiny_lm("gpt2")
    found = located_vs_edited(lm, [EIFFEL], **{**QUICK, "locators": ("DirectLogitAttribution",)})
    agreement: pd.DataFrame = found.extras["agreement"]
    assert agreement["low"].isna().all()
    assert agreement["p_fact"].isna().all()
    assert agreement["value"].notna().all()
    assert "overlap" in summary(found)
    assert isinstance(chart(found).plots[0], LinePlot)
