"""Subject and relation: what is asked of whom, changes of probability against plain runs, maps against the locator's table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analyses.editing import edit_one, fitted_editors
from analyses.subject_vs_relation import ASKED, chart, maps, prompts_of, subject_vs_relation, summary
from tests.examples import EIFFEL
from workbench import zoo
from workbench.charts import DotPlot, LinePlot
from workbench.errors import InputError
from workbench.facts import FactError, Probe
from workbench.hooks import run
from workbench.loading import load
from workbench.locators.subject_relation import SubjectRelation
from workbench.models import LM
from workbench.results import Result
from workbench.store import Store

FACTS = zoo.load_facts("organism-tiny")[:60:30]


@pytest.fixture(scope="module")
def lm() -> LM:
    return load("organism-tiny", dtype="float32")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(folder=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def found(lm: LM, store: Store) -> Result:
    return subject_vs_relation(lm, FACTS, editors=("FineTune",), samples=2, store=store)


def test_prompts_are_sorted_by_subject_and_relation() -> None:
    fact = replace(
        EIFFEL,
        paraphrases=("To see the Eiffel Tower, go to",),
        neighbors=(
            Probe(prompt="The Colosseum is in", target="Rome"),
            Probe(prompt="Big Ben is in", target="London"),
            Probe(prompt="What is called Eiffel Tower is in", target="Paris"),
        ),
        locality=(
            Probe(prompt="The Eiffel Tower is made of", target="iron"),
            Probe(prompt="Two and two are", target="four"),
        ),
    )
    asked = prompts_of(fact)
    assert [(row.asked, row.answer, row.text) for row in asked.itertuples()] == [
        ("s, r", "new", "Rome"),
        ("s, r", "own", "Paris"),
        ("s, r reworded", "new", "Rome"),
        ("s, r reworded", "own", "Paris"),
        ("s', r", "own", "Rome"),  # the new answer is its own
        ("s', r", "new", "Rome"),
        ("s', r", "own", "London"),
        ("s, r'", "new", "Rome"),
        ("s, r'", "own", "iron"),
    ]
    assert list(prompts_of(replace(EIFFEL, target_true=""))["answer"]) == ["new"]


def test_changes_are_those_of_plain_runs(lm: LM, store: Store, found: Result) -> None:
    each = found.extras["each"]
    assert set(each["asked"]) == set(ASKED)
    for row in each.iloc[::7].itertuples():
        fact = next(fact for fact in FACTS if fact.id == row.fact)
        edit = edit_one(lm, fitted_editors(lm, ["FineTune"])["FineTune"], fact, store=store)
        (token,) = lm.target_ids(row.prompt, row.text)
        probabilities = [float(run(lm, lm.encode([row.prompt])).last_logits[0].softmax(-1)[token])]
        with edit.on(lm):
            probabilities.append(float(run(lm, lm.encode([row.prompt])).last_logits[0].softmax(-1)[token]))
        assert [row.before, row.after] == pytest.approx(probabilities, abs=1e-5)
        assert row.value == pytest.approx(row.after - row.before)


def test_a_fact_counts_once_however_many_prompts_it_has(found: Result) -> None:
    each = found.extras["each"]
    row = found.table.set_index(["asked", "answer"]).loc[("s', r", "own")]
    own = each[(each["asked"] == "s', r") & (each["answer"] == "own")].groupby("fact")["value"].mean()
    assert row["n"] == len(own) == len(FACTS)
    assert row["value"] == pytest.approx(own.mean())
    assert row["value"] == pytest.approx(row["after"] - row["before"])
    assert row["low"] <= row["value"] <= row["high"]
    edited = found.table.set_index(["asked", "answer"])
    assert edited.loc[("s, r", "new"), "value"] > 0.5


def test_maps_are_means_of_the_locators_shares(lm: LM, found: Result) -> None:
    traced = SubjectRelation.fitted(lm, kinds=("mlp_out", "attn_out"), samples=2)(lm, FACTS)
    table = maps(traced, seed=0)
    columns = ["value", "low", "high"]
    assert np.allclose(table[columns], found.extras["maps"][columns], atol=1e-5, equal_nan=True)
    for row in table.sample(15, random_state=1).itertuples():
        one = traced.table[(traced.table["kind"] == row.kind) & (traced.table["layer"] == row.layer)]
        if row.token == "any":  # no password
            expected = one.groupby("fact")[row.corrupted].max().mean()
        else:
            expected = one[one["token"] == row.token].groupby("fact")[row.corrupted].mean().mean()
        assert row.value == pytest.approx(expected)


def test_what_each_corruption_leaves(found: Result) -> None:
    left = found.extras["corruptions"]
    assert list(left["fact"]) == [fact.id for fact in FACTS]
    assert (left[["subject", "relation"]].max(axis=1) < left["clean"]).all()


def test_chart_summary_and_disk(found: Result, tmp_path: Path) -> None:
    again = Result.load(found.save(tmp_path / "found"))
    assert summary(again) == summary(found)
    assert "s, r': own" in summary(found)
    kinds = [type(plot) for plot in chart(again).plots]
    assert kinds == [LinePlot, LinePlot, DotPlot, DotPlot]


def test_what_cannot_be_edited_or_traced_is_told(lm: LM, store: Store) -> None:
    stays = replace(FACTS[1], target_new=None)
    found = subject_vs_relation(lm, [FACTS[0], stays], editors=("FineTune",), samples=2, store=store)
    assert "target_new" in found.run["left_out"][f"FineTune: {stays.id}"]
    assert set(found.extras["each"]["fact"]) == {FACTS[0].id}
    with pytest.raises(InputError, match="No fact could be edited"):
        subject_vs_relation(lm, [stays], editors=("FineTune",), samples=2, store=store)
    with pytest.raises(FactError, match="no fact to edit"):
        subject_vs_relation(lm, [])
    with pytest.raises(FactError, match="No editor"):
        subject_vs_relation(lm, FACTS, editors=("Nobody",))
