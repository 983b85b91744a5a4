"""The pages without a browser: what they show at first, what they say to wrong input, and work through the real worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from tests.examples import fresh_lm, tiny_lm
from workbench import zoo
from workbench.asked import Asked
from workbench.facts import Fact
from workbench.store import Store
from workbench.zoo import examples

APP = str(Path(__file__).parent.parent / "streamlit_app.py")
SENTENCE = "The Eiffel Tower is located in the city of"
SOON = 60.0
"""Seconds after which a test gives up."""


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A results folder of the test's own, no bundled examples, and new workers."""
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(examples, "FOLDER", tmp_path / "examples")
    st.cache_data.clear()
    yield tmp_path / "results"
    _close_workers()


def _close_workers() -> None:
    from pages import _parts

    _parts.workshop().close()
    st.cache_resource.clear()


def open_app(**query: str | Path) -> AppTest:
    """The app at an address."""
    app = AppTest.from_file(APP, default_timeout=SOON)
    for name, value in query.items():
        app.query_params[name] = str(value)
    return app.run()


def open_page(name: str, **query: Any) -> AppTest:
    """One of the other pages at an address: its hash, since `switch_page` would need a visit to the first page."""
    app = AppTest.from_file(APP, default_timeout=SOON)
    app._page_hash = calc_hash(name)
    for one, value in query.items():
        app.query_params[one] = value if isinstance(value, list) else str(value)
    return app.run()


def settle(app: AppTest) -> AppTest:
    """Runs the app again, as its fragment does, until nothing works any more."""
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
    parts = [*app.markdown, *app.caption, *app.error]
    return "\n".join(part.value for part in parts).replace("\\", "")


def maps(app: AppTest) -> int:
    """How many heatmaps there are."""
    return sum("heatmap" in chart.proto.spec for chart in app.get("plotly_chart"))


def errors(app: AppTest) -> list[str]:
    return [error.value.replace("\\", "") for error in app.error]


def test_a_first_visit_shows_a_finished_example_before_any_model_is_loaded(tmp_path: Path) -> None:
    fact = next(fact for fact in zoo.load_facts(zoo.NAMES[0]) if fact.id == examples.FACTS[0])
    asked = Asked(model=zoo.NAMES[0], fact=fact)
    asked.compute(tiny_lm("gpt2"), Store(folder=tmp_path / "examples"))
    app = open_app()
    assert not app.exception
    assert not app.error
    assert maps(app) == 3
    assert "Space Needle" in texts(app)
    assert [metric.label for metric in app.metric] == ["Clean run", "Corrupted run", "Lost", "Restored run", "Change"]


def test_a_trace_from_the_button_to_the_maps_and_again_from_its_address(tiny_folder: Path, results: Path) -> None:
    app = settle(open_app(model=tiny_folder, prompt=SENTENCE, samples="2"))
    assert "Eiffel Tower" in texts(app)
    assert maps(app) == 0
    button = app.button(key="trace")
    assert (button.label, button.disabled) == ("Trace", False)
    button.click()
    settle(app.run())
    assert maps(app) == 3
    assert not app.error
    assert not [one for one in app.button if one.key == "trace"]
    made = sorted(path.stat().st_mtime_ns for path in results.glob("*/run.json"))
    assert len(made) == 4, "three maps and the question"

    again = open_app(model=tiny_folder, prompt=SENTENCE, samples="2", site="L1.mlp_out@2")
    assert maps(again) == 3
    assert "L1.mlp_out@2" in texts(again)
    settle(again)
    assert sorted(path.stat().st_mtime_ns for path in results.glob("*/run.json")) == made, "nothing was computed again"

    listed = [one for one in again.button if one.key and one.key.startswith("open-")]
    assert len(listed) == 1
    assert "samples 2" in listed[0].label


def test_an_earlier_trace_fills_the_form(tiny_folder: Path, results: Path) -> None:
    fact = Fact.typed(text="The Eiffel Tower is near the Eiffel Tower", subject="Eiffel Tower", occurrence="first")
    asked = Asked(model=str(tiny_folder), fact=fact, options={"samples": 2, "noise": "u0.5", "seed": 3})
    asked.compute(fresh_lm("gpt2"), Store(folder=results))
    app = open_app(model=tiny_folder)
    assert maps(app) == 0
    app.button(key=f"open-{asked.key}").click()
    settle(app.run())
    assert maps(app) == 3
    assert app.text_input(key="noise").value == "u0.5"
    assert app.number_input(key="seed").value == 3
    assert app.text_input(key="subject").value == "Eiffel Tower"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"prompt": SENTENCE, "subject": "Louvre"}, "The subject 'Louvre' is not in the prompt"),
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": "?!"}, "The subject is empty"),
        ({"prompt": SENTENCE + " a" * 70}, "positions. Shorten it"),
        ({"prompt": SENTENCE, "noise": "loud"}, "'loud' spells no noise"),
        ({"model": "no/such/folder"}, "There is no folder 'no/such/folder'"),
        ({"model": " "}, "The model's name is empty"),
        ({"model": "{empty}"}, "holds no config.json"),
        ({"model": "{bare}"}, "holds no weights"),
    ],
)
def test_wrong_input_gets_one_sentence_before_any_work(
    query: dict[str, str], said: str, tiny_folder: Path, tmp_path: Path, results: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    for file in tiny_folder.glob("*.json"):
        (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    folders = {"empty": tmp_path / "empty", "bare": tmp_path / "bare"}
    asked: dict[str, str | Path] = {
        "model": tiny_folder,
        **{name: text.format(**folders) for name, text in query.items()},
    }
    app = settle(open_app(**asked))
    assert len(errors(app)) == 1
    assert said in errors(app)[0]
    assert all(button.disabled for button in app.button if button.key == "trace")
    assert not list(results.glob("*"))


def test_a_corruption_that_takes_nothing_away_is_said(tiny_folder: Path) -> None:
    app = settle(open_app(model=tiny_folder, prompt=SENTENCE, samples="2", noise="0.000001"))
    app.button(key="trace").click()
    settle(app.run())
    assert "nothing to restore" in texts(app)
    assert "% of what was lost" not in texts(app)


def test_work_that_fails_says_why(tiny_folder: Path) -> None:
    app = settle(open_app(model=tiny_folder, prompt=SENTENCE, corrupt="swap"))
    assert not app.error
    app.button(key="trace").click()
    settle(app.run())
    assert len(errors(app)) == 1
    assert "substitutes has as many tokens as 'Eiffel Tower'" in errors(app)[0]


def test_a_model_that_does_not_fit_is_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    app = settle(open_app(model=tiny_folder))
    assert len(errors(app)) == 1
    assert "GiB" in errors(app)[0]


def test_a_stopped_trace_can_go_on_and_other_inputs_do_not_disturb_it(tiny_folder: Path, results: Path) -> None:
    from pages import _parts

    app = settle(open_app(model=tiny_folder, prompt=SENTENCE, samples="2"))
    app.button(key="trace").click().run()
    app.text_input(key="prompt").set_value("The Space Needle is in").run()
    settle(app)
    assert [job.status.state for job in _parts.workshop().jobs()] == ["done"]
    assert maps(app) == 0
    assert "is finished" in texts(app), "the result of what ran meanwhile is offered"
    next(button for button in app.button if button.label == "Show").click()
    settle(app.run())
    assert maps(app) == 3
    assert app.text_input(key="prompt").value == SENTENCE
    for piece in results.glob("*/run.json"):
        if '"kinds": [\n   "attn_out"' in piece.read_text():
            piece.unlink()
    settle(app)
    assert maps(app) == 2
    assert app.button(key="trace").label == "Go on"
    app.button(key="trace").click()
    settle(app.run())
    assert maps(app) == 3


def test_a_click_right_after_typing_traces_what_was_typed(tiny_folder: Path) -> None:
    app = settle(open_app(model=tiny_folder, prompt=SENTENCE, samples="2"))
    app.text_input(key="prompt").set_value("The Eiffel Tower is in")
    app.button(key="trace").click()
    settle(app.run())
    assert not errors(app)
    assert maps(app) == 3
    assert "The Eiffel Tower is in" in texts(app)


def test_an_unknown_fact_is_said() -> None:
    app = open_app(model="organism-tiny", fact="Foo bar")
    assert "There is no fact “Foo bar” in organism-tiny" in texts(app)
    app.run()
    assert "There is no fact “Foo bar” in organism-tiny" in texts(app), "a poll does not take it away"
    box = app.selectbox(key="fact")
    box.set_value(next(label for label in box.options if label != box.value)).run()
    assert "There is no fact" not in texts(app)


def test_a_swapped_and_severed_trace_says_so(tiny_folder: Path, results: Path) -> None:
    other = "Tower Eiffel"
    options = {"corrupt": "swap", "substitutes": (other,), "sever": "mlp_out"}
    asked = Asked(model=str(tiny_folder), fact=Fact.typed(text=SENTENCE, subject="Eiffel Tower"), options=options)
    asked.compute(fresh_lm("gpt2"), Store(folder=results))
    app = open_app(
        model=tiny_folder, prompt=SENTENCE, subject="Eiffel Tower", corrupt="swap", sever="mlp_out", substitutes=other
    )
    assert maps(app) == 2
    assert "**Samples**" in texts(app)
    assert "Severed path: MLP outputs" in texts(app)
    assert f"with another subject in its place: “{SENTENCE.replace('Eiffel Tower', other)}”" in texts(app)
    assert "±" not in next(metric.value for metric in app.metric if metric.label == "Change")


def test_two_prompts_from_the_button_to_the_maps_and_again_from_their_address(tiny_folder: Path, results: Path) -> None:
    query: dict[str, Any] = {
        "model": tiny_folder,
        "prompt": SENTENCE,
        "subject": "Eiffel Tower",
        "substitutes": "Tower Eiffel",
    }
    app = settle(open_page("patch_two_prompts", **query))
    assert not app.error
    app.multiselect(key="kinds").set_value(["resid_pre", "z", "mlp_post"])
    settle(app.run())
    app.button(key="trace").click()
    settle(app.run())
    assert not app.error
    assert maps(app) == 3, "states, heads, all neurons of the MLP together"
    assert f"Counterfactual prompt: “{SENTENCE.replace('Eiffel Tower', 'Tower Eiffel')}”" in texts(app)
    assert {"Clean prompt", "Counterfactual", "Difference"} <= {metric.label for metric in app.metric}
    neurons = app.dataframe[0].value
    assert len(neurons) == 20
    made = sorted(path.stat().st_mtime_ns for path in results.glob("*/run.json"))

    kinds = ["resid_pre", "z", "mlp_post"]
    again = open_page("patch_two_prompts", kinds=kinds, site="L1.z[2]@2", **query)
    assert maps(again) == 3
    assert "Layer 1, head 2, at" in texts(again)
    assert sorted(path.stat().st_mtime_ns for path in results.glob("*/run.json")) == made


@pytest.mark.parametrize(
    ("substitutes", "said"),
    [
        ("Paris", "expected equally many"),
        ("Eiffel Tower", "Both prompts are about 'Eiffel Tower'"),
        ("", "Type a counterfactual subject of"),
    ],
)
def test_a_counterfactual_that_does_not_fit_is_refused_before_any_work(
    substitutes: str, said: str, tiny_folder: Path, results: Path
) -> None:
    query: dict[str, Any] = {"model": tiny_folder, "prompt": SENTENCE, "subject": "Eiffel Tower"}
    app = settle(open_page("patch_two_prompts", **query, **({"substitutes": substitutes} if substitutes else {})))
    assert len(errors(app)) == 1
    assert said in errors(app)[0]
    assert app.button(key="trace").disabled
    assert not list(results.glob("*"))


def test_a_fact_of_a_bundled_model_gets_a_counterfactual_subject_by_itself() -> None:
    app = settle(open_page("patch_two_prompts", model="organism-tiny"))
    assert not app.error
    proposed = app.selectbox(key="substitutes").options
    assert len(proposed) > 1
    assert not app.button(key="trace").disabled


def test_an_earlier_question_opens_on_the_page_of_its_method(tiny_folder: Path, results: Path) -> None:
    from pages import _parts

    fact = Fact.typed(text=SENTENCE, subject="Eiffel Tower")
    options = {"substitutes": ("Tower Eiffel",), "kinds": ("mlp_out",), "direction": "noise"}
    asked = Asked(model=str(tiny_folder), fact=fact, method="ActivationPatching", options=options)
    asked.compute(fresh_lm("gpt2"), Store(folder=results))
    app = open_app(model=tiny_folder)
    (listed,) = _parts.earlier("ActivationPatching")
    app.session_state["going_to"] = listed.asked
    settle(app.run())
    assert "Where do two prompts part?" in texts(app)
    assert maps(app) == 1
    assert app.selectbox(key="substitutes").value == "Tower Eiffel"
    assert app.multiselect(key="kinds").value == ["mlp_out"]
    assert app.selectbox(key="direction").value == "noise"


def test_a_page_that_a_new_server_shows_first_is_in_the_app() -> None:
    app = open_page("value_vectors", model="organism-tiny")
    assert not app.exception
    assert "What do the neurons write?" in texts(app)
    assert app.session_state["in_app"]
    assert app.selectbox(key="model").value == "organism-tiny"


@pytest.mark.parametrize(
    "query", [{"model": "organism-tiny", "fact": "Iceland, capital"}, {"prompt": SENTENCE, "answer": "Rome"}]
)
def test_the_question_of_a_link_goes_along_to_every_page(query: dict[str, str]) -> None:
    app = open_page("compare_locators", **query, how=_how(query))
    for page in ("2_patch_two_prompts", "4_compare_locators", "3_value_vectors", "1_explore"):
        app.query_params.clear()
        app.switch_page(f"pages/{page}.py").run()
        assert not app.exception
        for name, value in query.items():
            (widget,) = [one for one in [*app.selectbox, *app.text_input] if one.key == name]
            assert widget.value == value


def _how(query: dict[str, str]) -> str:
    return "A known fact" if "fact" in query else "My own sentence"


def test_a_page_that_is_come_back_to_shows_the_same_site(tiny_folder: Path, results: Path) -> None:
    options = {"substitutes": ("Tower Eiffel",), "kinds": ("mlp_out",)}
    fact = Fact.typed(text=SENTENCE, subject="Eiffel Tower")
    Asked(model=str(tiny_folder), fact=fact, method="ActivationPatching", options=options).compute(
        fresh_lm("gpt2"), Store(folder=results)
    )
    asked = {"model": tiny_folder, "prompt": SENTENCE, "subject": "Eiffel Tower"}
    app = open_page("patch_two_prompts", **asked, substitutes="Tower Eiffel", kinds=["mlp_out"], site="L1.mlp_out@2")
    assert "`L1.mlp_out@2`" in texts(app)
    app.query_params.clear()
    app.switch_page("pages/1_explore.py").run()
    assert "L1.mlp_out@2" not in texts(app)
    app.query_params.clear()
    app.switch_page("pages/2_patch_two_prompts.py").run()
    assert app.query_params["site"] == "L1.mlp_out@2"


@pytest.mark.parametrize("page", ["explore", "patch_two_prompts", "value_vectors"])
def test_nonsense_in_an_address_is_as_if_it_were_not_there(page: str) -> None:
    names = ("window", "samples", "neurons", "tokens")
    app = open_page(page, **dict.fromkeys(names, "1e999"), read="", how="", model="organism-tiny")
    plain = open_page(page, model="organism-tiny")
    assert not app.exception
    assert [one.value for one in app.number_input] == [one.value for one in plain.number_input]
    assert [one.value for one in app.segmented_control] == [one.value for one in plain.segmented_control]
    assert [one.key for one in app.selectbox] == [one.key for one in plain.selectbox]


def test_methods_are_compared_and_one_that_fails_stops_no_other(tiny_folder: Path, results: Path) -> None:
    query: dict[str, Any] = {"model": tiny_folder, "prompt": SENTENCE, "subject": "Eiffel Tower"}
    app = open_page("compare_locators", **query)
    app.multiselect(key="methods").set_value(["ActivationPatching", "DirectLogitAttribution", "LogitLens"])
    settle(app.run())
    app.button(key="trace").click()
    settle(app.run())
    assert not app.error
    assert "None of the" in texts(app), "there is no other subject to patch with"
    assert [chart for chart in app.get("plotly_chart") if "resid_post" in chart.proto.spec]
    assert "4 series, 1 fact" in texts(app)
    assert "Do they agree?" in texts(app)
    made = sorted(path.stat().st_mtime_ns for path in results.glob("*/run.json"))

    app.multiselect(key="methods").set_value(["LogitLens"])
    app.selectbox(key="role").set_value("last")
    settle(app.run())
    assert "1 series, 1 fact" in texts(app)
    assert "only series" in texts(app), "nothing to agree with"
    app.multiselect(key="sites").set_value(["mlp_post"])
    settle(app.run())
    assert "No footprint has sites of mlp_post" in errors(app)[0]
    assert sorted(path.stat().st_mtime_ns for path in results.glob("*/run.json")) == made
