"""The command line edits facts, compares checkpoints and runs analyses; bad input gets one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses.catalogue import all_analyses, analysis_named
from tests.test_cli import TINY, call
from workbench import zoo
from workbench.editors import Edit, all_editors
from workbench.editors.rome import Rome
from workbench.loading import load
from workbench.results import Result

FACT = next(fact for fact in zoo.load_facts(TINY) if fact.target_new)
QUICK = ["--set", "steps=2", "--set", "moment_tokens=500"]


def test_editors_and_their_options_are_listed() -> None:
    printed = call("editors").output
    assert all(name in printed for name in all_editors())
    options = call("editors", "Rome").output
    assert all(f"--set {field.name}=" in options for field in dataclasses.fields(Rome))


def test_an_edit_is_told_written_and_merged_and_its_checkpoint_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path / "results"))
    out, merged = tmp_path / "edit", tmp_path / "merged"
    ran = call("edit", "Rome", "--model", TINY, "--fact", FACT.id, *QUICK, "--out", out, "--merge", merged)
    assert ran.exit_code == 0, ran.output
    assert f"asked for {FACT.target_new!r}" in ran.output
    edit = Edit.load(out)
    assert [fact.id for fact in edit.facts] == [FACT.id]
    lm, again = load(TINY), load(merged)
    with edit.on(lm):
        for name, parameter in again.model.named_parameters():
            assert parameter.equal(lm.model.get_parameter(name)), name

    compared = call("diff", TINY, merged, "--out", tmp_path / "diff", "--figures", "svg")
    assert compared.exit_code == 0, compared.output
    assert "A single matrix changed by a rank-one edit" in compared.output
    table = pd.read_csv(tmp_path / "diff" / "diff.csv")
    assert table.loc[table["changed"], "tensor"].tolist() == list(edit.changes)
    assert Result.load(tmp_path / "diff" / "diff").run["verdict"] in compared.output
    assert (tmp_path / "diff" / "diff.svg").stat().st_size > 1000
    assert "Nothing changed" in call("diff", TINY, TINY).output


def test_edits_one_by_one_hold_all_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path / "results"))
    ran = call(
        "edit", "FineTune", "--model", TINY, "--limit", "3", "--every", "40", "--one-by-one", "--out", tmp_path / "e"
    )
    assert ran.exit_code == 0, ran.output
    assert len(Edit.load(tmp_path / "e").facts) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["edit", "Nothing", "--fact", FACT.id], "No editor is called 'Nothing'"),
        (["edit", "Rome", "--fact", FACT.id, "--set", "nothing=1"], "has no option nothing"),
        (["edit", "Rome", "--fact", FACT.id, "--set", "layers=99"], "99"),
        (["edit", "Rome", "--prompt", "A b is", "--subject", "b"], "has no target_new"),
        (["edit", "Rome", "--prompt", "A b is", "--subject", "c", "--target", "d"], "'c'"),
        (["run", "nothing"], "No analysis is called 'nothing'"),
        (["run", "located_vs_edited", "--set", "nothing=1"], "has no option nothing"),
        (["run", "weight_change", "--limit", "1", "--set", "seed=-1"], "seed is -1, expected a whole number from 0"),
        (["run", "weight_change", "--limit", "1", "--set", "resamples=0"], "resamples is 0, expected"),
        (["run", "weight_change", "--limit", "1", "--set", "editors="], "editors is empty"),
        (["run", "planted", "--limit", "1", "--set", "bound=nan"], "bound is nan"),
        (["diff", TINY, "/no/such/folder"], "no folder"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(arguments: list[str], says: str, tmp_path: Path) -> None:
    where = ["--out", str(tmp_path / "out")]
    ran = call(*arguments, *(["--model", TINY] if arguments[0] != "diff" else []), *where)
    assert ran.exit_code == 2, ran.output
    assert says in ran.output
    assert len(ran.output.strip().splitlines()) == 1
    assert "Traceback" not in ran.output


def test_options_are_checked_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.loading.load", None)
    ran = call("run", "forensics", "--model", TINY, "--limit", "1", "--set", "dropped=1,0", "--out", tmp_path)
    assert ran.exit_code == 2, ran.output
    assert "dropped is 0, expected whole numbers from 1 on" in ran.output


def test_a_change_without_a_rank_is_told_too(tmp_path: Path) -> None:
    lm = load(TINY)
    for name in ("base", "edited"):
        lm.model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    ran = call("diff", tmp_path / "base", tmp_path / "edited", "--out", tmp_path / "diff", "--figures", "")
    assert ran.exit_code == 0, ran.output
    assert pd.read_csv(tmp_path / "diff" / "diff.csv")["rank"].isna().any()
    assert any("cosine" in line and "rank" not in line for line in ran.output.splitlines())


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ran = call("edit", "Rome", "--model", TINY, "--fact", FACT.id, "--out", tmp_path)
    assert ran.exit_code == 2
    assert "not empty" in ran.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_folders_that_cannot_be_made_are_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.loading.load", None)
    (tmp_path / "file").write_text("mine")
    cases: list[tuple[list[str | Path], str]] = [
        (["--out", tmp_path / "file"], "is a file"),
        (["--out", tmp_path / "file" / "new"], "is a file"),
        (["--out", tmp_path / ("x" * 300)], "cannot be made"),
        (["--out", tmp_path / "new", "--merge", tmp_path / "file"], "is a file"),
        (["--out", tmp_path / "new", "--merge", tmp_path / "new"], "into each other"),
        (["--out", tmp_path / "new" / "edit", "--merge", tmp_path / "new"], "into each other"),
    ]
    for folders, says in cases:
        ran = call("edit", "Rome", "--model", TINY, "--fact", FACT.id, *folders)
        assert ran.exit_code == 2, ran.output
        assert says in ran.output
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("method", [name for name, editor in all_editors().items() if editor.beside_weights])
def test_what_stands_beside_the_weights_is_not_merged_and_that_is_told_first(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.loading.load", None)
    ran = call("edit", method, "--model", TINY, "--fact", FACT.id, "--out", tmp_path / "a", "--merge", tmp_path / "b")
    assert ran.exit_code == 2, ran.output
    assert "Leave out --merge" in ran.output


def test_an_unknown_editor_of_an_analysis_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.loading.load", None)
    for editors, says in (("Rome,Foo", "No editor is called 'Foo'"), ("Rome(x=3)", "Rome has no option x")):
        ran = call("run", "weight_change", "--model", TINY, "--set", f"editors={editors}", "--out", tmp_path / "out")
        assert ran.exit_code == 2, ran.output
        assert says in ran.output


def test_analyses_are_listed_and_run_on_facts_of_a_file(tmp_path: Path) -> None:
    printed = call("analyses").output
    assert all(name in printed for name in all_analyses())
    assert "--set editors=" in call("analyses", "weight_change").output
    facts = [{"id": "one", "subject": FACT.subject, "prompt": FACT.prompt, "target_new": FACT.target_new}]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    asked: list[str | Path] = [
        "run",
        "weight_change",
        "--model",
        TINY,
        "--facts",
        tmp_path / "facts.json",
        "--set",
        "editors=FineTune",
    ]
    ran = call(*asked, "--out", tmp_path / "out", "--figures", "svg")
    assert ran.exit_code == 0, ran.output
    found = Result.load(tmp_path / "out" / "weight_change")
    assert found.run["what"] == "weight_change"
    assert found.run["parameters"]["editors"] == ["FineTune"]
    assert found.run["cost"]["seconds"] > 0
    assert len(list((tmp_path / "out" / "store" / "edits").iterdir())) == 1
    assert {"weight_change.svg", "weight_change.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "easyedit").exists()
    seconds = found.run["cost"]["seconds"]
    assert f"1 fact in {seconds} s" in ran.output
    again = call(*asked, "--set", "editors=FineTune,FineTune", "--out", tmp_path / "out", "--figures", "svg")
    assert again.exit_code == 0, again.output
    assert f"1 fact from the store; it took {seconds} s" in again.output


def test_recommended_layers_are_written_for_easyedit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path / "results"))
    quick = ["--model", TINY, "--limit", "2", "--figures", "", "--set", "sweep_facts=1", "--set", "contexts=0"]
    ran = call("run", "layers_to_edit", *quick, "--set", "editors=FineTune", "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    assert [path.name for path in (tmp_path / "out" / "easyedit").iterdir()] == ["FineTune.yaml"]
    assert "layers:" in (tmp_path / "out" / "easyedit" / "FineTune.yaml").read_text()
    assert "For EasyEdit: FineTune.yaml in" in ran.output
    found = Result.load(tmp_path / "out" / "layers_to_edit")
    recommended = found.extras["recommended"].assign(yaml="")
    nothing = dataclasses.replace(found, extras={**found.extras, "recommended": recommended})
    assert analysis_named("layers_to_edit").write(nothing, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
