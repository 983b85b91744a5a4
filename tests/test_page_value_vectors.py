"""The page on value vectors without a browser: from the button to the neurons, a neuron by its address, and a search by token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from analyses.explore_neurons import (
    Neuron,
    NeuronError,
    build_words,
    card_of,
    find_neurons,
    named,
    prompts_of,
    sums,
    with_words,
    word_tokens,
)
from analyses.strongest_prompts import strongest_prompts
from tests.examples import FACTS, SAID, fresh_lm, tiny_lm
from workbench.asked import Asked
from workbench.facts import Fact
from workbench.locators import locator_named
from workbench.models import LM
from workbench.results import Footprint
from workbench.store import Store
from workbench.vocabulary import VocabularyError
from workbench.zoo import examples

ROOT = Path(__file__).parent.parent
SENTENCE = "The Eiffel Tower is in"
SOON = 60.0
"""Seconds after which a test gives up."""


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A results folder of the test's own, no bundled examples, and new workers."""
    from pages import _parts

    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(examples, "FOLDER", tmp_path / "examples")
    st.cache_data.clear()
    yield tmp_path / "results"
    _parts.workshop().close()
    st.cache_resource.clear()


def open_page(**query: str | Path) -> AppTest:
    """The page at an address, once nothing works any more."""
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=SOON)
    app.switch_page("pages/3_value_vectors.py")
    for name, value in query.items():
        app.query_params[name] = str(value)
    return settle(app.run())


def settle(app: AppTest) -> AppTest:
    """Runs the page again, as its fragment does, until nothing works any more."""
    from pages import _parts

    end = time.monotonic() + SOON
    while True:
        jobs = [*_parts.workshop().jobs(), *_parts.workshop()._models.values()]
        over = all(job.status.over for job in jobs)
        app.run()
        assert not app.exception, app.exception
        if over:
            return app
        assert time.monotonic() < end
        time.sleep(0.05)


def texts(app: AppTest) -> str:
    """Everything that is written on the page."""
    return "\n".join(part.value for part in [*app.markdown, *app.caption, *app.error]).replace("\\", "")


def press(app: AppTest, key: str) -> AppTest:
    app.button(key=key).click()
    return settle(app.run())


def attributed(lm: LM, **options: object) -> Footprint:
    return locator_named("ValueVectors").fitted(lm, **options)(lm, [SAID])


# --- the page ---


def test_from_the_button_to_a_neuron_and_again_from_its_address(tiny_folder: Path) -> None:
    app = open_page(model=tiny_folder, prompt=SENTENCE, neurons="6")
    assert not app.dataframe
    assert [button.label for button in app.button if button.key == "trace"] == ["Find neurons"]
    press(app, "trace")
    (strongest,) = [frame.value for frame in app.dataframe]
    assert len(strongest) == 6
    assert [metric.label for metric in app.metric][:3] == ["Logit", "All MLPs", "6 neurons"]
    first = strongest["neuron"].iloc[0]
    assert f"`{first}`" in texts(app)
    assert "The strongest neuron of this fact" in texts(app)

    again = open_page(model=tiny_folder, prompt=SENTENCE, neurons="6", neuron="L2.7")
    assert "Neuron 7 of layer 2" in texts(again)
    assert "The strongest neuron of this fact" not in texts(again)
    assert [frame.value["neuron"].iloc[0] for frame in again.dataframe] == [first]
    assert not [button for button in again.button if button.key == "trace"]


def test_words_without_the_norm_are_other_words(tiny_folder: Path) -> None:
    app = press(open_page(model=tiny_folder, prompt=SENTENCE), "trace")
    normed = app.dataframe[0].value
    app.segmented_control(key="read").set_value("plain").run()
    plain = app.dataframe[0].value
    pd.testing.assert_series_equal(plain["contribution"], normed["contribution"])
    lm, first = fresh_lm("gpt2"), Neuron.parse(normed["neuron"].iloc[0])
    for table, projection in ((normed, "normed"), (plain, "plain")):
        assert table["promoted"].iloc[0] == ", ".join(
            text.strip() or repr(text)
            for text in card_of(lm, SAID, first).tokens[projection]["text"].head(5)  # type: ignore[index]
        )


def test_a_token_is_searched_once_the_index_is_there(tiny_folder: Path, results: Path) -> None:
    app = open_page(model=tiny_folder, prompt=SENTENCE)
    press(app, "index")
    assert list((results / "vocabulary").glob("*/index.json"))
    assert not [button for button in app.button if button.key == "index"]
    app.text_input(key="word").set_value("The").run()
    (found,) = [frame.value for frame in app.dataframe]
    assert app.dataframe[0].proto.HasField("placeholder"), "no None where a rank is far down"
    lm = fresh_lm("gpt2")
    token = word_tokens(lm, "The").tokens[0][0]
    expected = find_neurons(lm, token, projection="normed")
    assert expected is not None
    pd.testing.assert_frame_equal(found[list(expected.columns.drop("neuron"))], expected.drop(columns="neuron"))
    assert list(found["neuron"]) == [str(one) for one in named(expected)]

    app.text_input(key="word").set_value("incomprehensible").run()
    choice = next(one for one in app.segmented_control if one.key == "token-incomprehensible")
    assert "“incomprehensible” is" in choice.label.replace("\\", "")
    before = app.dataframe[0].value
    assert len(before) == 20
    second = word_tokens(lm, "incomprehensible").tokens[1][0]
    choice.set_value(second).run()
    other = find_neurons(lm, second, projection="normed")
    assert other is not None
    assert list(app.dataframe[0].value["neuron"]) == [str(one) for one in named(other)] != list(before["neuron"])


@pytest.mark.parametrize(
    ("neuron", "said"),
    [("L9.1", "There is no neuron 1 in layer 9"), ("seventeen", "'seventeen' names no neuron")],
)
def test_a_neuron_that_does_not_exist_is_said(tiny_folder: Path, neuron: str, said: str) -> None:
    app = press(open_page(model=tiny_folder, prompt=SENTENCE, neuron=neuron), "trace")
    assert said in texts(app)
    assert not app.exception


def test_another_position_says_what_it_means(tiny_folder: Path) -> None:
    app = press(open_page(model=tiny_folder, prompt=SENTENCE, token="subject_last"), "trace")
    assert "nothing reaches the logits directly" in texts(app)


def test_a_position_that_the_prompt_has_not_is_said_before_any_work(tiny_folder: Path) -> None:
    app = open_page(model=tiny_folder, prompt=SENTENCE, token="before_subject", subject="The")
    assert [error.value for error in app.error]
    assert "expected 1" in texts(app)
    assert app.button(key="trace").disabled


def test_an_earlier_question_fills_the_form(tiny_folder: Path, results: Path) -> None:
    options = {"token": "subject_last", "neurons": 3, "projection": "plain"}
    fact = Fact.typed(text=SENTENCE, subject="Eiffel Tower")
    asked = Asked(model=str(tiny_folder), fact=fact, method="ValueVectors", options=options)
    asked.compute(fresh_lm("gpt2"), Store(folder=results))
    app = open_page(model=tiny_folder)
    app.button(key=f"open-{asked.key}").click()
    settle(app.run())
    assert app.selectbox(key="token").value == "subject_last"
    assert len(app.dataframe[0].value) == 3


# --- what it shows ---


def test_neurons_are_spelled_as_they_are_read() -> None:
    assert Neuron.parse(" L5.17 ") == Neuron(layer=5, neuron=17)
    assert str(Neuron.parse("5.17")) == "L5.17"
    for wrong in ("", "L5", "L5.-1", "5,17"):
        with pytest.raises(NeuronError, match="Write it like"):
            Neuron.parse(wrong)
    assert Neuron.at("L5.mlp_post[17]@last") == Neuron(layer=5, neuron=17)
    with pytest.raises(NeuronError, match="no single neuron"):
        Neuron.at("L5.mlp_post@last")


def test_sums_are_of_the_table() -> None:
    lm = tiny_lm("llama")
    footprint = attributed(lm, neurons=lm.n_layers * lm.d_mlp)
    found = sums(footprint)
    assert found.n == lm.n_layers * lm.d_mlp
    assert found.neurons == pytest.approx(found.layers, abs=1e-4), "no biases: the neurons are all there is"


def test_files_have_the_words_too() -> None:
    lm = tiny_lm("gpt2")
    footprint = attributed(lm, neurons=4)
    table = with_words(footprint).table
    assert len(table) == len(footprint.table)
    single = table.dropna(subset="neuron")
    assert list(single["promoted"]) == list(footprint.extras["neurons"]["promoted"])
    assert table[table["neuron"].isna()]["promoted"].isna().all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_card_says_what_the_locator_says(family: str) -> None:
    lm = tiny_lm(family)
    table = attributed(lm, neurons=3).extras["neurons"]
    for neuron, row in zip(named(table), table.to_dict("records"), strict=True):
        card = card_of(lm, SAID, neuron)
        assert (card.k, card.contribution) == pytest.approx((row["k"], row["contribution"]), abs=1e-5)
        assert abs(card.strongest) >= abs(card.k)
        assert {projection: len(tokens) for projection, tokens in card.tokens.items()} == {"normed": 20, "plain": 20}


def test_a_neurons_prompts_are_told_with_their_token() -> None:
    lm = tiny_lm("gpt2")
    found = strongest_prompts(lm, FACTS, k=2)
    table = prompts_of(lm, found, {fact.id: fact for fact in FACTS}, Neuron(layer=1, neuron=3))
    rows = found.table[(found.table["layer"] == 1) & (found.table["neuron"] == 3)]
    assert list(table["k"]) == list(rows["k"])
    for shown, row in zip(table.to_dict("records"), rows.to_dict("records"), strict=True):
        fact = next(fact for fact in FACTS if fact.id == row["fact"])
        assert (shown["prompt"], shown["answer"]) == (fact.text, fact.target_true)
        assert shown["text"] == lm.encode([fact]).texts[0][row["position"]].strip()


def test_a_word_is_its_spellings_or_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    whole, pieces = word_tokens(lm, "The"), word_tokens(lm, "incomprehensible")
    assert whole.is_whole
    assert [text for _, text in whole.tokens] == [" The", "The"]
    assert not pieces.is_whole
    assert len(pieces.tokens) > 1
    with pytest.raises(VocabularyError, match="empty"):
        word_tokens(lm, " ")
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    assert find_neurons(lm, 3, projection="plain") is None
    build_words(lm, projection="plain")
    found = find_neurons(lm, 3, projection="plain", n=5)
    assert found is not None
    assert len(found) == 5
    assert found["value"].is_monotonic_decreasing
