"""The pages of analyses without a browser: questions, work, answers, and what they say where there is none."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

from tests.examples import fresh_lm
from tests.test_app import SOON, _close_workers, errors, open_page, settle, texts

ROOT = Path(__file__).parents[1]
PAGES = ("located_vs_edited", "averages", "compare_checkpoints", "lifelong")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A results folder of the test's own, and new workers."""
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path / "results"))
    st.cache_data.clear()
    yield tmp_path / "results"
    _close_workers()


def charts(app: AppTest) -> list[Any]:
    """The figures on the page."""
    return list(app.get("plotly_chart"))


def codes(app: AppTest) -> str:
    """What stands in boxes of code."""
    return "\n".join(code.value for code in app.code)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_and_can_be_started(page: str) -> None:
    app = open_page(page, model="organism-tiny")
    assert not app.exception
    assert not app.error
    assert app.button(key="run").label


def about_weights(model: Path | str, editor: str) -> AppTest:
    """The page with the question which weights an editor changes."""
    app = settle(open_page("located_vs_edited", model=model))
    app.selectbox(key="about-located_vs_edited").set_value("weight_change")
    app.run()
    app.multiselect(key="weight_change-editors").set_value([editor])
    return settle(app.run())


def test_what_cannot_be_edited_is_told_so(tiny_folder: Path) -> None:
    app = about_weights(tiny_folder, "Rome")
    app.button(key="run").click()
    settle(app.run())
    assert errors(app)
    assert not charts(app)


@pytest.mark.parametrize("page", ["located_vs_edited", "lifelong"])
def test_an_analysis_that_is_not_installed_is_told_so(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pages import _analysis

    monkeypatch.setattr(_analysis, "all_analyses", dict)
    app = open_page(page, model="organism-tiny")
    assert not app.exception
    assert "not installed" in app.info[0].value


def test_an_average_over_facts() -> None:
    app = settle(open_page("averages", model="organism-tiny", **{"average-samples": 1}))
    app.number_input(key="n-20").set_value(2)
    settle(app.run())
    app.button(key="run").click()
    settle(app.run())
    assert not errors(app)
    assert len(charts(app)) == 6, "a map and curves for each of three kinds"
    assert "workbench average --model organism-tiny" in codes(app)
    assert "--limit 2" in codes(app)


def test_two_checkpoints_are_compared(tmp_path: Path, tiny_folder: Path) -> None:
    lm = fresh_lm("gpt2")
    weights = lm.model.get_parameter("transformer.h.1.mlp.c_proj.weight")
    weights.data += torch.ones_like(weights)
    lm.model.save_pretrained(tmp_path / "edited")
    app = compared(tiny_folder, tmp_path / "edited")
    assert "A single matrix changed by a rank-one edit" in texts(app)
    assert len(app.dataframe[0].value) == 1
    assert charts(app)
    assert "workbench diff" in codes(app)
    assert "nowhere" in errors(compared(tmp_path / "nowhere", tiny_folder))[0]


def test_a_bundled_model_is_compared_by_its_name() -> None:
    app = compared("organism-tiny", "organism-tiny")
    assert not errors(app)
    assert "workbench diff organism-tiny organism-tiny" in codes(app)


def test_a_button_runs_what_a_field_says_that_is_left_by_clicking_it() -> None:
    app = about_weights("organism-tiny", "FineTune")
    app.number_input(key="n-10").set_value(2)
    app.button(key="run").click()
    settle(app.run())
    assert not errors(app)
    assert charts(app), "the two facts were asked for, not the ten before"
    assert "--limit 2" in codes(app)


def test_a_comparison_of_one_checkpoint_asks_for_the_other() -> None:
    assert "Name the other one too" in errors(compared("organism-tiny", ""))[0]


def test_the_number_of_facts_is_in_the_address() -> None:
    for asked, shown in (("3", 3), ("999", 10), ("none", 10)):
        app = settle(open_page("located_vs_edited", model="organism-tiny", **{"n-10": asked}))
        assert app.number_input(key="n-10").value == shown
        assert app.button(key="run").label == f"Run on {shown} facts"


def compared(base: Path | str, edited: Path | str) -> AppTest:
    """The page once its worker has read two checkpoints."""
    app = open_page("compare_checkpoints", base=base, edited=edited)
    app.button(key="run").click()
    app.run()
    end = time.monotonic() + SOON
    while not app.error and not app.dataframe:
        assert not app.exception
        assert time.monotonic() < end
        time.sleep(0.05)
        app.run()
    return app


def test_a_page_waits_for_no_torch() -> None:
    """The worker imports it, and two threads that import it at once can break it."""
    shared = [path.stem for path in (ROOT / "pages").glob("_[a-z]*.py")]
    code = "; ".join(
        [
            *(f"import pages.{name}" for name in shared),
            "import sys; print({'torch', 'transformers'} & set(sys.modules))",
        ]
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
