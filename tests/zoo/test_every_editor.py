"""Every editor runs on every bundled model, as the command line and the app do it, and leaves it as it was."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from tests.test_cli import call
from workbench import zoo
from workbench.editors import Edit, all_editors, editor_named
from workbench.edits import Introducing
from workbench.hooks import run
from workbench.loading import load

QUICK = {
    "steps": 2,
    "n_iter": 2,
    "moment_tokens": 2000,
    "prefix_lengths": (3,),
    "n_prefixes": 1,
    "n_locality": 2,
    "rank": 8,
    "batch": 2,
}


def quick(name: str) -> dict[str, object]:
    """Few steps, where the editor has such options."""
    known = {field.name for field in fields(editor_named(name))}
    return {option: value for option, value in QUICK.items() if option in known}


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Moments and trained networks go to a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("model", zoo.NAMES)
def test_every_editor_edits_a_bundled_fact(model: str) -> None:
    lm, facts = load(model, device="cpu"), [fact for fact in zoo.load_facts(model) if fact.target_new]
    fact = facts[len(facts) // 2]
    before, weights = run(lm, lm.encode([fact])).logits, lm.weight_hash
    for name in all_editors():
        edit = editor_named(name).fitted(lm, **quick(name))(lm, [fact])
        with edit.on(lm):
            after = run(lm, lm.encode([fact])).last_logits
            assert not after.equal(before[:, -1]), name
            assert after.isfinite().all(), name
        assert run(lm, lm.encode([fact])).logits.equal(before), name
        assert lm.weight_hash == weights, name


@pytest.mark.slow
@pytest.mark.parametrize("name", all_editors())
def test_every_editor_runs_from_the_command_line(name: str, tmp_path: Path) -> None:
    fact = next(fact for fact in zoo.load_facts("organism-tiny") if fact.target_new)
    options = {option: value[0] if isinstance(value, tuple) else value for option, value in quick(name).items()}
    settings = [part for option, value in options.items() for part in ("--set", f"{option}={value}")]
    ran = call("edit", name, "--model", "organism-tiny", "--fact", fact.id, *settings, "--out", tmp_path / "edit")
    assert ran.exit_code == 0, ran.output
    edit = Edit.load(tmp_path / "edit")
    assert edit.changes or edit.sides
    assert any(isinstance(side, Introducing) for side in edit.sides) or "Changed:" in ran.output
