"""The page on edits without a browser: from the button to the list, stacked, taken off, saved and loaded; what is refused."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest

from analyses.answers import log_p
from analyses.explore_edit import (
    EditQuestion,
    Kept,
    changed_cells,
    checked,
    editor_fields,
    editor_names,
    editor_words,
    is_stored,
    lens_moved,
    load_edit,
    made_on,
    make_edit,
    matrix_of,
    moved_neighbors,
    named_folder,
    place_of,
    read_options,
    stacked,
    starting_values,
    unzipped,
    view,
    weight_map,
    with_applied,
    with_edit,
    without,
    zip_of,
)
from tests.examples import EIFFEL, fresh_lm, tiny_lm
from tests.test_edits import Doubling, Saying, dense, edit_of
from workbench.editors import all_editors
from workbench.editors.fine_tune import FineTune
from workbench.edits import Edit, EditError
from workbench.errors import InputError
from workbench.facts import Probe
from workbench.figures_edits import cells, matrix
from workbench.store import Store
from workbench.zoo import examples

ROOT = Path(__file__).parent.parent
SENTENCE = "The Eiffel Tower is in"
SOON = 60.0
"""Seconds after which a test gives up."""

FACT = replace(
    EIFFEL,
    paraphrases=("People find the Eiffel Tower in", "One visits the Eiffel Tower in"),
    neighbors=(Probe(prompt="The Colosseum is in", target="Rome"), Probe(prompt="Big Ben is in", target="London")),
    locality=(Probe(prompt="The Eiffel Tower is made of", target="iron"),),
)
QUESTION = EditQuestion(model="tiny", fact=FACT, editor="FineTune", options={"layers": (2,), "steps": 3})


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


def open_page(model: Path, **query: str) -> AppTest:
    """The page at an address, once nothing works any more."""
    app = AppTest.from_file(str(ROOT / "streamlit_app.py"), default_timeout=SOON)
    app.switch_page("pages/5_edit.py")
    usual = {"model": str(model), "prompt": SENTENCE, "editor": "FineTune", "FineTune-steps": "3"}
    for name, value in (usual | query).items():
        app.query_params[name] = value
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
        if over and all(job.status.over for job in _parts.workshop().jobs()):
            return app
        assert time.monotonic() < end
        time.sleep(0.05)


def texts(app: AppTest) -> str:
    """Everything that is written on the page."""
    return "\n".join(part.value for part in [*app.markdown, *app.caption, *app.error]).replace("\\", "")


def errors(app: AppTest) -> list[str]:
    return [error.value.replace("\\", "") for error in app.error]


def press(app: AppTest, key: str) -> AppTest:
    app.button(key=key).click()
    return settle(app.run())


def switches(app: AppTest) -> list[bool]:
    return [one.value for one in app.toggle if one.key and one.key.startswith("on-")]


# --- the page ---


def test_from_the_button_through_stack_and_undo_to_files_and_back(tiny_folder: Path, results: Path) -> None:
    app = open_page(tiny_folder, target="Rome")
    assert not errors(app)
    assert "None yet" in texts(app)
    press(app, "make")
    assert switches(app) == [True]
    assert "With 1 edit" in texts(app)
    assert "mlp.c_proj of layer" in texts(app)
    assert next(metric.label for metric in app.metric) == "Efficacy"
    assert len(app.get("plotly_chart")) == 5, "before, after, the map, the matrix, what moves"

    app.text_input(key="target").set_value("London").run()
    press(app, "make")
    assert switches(app) == [True, True]
    assert "With 2 edits" in texts(app)
    first = next(one for one in app.toggle if one.key and one.key.startswith("on-"))
    first.set_value(False)
    settle(app.run())
    assert switches(app) == [False, True]
    assert any("waits for an edit" in part.value for part in app.markdown), "the second was made on top of the first"
    press(app, "undo")
    assert switches(app) == [True, True]
    press(app, f"remove-{app.session_state['edits'][1].key}")
    assert switches(app) == [True]

    app.text_input(key="save-as").set_value("mine").run()
    press(app, "save")
    assert (results / "saved_edits" / "mine" / "edit.safetensors").is_file()
    press(app, "save")
    assert "Take another name" in " ".join(errors(app))
    app.text_input(key="export-as").set_value("tower").run()
    press(app, "export")
    assert (results / "checkpoints" / "tower" / "config.json").is_file()

    again = open_page(tiny_folder, target="Rome")
    assert switches(again) == [True], "an edit that was made before is there at once"
    press(again, f"remove-{again.session_state['edits'][0].key}")
    again.selectbox(key="folder").set_value("mine").run()
    press(again, "load")
    assert switches(again) == [True]
    from pages import _parts

    (job,) = _parts.workshop()._models.values()
    assert job.result.weight_hash == again.session_state["edits"][0].edit.base, "the model itself is not edited"


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ({}, "The new answer is empty"),
        ({"target": "Paris", "answer": "Paris"}, "is the old one"),
        ({"target": "Rome", "FineTune-layers": "99"}, "expected different ones of 0 to"),
        ({"target": "Rome", "FineTune-steps": "many"}, "expected a whole number"),
        ({"target": "Rome", "FineTune-steps": "0"}, "expected 1 or more"),
        ({"target": "Rome", "subject": "Space Needle"}, "is not in the prompt"),
    ],
)
def test_wrong_input_gets_one_sentence_and_nothing_is_lost(tiny_folder: Path, query: dict[str, str], why: str) -> None:
    app = open_page(tiny_folder, **query)
    assert [why in one for one in errors(app)] == [True]
    assert not [one for one in app.button if one.key == "make" and not one.disabled]
    assert app.query_params["prompt"] == SENTENCE
    for name, value in query.items():
        assert app.query_params[name] == value


def test_what_stands_before_prompts_is_shown_and_cannot_be_exported(tiny_folder: Path) -> None:
    app = press(open_page(tiny_folder, target="Rome", editor="InContext"), "make")
    assert "before prompts: the weights stay as they are" in texts(app)
    assert [block.value for block in app.code] == [f"Imagine that {SENTENCE} Rome. "]
    app.text_input(key="export-as").set_value("tower").run()
    press(app, "export")
    assert "cannot be merged into weights" in " ".join(errors(app))


# --- behind the page ---


def test_editors_are_told_without_importing_them() -> None:
    assert editor_names() == tuple(all_editors())
    for name, cls in all_editors().items():
        first = (cls.__doc__ or "").split("\n\n")[0]
        assert editor_words(name) == " ".join(first.split())
        assert len(editor_words(name)) > 40, f"one sentence about {name}"
        assert all(field.help.endswith(".") for field in editor_fields(name)), name


def test_what_is_typed_becomes_options_and_the_rest_stays_the_editors() -> None:
    fields = editor_fields("FineTune")
    typed = {"layers": "1, 2", "learning_rate": "1e-3", "norm_constraint": "none", "steps": " "}
    assert read_options(fields, typed) == {"layers": (1, 2), "learning_rate": 1e-3, "norm_constraint": None}
    with pytest.raises(InputError, match="layers is 'x'"):
        read_options(fields, {"layers": "x"})
    values = starting_values(tiny_lm("gpt2"), "FineTune")
    assert values == {field.name: field.default for field in fields}, "no preset fits a tiny model"


def test_what_the_model_says_already_is_refused(tmp_path: Path, gpt2: object) -> None:
    lm = tiny_lm("gpt2")
    edit = FineTune(layers=(2,), steps=30, learning_rate=0.05)(lm, [FACT])
    assert checked(lm, QUESTION) == FineTune(layers=(2,), steps=3)
    with edit.on(lm), pytest.raises(InputError, match=r"says 'Rome' after .* already"):
        checked(lm, QUESTION)
    with pytest.raises(InputError, match="already"):
        make_edit(lm, replace(QUESTION, below=(edit.key,)), (edit,), Store(folder=tmp_path))


def test_an_edit_is_kept_and_the_model_is_as_it_was(tmp_path: Path, gpt2: object) -> None:
    lm, store = tiny_lm("gpt2"), Store(folder=tmp_path / "kept")
    assert not is_stored(lm, QUESTION, store)
    edit = make_edit(lm, QUESTION, (), store)
    assert is_stored(lm, QUESTION, store)
    assert make_edit(lm, QUESTION, (), store).key == edit.key
    assert edit.key == FineTune(layers=(2,), steps=3)(lm, [FACT]).key, "the twin is the model"
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    above = replace(QUESTION, fact=replace(FACT, target_new="London"), below=(edit.key,))
    second = make_edit(lm, above, (edit,), store)
    assert second.after == (edit.key,)
    assert above.key != replace(above, below=()).key


def test_a_view_counts_what_two_models_say(gpt2: object) -> None:
    lm = tiny_lm("gpt2")
    edit = FineTune(layers=(2,), steps=20, learning_rate=0.05)(lm, [FACT])
    found = view(lm, (edit,), FACT)
    counts = found.counts.set_index("measure")
    assert list(counts["n"]) == [1, 2, 1, 1], "a neighbor whose own answer is the new one does not count"
    prompts = list(FACT.paraphrases)
    for column, with_edits in (("before", ()), ("after", (edit,))):
        twin = fresh_lm("gpt2")
        for one in with_edits:
            with one.on(twin):
                new, old = (log_p(twin, prompts, [answer] * 2) for answer in ("Rome", "Paris"))
        if not with_edits:
            new, old = (log_p(twin, prompts, [answer] * 2) for answer in ("Rome", "Paris"))
        assert counts.loc["paraphrase", column] == int((new > old).sum())
    assert counts.loc["efficacy", "after"] == 1
    other = found.prompts[found.prompts["about"] == "other relation"]
    assert counts.loc["other", "after"] == int((other["before"] == other["after"]).sum())
    assert found.before.top != found.after.top


def test_the_map_of_an_edit_has_the_relative_norm_where_it_changes_something(family: str) -> None:
    lm = tiny_lm(family)
    name = f"{lm.layout.blocks}.1.{lm.layout.down_proj}.weight"
    edit = replace(edit_of(lm, name, rank=1), facts=(FACT,))
    place = place_of(lm, edit, ())
    values, _ = weight_map(place)
    change, weight = dense(edit, name), lm.model.get_parameter(name).detach()
    assert values.loc[lm.layout.down_proj, 1] == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    assert (values.to_numpy() > 0).sum() == 1
    assert changed_cells(place) == [(1, lm.layout.down_proj)]
    found = matrix_of(lm, edit, place, layer=1, module=lm.layout.down_proj)
    assert found is not None
    assert found.shape == (lm.d_model, lm.d_mlp)
    assert np.square(found.columns).sum() == pytest.approx(float(change.square().sum()), rel=1e-4)
    assert np.square(found.rows).sum() == pytest.approx(float(change.square().sum()), rel=1e-4)
    assert matrix_of(lm, edit, place, layer=0, module=lm.layout.down_proj) is None
    strongest = change if change.shape[0] == lm.d_model else change.T
    assert found.neurons["neuron"].iloc[0] == int(strongest.square().sum(0).argmax())
    assert lens_moved(place, fact=FACT.id).shape == (len(lm.encode([FACT]).texts[0]), lm.n_layers)
    rows = moved_neighbors(place, fact=FACT.id, kind="resid_post")
    assert list(rows.index) == ["the fact itself", *(probe.prompt for probe in FACT.neighbors)]
    assert rows[0].max() == 0


def test_blocks_of_a_matrix_are_means_also_where_its_size_does_not_divide() -> None:
    lm = tiny_lm("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit = replace(edit_of(lm, name), facts=(FACT,))
    found = matrix_of(lm, edit, place_of(lm, edit, ()), layer=1, module="mlp.up_proj")
    assert found is not None
    assert found.neurons.empty
    figure = matrix(found.cells, rows=found.rows, columns=found.columns, shape=found.shape)
    assert figure.data[0].z.shape == found.cells.shape
    small = dense(edit, name).abs()
    if found.cells.shape == found.shape:
        assert np.allclose(found.cells, small, atol=1e-6)
    else:
        assert found.cells.max() <= float(small.max())


def test_memories_and_text_are_told_and_ringed() -> None:
    lm = tiny_lm("llama")
    memory = Doubling(module="model.layers.1.mlp.down_proj", factor=torch.tensor(2.0))
    place = place_of(lm, Edit(base=lm.weight_hash, sides=(memory,), facts=(FACT,)), ())
    assert place.weights is None
    assert place.hooks == ((1, "mlp.down_proj"),)
    values, notes = weight_map(place)
    assert values.to_numpy().max() == 0
    figure = cells(values, name="change", notes=notes, hooks=place.hooks)
    ring = next(trace for trace in figure.data if trace.type == "scatter" and "open" in str(trace.marker.symbol))
    assert (list(ring.x), list(ring.y)) == ([1], [list(values.index).index("mlp.down_proj")])
    said = place_of(lm, Edit(base=lm.weight_hash, sides=(Saying(text="Imagine that. "),), facts=(FACT,)), ())
    assert said.introduction == "Imagine that. "
    assert said.hooks == ()


def test_a_list_keeps_order_and_lets_edits_wait(gpt2: object) -> None:
    lm = tiny_lm("gpt2")
    first = FineTune(layers=(1,), steps=2)(lm, [FACT])
    with first.on(lm):
        second = FineTune(layers=(2,), steps=2)(lm, [FACT])
    kept = with_edit(with_edit((), first), second)
    assert [one.edit for one in kept] == [first, second]
    assert [one.edit for one in stacked(kept, lm.weight_hash)[0]] == [first, second]
    off = with_applied(kept, first.key, False)
    on, waiting = stacked(off, lm.weight_hash)
    assert (on, [one.edit for one in waiting]) == ((), [second])
    assert made_on(off, off[1]) == (first,)
    assert made_on(without(kept, first.key), kept[1]) is None
    assert [one.applied for one in with_edit(off, first)] == [True, True]
    assert stacked(kept, "other weights") == ((), ())
    assert Kept.of(first).title == "FineTune: Eiffel Tower → Rome"


def test_a_zip_file_holds_the_edit_and_others_are_refused(tmp_path: Path, gpt2: object) -> None:
    lm = tiny_lm("gpt2")
    edit = FineTune(layers=(1,), steps=2)(lm, [FACT])
    data = zip_of(edit)
    assert unzipped(data).key == edit.key
    assert load_edit(lm, data).key == edit.key
    assert load_edit(lm, edit.save(tmp_path / "edit")).key == edit.key
    with pytest.raises(EditError, match="was made on weights"):
        load_edit(fresh_lm("gpt2", seed=1), data)
    for wrong in (b"no zip", data[: len(data) // 2]):
        with pytest.raises(EditError):
            unzipped(wrong)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("../../edit.json", "{}")
    with pytest.raises(EditError, match=r"holds no edit\.safetensors"):
        unzipped(other.getvalue())


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "/absolute"])
def test_folders_have_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no name for a folder"):
        named_folder(tmp_path, name)
