"""Edits under attack: what the prompts are made of, what counts as said, and the roles of the answers with and without an edit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analyses.editing import edit_one, fitted_editors
from analyses.robustness import (
    ATTACKS,
    MEASURES,
    NO_EDIT,
    Material,
    appears,
    attacks,
    chart,
    gather,
    published,
    robustness,
    summary,
    without_name,
)
from tests.examples import EIFFEL, tiny_lm
from workbench import zoo
from workbench.charts import CellPlot
from workbench.errors import InputError
from workbench.facts import FactError, Probe
from workbench.generation import continue_prompts
from workbench.loading import load
from workbench.models import LM
from workbench.results import Result
from workbench.store import Store

FACTS = zoo.load_facts("organism-tiny")[:60:30]
TOWER = replace(
    EIFFEL,
    paraphrases=("To see the Eiffel Tower, go to",),
    neighbors=(Probe(prompt="Big Ben is in", target="London"), Probe(prompt="The Colosseum is in", target="Rome")),
    locality=(
        Probe(prompt="The Eiffel Tower is made of", target="iron"),
        Probe(prompt="The Eiffel Tower is in old", target="Paris"),
    ),
)


@pytest.fixture(scope="module")
def lm() -> LM:
    return load("organism-tiny", dtype="float32")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(folder=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def found(lm: LM, store: Store) -> Result:
    return robustness(lm, FACTS, editors=("FineTune",), store=store)


def test_every_kind_of_attack_asks_about_the_fact() -> None:
    material = Material(related=("It is high.",), noise=("Rain fell.",), reference="It is located in the city of")
    asked = attacks(TOWER, material, held="Rome", other="Paris")
    assert list(dict.fromkeys(name for name, _ in asked)) == list(ATTACKS)
    prompts = dict(asked)  # of doubt, the second one
    assert prompts["plain"] == TOWER.text
    assert prompts["noisy long context"] == f"Rain fell. It is high. {TOWER.text}"
    assert TOWER.subject not in prompts["long context, reference"]
    assert prompts["doubt"].index("Rome") < prompts["doubt"].index("Paris")
    ends = {name for name, prompt in asked if prompt.endswith(TOWER.text)}
    assert ends == {"plain", "long context", "noisy long context", "dialogue", "noisy dialogue", "doubt"}
    assert not any("Paris" in prompt or "Rome" in prompt for name, prompt in asked if name != "doubt")
    bare = attacks(replace(TOWER, paraphrases=()), Material(), held="Rome", other="Paris")
    assert {name for name, _ in bare} == {"plain", "cloze", "dialogue", "noisy dialogue", "doubt"}


def test_context_names_the_subject_and_no_answer(lm: LM) -> None:
    found = gather(lm, FACTS, sentences=3, corpus="", pronoun="it")
    for fact in FACTS:
        material = found[fact.id]
        assert len(material.related) == len(material.noise) == 3
        assert all(appears(fact.subject, text) for text in material.related)
        assert not any(appears(fact.subject, text) for text in material.noise)
        for answer in (fact.target_true, fact.target_new or ""):
            assert not any(appears(answer, text) for text in (*material.related, *material.noise))
        assert fact.subject not in material.reference


def test_without_a_corpus_the_facts_own_prompts_are_the_context(tmp_path: Path) -> None:
    other = tiny_lm("gpt2")
    material = gather(other, [TOWER], sentences=3, corpus="", pronoun="it")[TOWER.id]
    assert material.related == ("The Eiffel Tower is made of iron.",)
    assert material.noise == ("Big Ben is in London.",)
    assert material.reference == "It is located in the city of"
    text = tmp_path / "text.txt"
    text.write_text(
        "The Eiffel Tower is very high. It is in Paris. The Eiffel Tower is Rome's friend. Rain fell on the sea.\n"
    )
    material = gather(other, [TOWER], sentences=3, corpus=str(text), pronoun="it")[TOWER.id]
    assert material.related == ("The Eiffel Tower is very high.",)
    assert material.noise == ("Rain fell on the sea.", "Big Ben is in London.")


def test_an_answer_is_said_as_a_word_of_its_own() -> None:
    assert appears("Rome", "in rome, of course")
    assert not appears("Rome", "Romeo")
    assert not appears("", "anything")
    assert appears("C++", "it is C++.")
    assert without_name("Is the {}'s height known", pronoun="it") == "Is it's height known"
    assert without_name("{} is in", pronoun="she") == "She is in"


def test_published_numbers_stand_at_their_attack() -> None:
    """Table 1 of arXiv 2402.05827."""
    assert published("Rome", "doubt", "accuracy") == pytest.approx(0.169)
    assert published("Memit", "long context, reference", "reversion") == pytest.approx(0.273)
    assert published("Ike", "cloze", "accuracy") == pytest.approx(0.978)
    assert np.isnan(published("Rome", "doubt", "preferred"))
    assert np.isnan(published("FineTune", "plain", "accuracy"))
    assert np.isnan(published("Mend", "dialogue", "accuracy"))


def test_what_is_said_is_what_the_model_says(lm: LM, store: Store, found: Result) -> None:
    each = found.extras["each"]
    fact = FACTS[0]
    edit = edit_one(lm, fitted_editors(lm, ["FineTune"])["FineTune"], fact, store=store)
    own = each[(each["fact"] == fact.id) & (each["editor"] == "FineTune")]
    with edit.on(lm):
        for row in own.iloc[::5].itertuples():
            assert continue_prompts(lm, [str(row.prompt)], n=6) == [row.said]
    said = own.set_index("attack")["said"]
    assert (own["accuracy"] == [float((fact.target_new or "") in text) for text in own["said"]]).all()
    assert (own["reversion"] == [float(fact.target_true in text) for text in own["said"]]).all()
    assert (fact.target_new or "") in said["plain"]


def test_without_an_edit_the_answers_change_roles(found: Result) -> None:
    each = found.extras["each"]
    plain = each[each["attack"] == "plain"].set_index(["editor", "fact"])
    for fact in FACTS:
        assert fact.target_true in plain.loc[(NO_EDIT, fact.id), "said"]
        assert plain.loc[(NO_EDIT, fact.id), ["accuracy", "reversion", "preferred"]].tolist() == [1, 0, 1]
        doubts = each[(each["attack"] == "doubt") & (each["fact"] == fact.id)].groupby("editor")["prompt"].last()
        assert doubts[NO_EDIT].index(f" {fact.target_true}.") < doubts[NO_EDIT].index(f" {fact.target_new}.")
        assert doubts["FineTune"].index(f" {fact.target_new}.") < doubts["FineTune"].index(f" {fact.target_true}.")


def test_table_chart_summary_and_disk(found: Result, tmp_path: Path) -> None:
    table, each = found.table, found.extras["each"]
    assert len(table) == 2 * len(ATTACKS) * len(MEASURES)
    assert list(table["attack"].unique()) == list(ATTACKS)
    row = table[
        (table["editor"] == "FineTune") & (table["attack"] == "rephrased") & (table["measure"] == "accuracy")
    ].iloc[0]
    own = each[(each["editor"] == "FineTune") & (each["attack"] == "rephrased")]
    assert row["value"] == pytest.approx(own.groupby("fact")["accuracy"].mean().mean())
    assert row["n"] == len(FACTS)
    again = Result.load(found.save(tmp_path / "found"))
    assert summary(again) == summary(found)
    plots = chart(again).plots
    assert len(plots) == 2  # nothing is published of FineTune
    assert isinstance(plots[0], CellPlot)
    assert list(plots[0].values.columns) == list(ATTACKS)
    assert list(plots[0].values.index) == [NO_EDIT, "FineTune"]


def test_what_cannot_be_asked_is_told(lm: LM, store: Store) -> None:
    silent = replace(FACTS[1], target_true="")
    found = robustness(lm, [FACTS[0], silent], editors=("FineTune",), sentences=1, tokens=1, store=store)
    assert "target_true" in found.run["left_out"][silent.id]
    assert set(found.extras["each"]["fact"]) == {FACTS[0].id}
    long = replace(FACTS[0], paraphrases=("word " * 200,))
    with pytest.raises(InputError, match=r"No fact could be edited and attacked.*positions"):
        robustness(lm, [long], editors=("FineTune",), store=store)
    with pytest.raises(FactError, match="no fact to edit"):
        robustness(lm, [])
