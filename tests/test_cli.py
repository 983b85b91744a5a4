"""The command line traces a fact, goes on where it stopped, and answers bad input with one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from workbench import zoo
from workbench.cli import app
from workbench.locators import all_locators
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.progress import Cancelled
from workbench.results import Footprint

TINY = "organism-tiny"
QUICK = ["--model", TINY, "--samples", "2"]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_models_lists_what_is_bundled() -> None:
    printed = call("models").output
    for name in zoo.NAMES:
        assert name in printed
    assert "llama" in printed


def test_the_package_is_the_command_line() -> None:
    ran = subprocess.run([sys.executable, "-m", "workbench", "models"], capture_output=True, text=True, check=True)
    assert ran.stdout == call("models").output


def test_facts_can_be_searched() -> None:
    fact = zoo.load_facts(TINY)[3]
    printed = call("facts", "--model", TINY, "--find", fact.text).output
    assert f"{fact.text} -> {fact.target_true}" in printed
    assert call("facts", "--model", TINY, "--find", "no such thing").exit_code == 2


def test_one_fact_is_traced_drawn_and_stored(tmp_path: Path) -> None:
    fact = zoo.load_facts(TINY)[0]
    ran = call(
        "trace", *QUICK, "--prompt", fact.text, "--subject", fact.subject, "--out", tmp_path, "--figures", "pdf,svg"
    )
    assert ran.exit_code == 0, ran.output
    assert f"-> {fact.target_true}\n" in ran.output
    stored = [Footprint.load(path.parent) for path in tmp_path.glob("*/run.json")]
    assert {footprint.kinds for footprint in stored} == {("resid_post",), ("mlp_out",), ("attn_out",)}
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".pdf", ".svg", ".csv"}


def test_ids_never_share_a_file_nor_leave_the_folder(tmp_path: Path) -> None:
    fact = zoo.load_facts(TINY)[0]
    ids = ["../../x", "..-..-x", "Abc", "abc", "x" * 400]
    records = [{"id": name, "subject": fact.subject, "prompt": fact.prompt} for name in ids]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    ran = call("trace", *QUICK, "--facts", tmp_path / "facts.json", "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    pdfs = list((tmp_path / "out").glob("*.pdf"))
    assert len({path.name.lower() for path in pdfs}) == len(ids)
    assert not list(tmp_path.glob("*.pdf"))


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    of_file = f"{str(file)!r} is a file. Name another folder.\n"
    for out, says in ((file, of_file), (file / "a" / "b", of_file), (tmp_path / ("x" * 300), "Name another folder.\n")):
        for command in (["trace", *QUICK, "--prompt", "A b is", "--subject", "b"], ["diff", TINY, "/no/such/folder"]):
            ran = call(*command, "--out", out)
            assert ran.exit_code == 2
            assert ran.output.endswith(says)
            assert len(ran.output.splitlines()) == 1


def test_what_the_model_does_not_know_is_said(tmp_path: Path) -> None:
    fact = zoo.load_facts(TINY)[0]
    asked: list[str | Path] = [
        "--prompt",
        fact.text,
        "--subject",
        fact.subject,
        "--answer",
        "the",
        "--out",
        tmp_path,
        "--figures",
        "",
    ]
    ran = call("trace", *QUICK, *asked)
    assert f"the model says '{fact.target_true}'" in ran.output
    assert "knows 0 of 1 fact." in ran.output


def test_methods_and_their_options_are_listed() -> None:
    printed = call("locators").output
    assert all(name in printed for name in all_locators())
    options = call("locators", "CausalTrace").output
    assert all(f"--set {field.name}=" in options for field in dataclasses.fields(CausalTrace))
    assert call("locators", "Nothing").exit_code == 2


def test_any_method_locates_a_bundled_fact_with_options_set_in_words(tmp_path: Path) -> None:
    fact = zoo.load_facts(TINY)[0]
    settings = ["--set", "steps=2", "--set", "at=both", "--set", "samples=2", "--set", "kinds=mlp_out"]
    ran = call("locate", "AttributionPatching", "--model", TINY, "--fact", fact.id, "--out", tmp_path, *settings)
    assert ran.exit_code == 0, ran.output
    (stored,) = (Footprint.load(path.parent) for path in tmp_path.glob("*/run.json"))
    assert stored.run["parameters"]["steps"] == 2
    assert stored.kinds == ("mlp_out",)
    assert len(list(tmp_path.glob("*.pdf"))) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["Nothing"], "No locating method is called 'Nothing'"),
        (["CausalTrace", "--set", "window"], "Write --set name=value"),
        (["CausalTrace", "--set", "size=3"], "has no option size"),
        (["CausalTrace", "--set", "window=wide"], "window is 'wide', expected a whole number"),
        (["CausalTrace", "--set", "corrupt=no"], "corrupt is 'no', expected one of"),
        (["CausalTrace", "--set", "samples=0"], "0 noise samples"),
        (["CausalTrace", "--fact", "nothing/nobody"], "has no fact 'nothing/nobody'"),
        (["CausalTrace", "--fact", "x", "--prompt", "A"], "Both --fact and --prompt"),
    ],
)
def test_a_wrong_method_or_setting_gets_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    given = [] if "--fact" in arguments else ["--limit", "1"]
    ran = call("locate", *arguments, "--model", TINY, "--out", tmp_path, *given)
    assert ran.exit_code == 2
    assert sentence in ran.output
    assert len(ran.output.strip().splitlines()) == 1


def test_methods_are_compared_and_what_cannot_run_is_told(tmp_path: Path) -> None:
    methods = "CausalTrace,AttributionPatching"
    ran = call(
        "compare", "--model", TINY, "--methods", methods, "--limit", "2", "--out", tmp_path, "--figures", "pdf,png"
    )
    assert ran.exit_code == 0, ran.output
    assert "CausalTrace: 2 facts computed" in ran.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "footprints", "agreement", "agreement.csv", "compare.pdf", "compare.png", "agreement.pdf", "agreement.png"
    }  # fmt: skip


@pytest.mark.parametrize("methods", ["LogitLens,LogitLens", "LogitLens", "LogitLens,AttentionKnockout,LogitLens"])
def test_fewer_than_two_different_methods_are_refused_before_the_work(tmp_path: Path, methods: str) -> None:
    ran = call("compare", "--model", TINY, "--methods", methods, "--limit", "1", "--out", tmp_path)
    assert ran.exit_code == 2
    assert ran.output.startswith(f"The methods are {methods.replace(',', ', ')}; expected two different ones")
    assert not list(tmp_path.iterdir())


def test_a_result_that_lost_its_tables_or_its_place_is_computed_again(tmp_path: Path) -> None:
    options = ["--model", TINY, "--limit", "1", "--figures", "", "--out", str(tmp_path)]
    command = ["locate", "DirectLogitAttribution", *options]
    assert "1 fact computed" in call(*command).output
    (stored,) = tmp_path.glob("*/run.json")
    run = json.loads(stored.read_text())
    stored.write_text(json.dumps({**run, "extras": []}))
    assert "1 fact computed" in call(*command).output
    assert json.loads(stored.read_text())["extras"] == run["extras"]
    shutil.rmtree(stored.parent)
    stored.parent.write_text("in the way")
    assert "1 fact computed" in call(*command).output
    assert Footprint.load(stored.parent).facts
    assert "Nothing was computed" in call(*command).output


def test_the_figure_of_shares_is_drawn_as_the_text_and_the_page_say_them(tmp_path: Path) -> None:
    settings = ["--limit", "1", "--set", "kinds=resid_pre", "--figures", "svg"]
    ran = call("locate", "ActivationPatching", "--model", TINY, "--out", tmp_path, *settings)
    assert ran.exit_code == 0, ran.output
    (svg,) = tmp_path.glob("*.svg")
    assert ">share of the total effect<" in svg.read_text().split("</metadata>")[1]


def facts_file(folder: Path, n: int) -> Path:
    records = [
        {"known_id": i, "subject": f.subject, "attribute": f.target_true, "template": f.prompt, "prompt": f.text}
        for i, f in enumerate(zoo.load_facts(TINY)[:n])
    ]
    path = folder / "known.json"
    path.write_text(json.dumps(records))
    return path


def test_a_file_of_facts_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = facts_file(tmp_path, 3), tmp_path / "out"
    command: list[str | Path] = ["trace", *QUICK, "--facts", file, "--out", out, "--figures", ""]
    asked: list[str] = []
    real, most = CausalTrace.locate_together, 2

    def counted(self: CausalTrace, lm: LM, pieces: Any, **options: Any) -> list[Footprint]:
        if len(asked) == most:
            raise Cancelled
        asked.append(pieces[0][0].id)
        return real(self, lm, pieces, **options)

    monkeypatch.setattr(CausalTrace, "locate_together", counted)
    assert isinstance(call(*command).exception, Cancelled)
    assert len(list(out.glob("*/run.json"))) == 2 * 3
    most = 9
    asked.clear()
    assert call(*command).exit_code == 0
    assert asked == ["known-2"]
    assert list(pd.read_csv(out / "facts.csv")["fact"]) == ["known-0", "known-1", "known-2"]


def test_the_average_writes_its_table_and_figure(tmp_path: Path) -> None:
    ran = call("average", *QUICK, "--limit", "3", "--out", tmp_path, "--figures", "pdf")
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "average.pdf").read_bytes().startswith(b"%PDF")
    table = pd.read_parquet(tmp_path / "average" / "table.parquet")
    assert set(table["kind"]) == {"resid_post", "mlp_out", "attn_out"}
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "The tower is in", "--subject", "bridge"], "'bridge' is not in the prompt"),
        (["--prompt", " ", "--subject", "x"], "The prompt is empty"),
        (["--prompt", "A b", "--subject", ""], "The subject is empty"),
        (["--prompt", "A b is", "--subject", "b", "--noise", "x9"], "spells no noise"),
        (["--prompt", "A b is", "--subject", "b", "--samples", "0"], "Invalid value for '--samples'"),
        (["--prompt", "A b is", "--subject", "b", "--window", "-1"], "Invalid value for '--window'"),
        (["--prompt", "A b is", "--subject", "b", "--figures", "gif"], "Unknown figure format gif"),
        (["--prompt", "A b is", "--subject", "b", "--model", "no/such/folder"], "There is no folder"),
        (["--prompt", "A b is", "--subject", "b", "--model", "x" * 300], "of 300 characters cannot be a model's name"),
        (["--prompt", "A b is " * 100, "--subject", "b"], "positions"),
        (["--prompt", "A b is", "--subject", "b", "--seed", "-1"], "The seed is -1"),
        (["--prompt", "A b is", "--subject", "b", "--noise", "1e400"], "up to"),
        (["--prompt", "A b is", "--subject", "b", "--device", "meta"], "holds no numbers"),
        (["--facts", "nowhere.json"], "There is no file"),
        (["--facts", "nowhere.json", "--prompt", "A"], "Both --facts and --prompt"),
    ],
)
def test_bad_input_gets_one_sentence_and_no_traceback(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    ran = call("trace", "--model", TINY, "--out", tmp_path, *arguments)
    assert ran.exit_code == 2
    assert sentence in ran.output
    assert "Traceback" not in ran.output
    assert not list(tmp_path.glob("*/run.json"))
