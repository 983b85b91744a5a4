"""What every editor keeps, in every family: a new file in `workbench/editors` is tested here without a new test."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import workbench.editors
from analyses.answers import log_p
from tests.examples import EIFFEL, FACTS, JOBS, SAID, fresh_lm, tiny_lm
from workbench import zoo
from workbench.editors import Editor, all_editors, edit_stream
from workbench.edits import Edit, EditError, Introducing, LowRank, edits_on
from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.loading import load
from workbench.models import LM
from workbench.results import record

EDITORS = all_editors()

SMALL: dict[str, Any] = {
    "layers": (2,),
    "steps": 3,
    "n_iter": 3,
    "prefix_lengths": (3, 3),
    "moment_tokens": 400,
    "corpus": "bundled",
    "ridge": 0.1,
    "threshold": 0.05,
    "reference": "resid_post",
    "n_prefixes": 2,
    "prefix_length": 3,
    "n_locality": 2,
    "pool_size": 20,
    "only_subject": True,
    "batch": 2,
    "rank": 8,
}
"""Set where an editor has such a parameter, so that it is quick and has something to do in a random model."""

FACT = EIFFEL
OTHER = replace(JOBS, target_new="Google")


def small(name: str) -> Editor:
    """An editor with its defaults, but quick."""
    cls = EDITORS[name]
    return cls(**{f.name: SMALL[f.name] for f in fields(cls) if f.name in SMALL})


@pytest.fixture(autouse=True, scope="module")
def kept_moments(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Files of moments go to a folder of these tests, and there are facts to train a network on."""
    folder = tmp_path_factory.mktemp("results")
    facts = [replace(fact, target_new=fact.target_new or "Rome") for fact in FACTS]
    (folder / "facts.json").write_text(json.dumps([record(fact) for fact in facts]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RESULTS", str(folder))
        patch.setitem(SMALL, "data", str(folder / "facts.json"))
        yield


@cache
def edit_of(name: str, family: str) -> Edit | str:
    """An editor's edit of one fact, or why it cannot be used on this family."""
    try:
        return small(name)(tiny_lm(family), [FACT])
    except ModelError as error:
        return str(error)


def edited(name: str, family: str) -> Edit:
    found = edit_of(name, family)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(params=EDITORS)
def name(request: pytest.FixtureRequest) -> str:
    """Every editor, one after the other."""
    which: str = request.param
    return which


def test_an_editor_says_whether_its_edits_stand_beside_the_weights(name: str) -> None:
    edit = edited(name, "gpt2")
    assert EDITORS[name].beside_weights == bool(edit.sides) == (not edit.changes)


def test_the_registry_finds_the_editors() -> None:
    assert "Rome" in EDITORS
    assert list(EDITORS) == sorted(EDITORS)
    assert all("arXiv" in (inspect.getdoc(inspect.getmodule(cls)) or "") for cls in EDITORS.values())


def test_an_editors_repr_makes_it_again(name: str) -> None:
    names = {**EDITORS, **vars(workbench.editors)}
    for editor in (EDITORS[name](), small(name)):
        assert eval(repr(editor), names) == editor


def test_an_editor_is_frozen_and_counts_by_value(name: str) -> None:
    editor = small(name)
    with pytest.raises(FrozenInstanceError):
        setattr(editor, fields(editor)[0].name, None)
    assert hash(editor) == hash(small(name))


def test_every_parameter_says_what_it_is(name: str) -> None:
    """The app's form is made from the fields and what is written below them."""
    sources = [inspect.getsource(cls) for cls in EDITORS[name].__mro__ if is_dataclass(cls)]
    for parameter in fields(EDITORS[name]):
        field = f"\n    {parameter.name}: "
        after = next(source.split(field, 1)[1] for source in sources if field in source).split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), f"{name}.{parameter.name} has no docstring"


def test_the_model_is_left_as_it_was(name: str, family: str) -> None:
    lm = tiny_lm(family)
    before = lm.weight_hash
    state, random = torch.get_rng_state(), [parameter.requires_grad for parameter in lm.model.parameters()]
    modules = dict(lm.model.named_modules())
    edited(name, family)
    assert lm.weight_hash == before
    assert edits_on(lm) == ()
    assert not lm.model.training
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == random
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(lm.model.named_modules()) == modules


def test_the_edited_model_says_something_else_and_then_again_what_it_said(name: str, family: str) -> None:
    edit, lm = edited(name, family), tiny_lm(family)
    own = run(lm, lm.encode([FACT])).logits
    with edit.on(lm):
        assert not torch.equal(run(lm, lm.encode([FACT])).last_logits, own[:, -1])
    assert torch.equal(run(lm, lm.encode([FACT])).logits, own)


@cache
def trained() -> tuple[LM, Fact]:
    """The smallest model that knows facts, and one of them."""
    return load("organism-tiny", dtype="float32"), zoo.load_facts("organism-tiny")[20]


def test_a_model_that_knows_the_fact_says_the_new_answer_and_keeps_its_neighbors(name: str) -> None:
    """In a random model other tokens' keys are as much along the change as the subject's, so this needs a trained one."""
    lm, fact = trained()
    if "data" in {field.name for field in fields(EDITORS[name])}:
        pytest.skip("its network would have to be trained first")
    edit = EDITORS[name].fitted(lm)(lm, [fact])
    if any(isinstance(side, Introducing) for side in edit.sides):
        pytest.skip("the bundled models do not learn from their prompt")
    prompts, targets = [fact.text] * 2, [fact.target_new or "", fact.target_true]
    before = log_p(lm, prompts, targets)
    with edit.on(lm):
        after = log_p(lm, prompts, targets)
    assert before[0] < before[1]
    assert after[0] > before[0] + 1


def test_the_manifest_tells_how_it_was_made(name: str) -> None:
    edit = edited(name, "llama")
    assert edit.run["what"] == name
    assert edit.run["label"].startswith(f"{name}(")
    assert edit.run["seconds"] >= 0
    assert edit.base == tiny_lm("llama").weight_hash
    assert edit.facts == (FACT,)


def test_an_edit_can_be_made_again(name: str) -> None:
    first, again = edited(name, "llama"), small(name)(fresh_lm("llama"), [FACT])
    assert again.key == first.key


def test_a_saved_edit_works_the_same(name: str, tmp_path: Path) -> None:
    edit, lm = edited(name, "llama"), tiny_lm("llama")
    loaded = Edit.load(edit.save(tmp_path / "edit"))
    assert loaded.key == edit.key
    with edit.on(lm):
        expected = run(lm, lm.encode([FACT])).logits
    with loaded.on(lm):
        assert torch.equal(run(lm, lm.encode([FACT])).logits, expected)


def test_one_goes_on_from_an_edit(name: str) -> None:
    edited(name, "llama")
    lm = tiny_lm("llama")
    *_, last = edit_stream(small(name), lm, [FACT, OTHER])
    assert last.facts == (FACT, OTHER)
    assert last.after == ()
    with last.on(lm):
        assert edits_on(lm) == (last,)
    assert edits_on(lm) == ()


def test_only_layers_that_are_named_are_changed(name: str, family: str) -> None:
    edit, lm = edited(name, family), tiny_lm(family)
    if "layers" not in {field.name for field in fields(EDITORS[name])}:
        pytest.skip("it names no layers")
    assert all(f"{lm.layout.blocks}.2." in parameter for parameter in edit.changes)
    for change in edit.changes.values():
        matrix = change.dense() if isinstance(change, LowRank) else change
        assert bool(matrix.abs().sum() > 0)


@pytest.mark.parametrize("layers", [(), (-1,), (99,), (1, 1)])
def test_layers_that_are_not_there_are_refused(name: str, layers: tuple[int, ...]) -> None:
    if "layers" not in {field.name for field in fields(EDITORS[name])}:
        pytest.skip("it names no layers")
    with pytest.raises((ModelError, FactError, EditError)):
        replace(small(name), layers=layers)(tiny_lm("llama"), [FACT])  # type: ignore[call-arg]


def test_numbers_that_mean_nothing_are_refused_before_any_work(name: str) -> None:
    hints = get_type_hints(EDITORS[name])
    asked = {"learning_rate": (0.0, -1.0), "steps": (0, -1), "n_iter": (0,), "moment_tokens": (0,), "seed": (-1, 2**64)}
    bad = {one: asked.get(one, ()) + (math.nan, math.inf) * (hints[one] in (float, float | None)) for one in hints}
    for field in fields(EDITORS[name]):
        for value in bad[field.name]:
            with pytest.raises(InputError, match=rf"^.*{field.name}\b.*expected|steps were asked for, expected"):
                EDITORS[name](**{field.name: value})


def test_facts_that_cannot_be_edited_are_refused(name: str) -> None:
    lm, editor = tiny_lm("llama"), small(name)
    for facts, why in (
        ([], "no fact to edit"),
        ([FACT, FACT], "stands 2 times"),
        ([SAID], "has no target_new"),
    ):
        with pytest.raises(FactError, match=why):
            editor(lm, facts)


def test_where_there_are_no_gradients_no_edit_is_made(name: str) -> None:
    lm, editor = tiny_lm("llama"), small(name)
    with torch.inference_mode(), pytest.raises(EditError, match="no gradients"):
        editor(lm, [FACT])
