"""The most changed columns in words: a change put there by hand is found and read; Hit@k against a slow count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyses.changed_columns_to_vocabulary import (
    _read,
    changed_columns_to_vocabulary,
    changed_layers,
    chart,
    most_changed,
    summary,
    token_ranks,
)
from tests.examples import EIFFEL, tiny_lm
from tests.test_edits import edit_of
from workbench import zoo
from workbench.charts import DotPlot
from workbench.editors import Edit
from workbench.editors._values import down_path, down_weight
from workbench.errors import InputError
from workbench.facts import FactError
from workbench.loading import load
from workbench.models import LM
from workbench.results import Result
from workbench.store import Store

LAYER, NEURON, OTHER = 2, 7, 31


def written(lm: LM) -> tuple[Edit, torch.Tensor]:
    """Into one neuron the direction that says the new answer, into another one half as much of nothing."""
    token = lm.target_ids(EIFFEL.text, EIFFEL.target_new or "")[0]
    says = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    delta = torch.zeros(lm.d_model, lm.d_mlp)
    delta[:, NEURON] = 10 * says / says.norm()
    delta[:, OTHER] = torch.ones(lm.d_model) * 5 / lm.d_model**0.5
    down = lm.part(LAYER, lm.layout.down_proj)
    change = delta if isinstance(down, nn.Linear) else delta.T
    return Edit(base=lm.weight_hash, changes={f"{down_path(lm, LAYER)}.weight": change}), torch.tensor(token)


def test_the_most_changed_columns_are_those_that_were_changed(family: str) -> None:
    lm = tiny_lm(family)
    edit, _ = written(lm)
    assert changed_layers(lm, edit) == (LAYER,)
    places, before, after = most_changed(lm, edit, (LAYER,), n=2)
    assert places == ((LAYER, NEURON), (LAYER, OTHER))
    assert torch.equal(before, down_weight(lm, LAYER)[:, [NEURON, OTHER]].T.float())
    assert (after - before).norm(dim=1).tolist() == pytest.approx([10, 5], rel=1e-4)


def test_the_farthest_of_several_layers_come_first() -> None:
    lm = tiny_lm("llama")
    names = [f"{down_path(lm, layer)}.weight" for layer in (1, 3)]
    edit = edit_of(lm, *names, rank=1)
    assert changed_layers(lm, edit) == (1, 3)
    places, before, after = most_changed(lm, edit, (1, 3), n=500)
    lengths = (after - before).norm(dim=1)
    assert len(places) == len(set(places)) == 2 * lm.d_mlp  # all of them, where more are asked for than there are
    assert (lengths[:-1] >= lengths[1:]).all()


def test_a_vector_that_says_the_answer_is_read_so() -> None:
    lm = tiny_lm("gpt2")
    token = lm.target_ids(EIFFEL.text, "Rome")[0]
    says = lm.unembed.get_parameter("weight").detach()[token][None].float()
    read = _read(lm, EIFFEL, [(LAYER, NEURON), (LAYER, OTHER)], torch.cat([20 * says, -says]))
    plain = read[read["projection"] == "plain"].set_index("column")
    slow = [
        (lm.unembed.get_parameter("weight").detach() @ vector).argsort(descending=True)
        for vector in (says[0], -says[0])
    ]
    assert plain["rank"].tolist() == [order.tolist().index(token) for order in slow]
    assert plain.loc[1, "rank"] > lm.d_vocab // 2
    assert plain.loc[0, "words"].split(", ")[0] == lm.word(int(slow[0][0])).strip()
    assert set(read["projection"]) == {"plain", "normed"}


def test_ranks_count_larger_values() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert token_ranks(tiny_lm("gpt2"), values, 2).tolist() == [1, 0]


@pytest.fixture(scope="module")
def organism() -> LM:
    return load("organism-tiny", dtype="float32")


def test_hits_are_counts_of_ranks(organism: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    facts, store = zoo.load_facts("organism-tiny")[:40:20], Store(folder=tmp_path / "store")
    found = changed_columns_to_vocabulary(
        organism, facts, editors=("Memit", "FineTune"), columns=3, hits=(1, 40), store=store
    )
    each, table = found.extras["each"], found.table
    assert len(table) == 2 * 2 * 4 * 2 * 2  # editors, projections, readings, any and mean, k
    for row in table.sample(20, random_state=0).itertuples():
        one = each[
            (each["editor"] == row.editor) & (each["projection"] == row.projection) & (each["reading"] == row.reading)
        ]
        hit = [[rank < row.k for rank in one.loc[one["fact"] == fact, "rank"]] for fact in one["fact"].unique()]
        assert all(len(own) == 3 for own in hit)
        expected = np.mean([any(own) if row.over == "any" else np.mean(own) for own in hit])
        assert row.value == pytest.approx(expected)
        assert row.n == len(hit)
    moved = each.groupby("reading")["moved"]
    assert moved.count()["random"] == 0
    assert (moved.min()[["before", "after", "change"]] > 0).all()
    plots = chart(found).plots
    assert len(plots) == 4
    assert isinstance(plots[0], DotPlot)
    assert set(plots[0].rows["series"]) == {"before", "after", "random"}
    again = Result.load(found.save(tmp_path / "found"))
    assert summary(again) == summary(found)
    assert "Hit@40" in summary(found)
    acting = changed_columns_to_vocabulary(
        organism, facts, editors=("Memit",), columns=3, hits=(1, 40), acting=True, successful=False, store=store
    )
    turned = acting.extras["each"].merge(each, on=["editor", "fact", "projection", "reading", "layer", "neuron"])
    turned = turned[turned["reading"] != "random"]
    assert (turned["rank_x"] == turned["rank_y"]).any()
    assert (turned["rank_x"] != turned["rank_y"]).any()
    pd.testing.assert_series_equal(turned["moved_x"], turned["moved_y"], check_names=False)


def test_what_cannot_be_read_is_told(organism: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    fact = zoo.load_facts("organism-tiny")[0]
    with pytest.raises(InputError, match="no down projection"):
        changed_columns_to_vocabulary(organism, [fact], editors=("Ike",))
    with pytest.raises(FactError, match="expected 1 or more"):
        changed_columns_to_vocabulary(organism, [fact], columns=0)
    with pytest.raises(InputError, match="target_new"):
        changed_columns_to_vocabulary(organism, [replace(fact, target_new=None)], editors=("FineTune",))
