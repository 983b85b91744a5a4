"""Traces before and after an edit: equal to those of a model with these weights; never mistaken for each other in a store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses import trace_before_after as module
from analyses.trace_before_after import RUNS, chart, fact_chart, summary, trace_before_after, trace_edited
from tests.examples import EIFFEL, JOBS, fresh_lm, tiny_lm
from tests.footprints import footprint
from tests.test_edits import Doubling, Saying, dense, edit_of
from workbench.charts import CellPlot
from workbench.edits import Edit, EditError
from workbench.facts import FactError
from workbench.loading import load
from workbench.locators import locate
from workbench.locators.causal_trace import CausalTrace
from workbench.metrics import Answer
from workbench.models import LM
from workbench.results import Footprint, Result
from workbench.store import Store
from workbench.zoo import load_facts

TRACE = CausalTrace(kinds=("mlp_out",), window=1, samples=2, noise="0.5", score="logp")


@pytest.fixture(scope="module")
def result() -> Result:
    lm, facts = load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[:2]
    return trace_before_after(lm, facts, editors=("FineTune",), samples=3)


def values(found: Footprint) -> np.ndarray:
    numbers: np.ndarray = found.grid(kind="mlp_out").to_numpy()
    return numbers


def down(lm: LM) -> str:
    return f"{lm.layout.blocks}.2.{lm.layout.down_proj}.weight"


def test_the_map_of_an_edited_model_is_that_of_a_model_with_these_weights() -> None:
    lm, other = tiny_lm("llama"), fresh_lm("llama")
    edit = edit_of(lm, down(lm), scale=0.5)
    with torch.no_grad():
        other.model.get_parameter(down(lm)).add_(dense(edit, down(lm)))
    own = locate(TRACE, other, [EIFFEL])
    assert np.allclose(values(trace_edited(lm, TRACE, EIFFEL, edit)), values(own), atol=1e-5)
    assert not np.allclose(values(locate(TRACE, lm, [EIFFEL])), values(own), atol=1e-3)


def test_an_edit_that_does_nothing_leaves_the_map_as_it_was() -> None:
    lm = tiny_lm("llama")
    nothing = Doubling(module=down(lm).removesuffix(".weight"), factor=torch.tensor(1.0))
    edit = Edit(base=lm.weight_hash, sides=(nothing,), facts=(EIFFEL,))
    assert np.allclose(values(trace_edited(lm, TRACE, EIFFEL, edit)), values(locate(TRACE, lm, [EIFFEL])), atol=1e-5)


def test_a_store_never_takes_one_map_for_another(tmp_path: Path) -> None:
    lm, store = tiny_lm("llama"), Store(folder=tmp_path)
    memory = Doubling(module=down(lm).removesuffix(".weight"), factor=torch.tensor(3.0))
    stronger = replace(memory, factor=torch.tensor(9.0))
    text = Saying(text="Imagine that. ")
    edits = [edit_of(lm, down(lm), scale=0.5), edit_of(lm, down(lm), seed=1, scale=0.5)]
    edits += [Edit(base=lm.weight_hash, sides=(side,), facts=(EIFFEL,)) for side in (memory, stronger, text)]
    plain = locate(TRACE, lm, [EIFFEL], store=store)
    fresh = [trace_edited(lm, TRACE, EIFFEL, edit) for edit in edits]
    for _ in range(2):  # computed, then found
        for edit, expected in zip(edits, fresh, strict=True):
            found = trace_edited(lm, TRACE, EIFFEL, edit, store=store)
            pd.testing.assert_frame_equal(found.table, expected.table)
        again = locate(TRACE, lm, [EIFFEL], store=store)
        pd.testing.assert_frame_equal(again.table, plain.table)
    for first in range(len(fresh)):
        assert not fresh[first].table.equals(plain.table)
        for second in range(first):
            assert not fresh[first].table.equals(fresh[second].table)
    assert len(list(tmp_path.glob("*/run.json"))) == 1 + len(edits)


def test_what_is_on_the_model_already_tells_maps_apart(tmp_path: Path) -> None:
    lm, store = tiny_lm("llama"), Store(folder=tmp_path)
    memory = Doubling(module=down(lm).removesuffix(".weight"), factor=torch.tensor(3.0))
    below = Edit(base=lm.weight_hash, sides=(memory,), facts=(EIFFEL,))
    edit = edit_of(lm, down(lm), scale=0.5)
    alone = trace_edited(lm, TRACE, EIFFEL, edit, store=store)
    with below.on(lm):
        both = trace_edited(lm, TRACE, EIFFEL, edit, store=store)
    assert not alone.table.equals(both.table)


def test_a_stored_map_is_refused_for_another_model(tmp_path: Path) -> None:
    lm, other = tiny_lm("llama"), tiny_lm("llama", seed=1)
    edit = edit_of(lm, down(lm))
    with pytest.raises(EditError, match="was made on weights"):
        trace_edited(other, TRACE, EIFFEL, edit, store=Store(folder=tmp_path))


def test_the_difference_is_that_of_the_maps_at_the_tokens_they_share() -> None:
    before, after = (footprint(kinds=("mlp_out",), seed=seed) for seed in (0, 1))
    longer = footprint(("So", ".", *before.tokens()["text"]), subject=(3, 6), kinds=("mlp_out",), seed=2)
    maps = {"before": before, "after_new": after, "after_old": longer}
    cells = module._cells(maps)
    assert set(cells["position"]) == set(range(-9, 0))
    grids = {run: own.pivot(index="position", columns="layer", values="value") for run, own in cells.groupby("run")}
    assert np.allclose(
        grids["difference"], after.grid(kind="mlp_out").to_numpy() - before.grid(kind="mlp_out").to_numpy()
    )
    assert np.allclose(grids["after_old"], longer.grid(kind="mlp_out").to_numpy()[2:])
    last = cells[cells["position"] == -1]
    assert set(last["token"]) == {"last"}
    assert set(last["text"]) == {" of"}


def test_a_fact_that_went_from_the_bottom_to_the_edit_has_moved_there() -> None:
    lm = tiny_lm("gpt2")
    edit = edit_of(lm, "transformer.h.3.mlp.c_proj.weight")

    def at(layer: int, size: float) -> Footprint:
        found = footprint(kinds=("mlp_out",), n_layers=4)
        table = found.table.assign(value=np.where(found.table["layer"] == layer, size, -0.1))
        return replace(found, table=table)

    maps = {"before": at(0, 0.8), "after_new": at(3, 0.5), "after_old": at(0, 0.2)}
    told = module._moved(lm, maps, module._cells(maps), edit)
    assert (told["peak_before"], told["peak_after"], told["edited_layers"]) == (0, 3, "3")
    assert told["shift"] == pytest.approx(3)
    assert (told["edited_before"], told["edited_after"]) == pytest.approx((0, 1))
    assert told["old_left"] == pytest.approx(0.25)
    assert told["alike"] == pytest.approx(-1 / 3, abs=1e-6)
    same = {run: at(1, 0.5) for run in maps}
    told = module._moved(lm, same, module._cells(same), edit)
    assert (told["shift"], told["old_left"], told["alike"]) == pytest.approx((0, 1, 1))


def test_old_and_new_answers_are_traced(result: Result) -> None:
    table, moved = result.table, result.extras["moved"]
    assert set(table["run"]) == set(RUNS)
    grids = {
        run: own.set_index(["fact", "layer", "position"])["value"].sort_index() for run, own in table.groupby("run")
    }
    assert np.allclose(grids["difference"], grids["after_new"] - grids["before"])
    assert (
        moved["total_new"] > 5 * moved["total_old"]
    ).all()  # the edited model says the new answer, and the old one no more
    assert (moved["total_old"] < 0.2 * moved["total_before"]).all()
    lm, fact = load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[0]
    trace = CausalTrace.fitted(lm, kinds=("mlp_out",), samples=3).resolved(lm, load_facts("organism-tiny"))
    own = locate(trace, lm, [fact]).table["value"].to_numpy()
    assert np.allclose(table[(table["fact"] == fact.id) & (table["run"] == "before")]["value"], own)


def test_an_answer_that_is_not_named_is_the_one_before_the_edit(result: Result, tmp_path: Path) -> None:
    lm, store = load("organism-tiny", dtype="float32"), Store(folder=tmp_path)
    fact = replace(load_facts("organism-tiny")[0], target_true="")  # the model knows it, and so says it
    for _ in range(2):  # computed, then found
        found = trace_before_after(lm, [fact], editors=("FineTune",), samples=3, store=store)
        expected = result.table[result.table["fact"] == fact.id]
        for run in RUNS:
            own, named = (table.loc[table["run"] == run, "value"] for table in (found.table, expected))
            assert np.allclose(own, named, atol=1e-5), run


def test_an_answer_that_cannot_be_written_after_the_prompt_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    [comma] = lm.tokenizer.encode(",")  # after a space, another token
    monkeypatch.setattr(module, "find_answer", lambda *_: Answer(text=",", ids=(comma,)))
    with pytest.raises(FactError, match=r"goes on with ',' after 'The Eiffel .* Give the fact a target_true"):
        module._answers(lm, replace(EIFFEL, target_true=""))


def test_means_and_roles_are_those_of_the_rows(result: Result, tmp_path: Path) -> None:
    again = Result.load(result.save(tmp_path / "r"))
    means = again.extras["means"].set_index("measure")
    assert means.loc["shift", "value"] == pytest.approx(again.extras["moved"]["shift"].mean())
    assert (means["n"] == 2).all()
    row = again.extras["roles"].query("run == 'before' and token == 'subject_last' and layer == 1").iloc[0]
    own = again.table.query("run == 'before' and token == 'subject_last' and layer == 1")
    assert row["value"] == pytest.approx(own.groupby("fact")["value"].mean().mean())
    assert "is carried" in summary(again)
    whole, one = chart(again), fact_chart(again, fact=again.table["fact"].iloc[0])
    for figure in (whole, one):
        assert len(figure.plots) == 4
        for plot in figure.plots:
            assert isinstance(plot, CellPlot)
            assert plot.values.columns.tolist() == [*range(4)]
            assert plot.values.notna().all().all()
        assert "count from 0" in figure.caption
    with pytest.raises(FactError, match="no fact 'nobody'"):
        fact_chart(again, fact="nobody")


def test_what_cannot_be_edited_is_told(tmp_path: Path) -> None:
    lm, store = tiny_lm("gpt2"), Store(folder=tmp_path)
    found = trace_before_after(lm, [EIFFEL, JOBS], editors=("FineTune",), samples=2, store=store)
    assert "no target_new" in found.run["left_out"]["FineTune: jobs"]
    assert found.extras["moved"]["fact"].tolist() == ["eiffel"]
    assert found.extras["means"]["low"].isna().all()
    with pytest.raises(FactError, match="No fact could be edited and traced"):
        trace_before_after(lm, [JOBS], editors=("FineTune",), store=store)
