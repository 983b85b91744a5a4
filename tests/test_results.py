"""A result is saved whole or not at all, is named by its question, and joins with others of its kind."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.examples import EIFFEL, ZURICH
from workbench.locators.causal_trace import CausalTrace
from workbench.results import FOOTPRINT_COLUMNS, Footprint, Result, ResultError, join, manifest, question_key, record

MODEL = {"model": "tiny", "weight_hash": "0123456789abcdef", "dtype": "float32", "bos": None, "device": "cpu"}


def _manifest(**changes: Any) -> dict[str, Any]:
    made = manifest("CausalTrace", model=MODEL, parameters=CausalTrace(), facts=[EIFFEL], sigma=0.1)
    return {**made, **changes}


def _result(**changes: Any) -> Result:
    table = pd.DataFrame({"fact": ["a", "b"], "value": [0.1, np.nan], "layer": [0, 1]})
    return Result(
        table=table, run=_manifest(**changes), extras={"facts": pd.DataFrame({"fact": ["a"], "answer": ["東京"]})}
    )


_NONE = pd.Series([pd.NA] * 4, dtype="Int64")


def _footprint(
    fact: str = "a", values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0), kind: str = "mlp_out", **run: Any
) -> Footprint:
    """Two tokens, two layers."""
    rows = [
        {"layer": layer, "position": position, "value": values[2 * position + layer]}
        for position in (0, 1)
        for layer in (0, 1)
    ]
    table = pd.DataFrame(rows).assign(
        fact=fact, kind=kind, head=_NONE, neuron=_NONE, se=0.0, score=0.5, text=["x", "x", "y", "y"]
    )
    table["token"] = ["subject_last", "subject_last", "last", "last"]
    table["site"] = [f"L{row.layer}.{kind}@{row.position}" for row in table.itertuples()]
    extras = {"facts": pd.DataFrame({"fact": [fact]})}
    facts = [{"id": fact, "subject": "s", "prompt": "{}"}]
    return Footprint(table=table[list(FOOTPRINT_COLUMNS)], run=_manifest(facts=facts, **run), extras=extras)


# --- on disk ---


def test_a_result_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    result = _result()
    assert result.save(tmp_path / "deep" / "x") == tmp_path / "deep" / "x"
    again = Result.load(tmp_path / "deep" / "x")
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(again.extras["facts"], result.extras["facts"])
    assert again.run == json.loads(json.dumps(result.run))
    assert again.key == result.key
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["x"]


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    _result().save(tmp_path / "x")
    (tmp_path / "x" / "stray.parquet").write_text("")
    Result(table=pd.DataFrame({"new": [1]}), run=_manifest()).save(tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["run.json", "table.parquet"]
    assert list(Result.load(tmp_path / "x").table.columns) == ["new"]


@pytest.mark.parametrize("when", ["first", "again"])
def test_a_save_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    if when == "again":
        _result().save(tmp_path / "x")

    def broken(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.results.json.dumps", broken)
    with pytest.raises(KeyboardInterrupt):
        _result(sigma=7.0).save(tmp_path / "x")
    monkeypatch.undo()
    if when == "again":
        assert Result.load(tmp_path / "x").run["sigma"] == 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == (["x"] if when == "again" else [])


def _save_and_die(folder: Path, step: int) -> None:
    """A process that is killed, without cleaning up, at a step of its save."""
    import os

    import workbench.results as results

    steps = 0
    write, to_parquet, move = Path.write_text, pd.DataFrame.to_parquet, Path.replace

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if steps == step:
                os._exit(9)
            steps += 1
            return original(*args, **kwargs)

        return call

    Path.write_text, pd.DataFrame.to_parquet, Path.replace = counted(write), counted(to_parquet), counted(move)  # type: ignore[method-assign]
    results.Result(
        table=pd.DataFrame({"value": [2]}), run=_manifest(), extras={"facts": pd.DataFrame({"fact": ["b"]})}
    ).save(folder)
    os._exit(0)


@pytest.mark.parametrize("step", range(7))
def test_a_process_that_is_killed_leaves_a_whole_result_or_none(tmp_path: Path, step: int) -> None:
    folder = tmp_path / "x"
    Result(table=pd.DataFrame({"value": [1]}), run=_manifest()).save(folder)
    process = multiprocessing.get_context("fork").Process(target=_save_and_die, args=(folder, step))
    process.start()
    process.join(60)
    assert process.exitcode == (0 if step == 6 else 9)
    if folder.exists():
        assert Result.load(folder).table["value"].tolist() == [2 if step == 6 else 1]
    else:
        assert step == 5  # between moving the old one away and the new one in


@pytest.mark.parametrize("lost", ["run.json", "table.parquet", "facts.parquet"])
def test_a_folder_that_lacks_a_file_holds_no_result(tmp_path: Path, lost: str) -> None:
    _result().save(tmp_path / "x")
    (tmp_path / "x" / lost).unlink()
    with pytest.raises(ResultError, match=r"holds no complete result .* Compute it again"):
        Result.load(tmp_path / "x")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"extras": [], "class": 1', '{"extras": 3, "class": "Result"}']
)
def test_a_damaged_manifest_holds_no_result(tmp_path: Path, text: str) -> None:
    _result().save(tmp_path / "x")
    (tmp_path / "x" / "run.json").write_text(text)
    with pytest.raises(ResultError, match="holds no complete result"):
        Result.load(tmp_path / "x")


def test_a_manifest_that_forgets_a_table_holds_no_result(tmp_path: Path) -> None:
    _result().save(tmp_path / "x")
    path = tmp_path / "x" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extras": []}))
    with pytest.raises(ResultError, match="holds no complete result"):
        Result.load(tmp_path / "x")


def test_a_file_in_a_results_place_makes_room(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert Result.load(_result().save(tmp_path / "x")).key == _result().key
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_damaged_table_holds_no_result(tmp_path: Path) -> None:
    _result().save(tmp_path / "x")
    path = tmp_path / "x" / "table.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResultError, match="holds no complete result"):
        Result.load(tmp_path / "x")


def test_a_manifest_takes_what_json_does_not_know() -> None:
    @dataclass(frozen=True)
    class Parameters:
        where: Path
        layers: tuple[int, ...]
        step: float
        nothing: None = None

    made = record(Parameters(where=Path("a/b"), layers=(1, 2), step=np.float64(0.5)))
    assert json.loads(json.dumps(made)) == {"where": "a/b", "layers": [1, 2], "step": 0.5}


# --- the question ---


def test_the_key_names_the_question_and_not_the_circumstances() -> None:
    key = question_key(_manifest())
    assert len(key) == 16
    assert (
        question_key(_manifest(made="another day", versions={}, device="cuda", model="/elsewhere", self_checks={}))
        == key
    )
    assert question_key(json.loads(json.dumps(_manifest()))) == key


@pytest.mark.parametrize(
    "change",
    [
        {"weight_hash": "0"},
        {"dtype": "bfloat16"},
        {"bos": True},
        {"what": "Other"},
        {"parameters": record(CausalTrace(seed=2))},
        {"parameters": record(CausalTrace(window=3))},
        {"facts": [record(ZURICH)]},
        {"facts": [record(replace(EIFFEL, target_true="Rome"))]},
        {"facts": [record(EIFFEL), record(ZURICH)]},
    ],
    ids=str,
)
def test_whatever_changes_the_answer_changes_the_key(change: Mapping[str, Any]) -> None:
    assert question_key(_manifest(**change)) != question_key(_manifest())


# --- footprints ---


def test_a_footprint_must_have_its_columns() -> None:
    with pytest.raises(ResultError, match="lacks fact, site"):
        Footprint(table=pd.DataFrame({"layer": [0]}), run={})


def test_rows_of_heads_and_neurons_are_kept_apart_from_whole_ones() -> None:
    whole = _footprint(kind="z")
    heads = [whole.table.assign(head=pd.array([h] * 4, dtype="Int64"), value=whole.table["value"] * h) for h in (1, 2)]
    only = Footprint(table=pd.concat(heads, ignore_index=True), run=whole.run)
    both = Footprint(table=pd.concat([whole.table, *heads], ignore_index=True), run=whole.run)
    assert both.grid(kind="z").equals(whole.grid(kind="z"))
    assert len(both.heads()) == len(only.heads()) == 8
    assert both.neurons().empty
    assert both.profile(kind="z")["value"].to_list() == [3, 4]
    assert only.profile(kind="z")["value"].to_list() == [6, 8]  # the larger head of the larger token
    assert only.profile(kind="z", token="subject_last")["value"].to_list() == [2, 4]
    with pytest.raises(ResultError, match="single heads or neurons"):
        only.grid(kind="z")


def test_what_belongs_to_no_token_has_a_profile_and_no_map() -> None:
    table = _footprint().table.iloc[:2].assign(position=pd.array([pd.NA, pd.NA], dtype="Int64"), token="all", text="")
    here = Footprint(table=table, run=_footprint().run)
    assert here.profile(kind="mlp_out")["value"].to_list() == [1, 2]
    with pytest.raises(ResultError, match="belongs to no token"):
        here.grid(kind="mlp_out")


def test_a_grid_has_tokens_down_and_layers_across() -> None:
    here = _footprint()
    assert here.grid(kind="mlp_out").to_numpy().tolist() == [[1, 2], [3, 4]]
    assert here.grid(kind="mlp_out", column="score").to_numpy().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert here.tokens().to_dict("list") == {"text": ["x", "y"], "token": ["subject_last", "last"]}


def test_the_peak_is_the_row_with_the_largest_value() -> None:
    peak = _footprint(values=(1, 7, -9, 3)).peak(kind="mlp_out")
    assert (peak["layer"], peak["position"], peak["value"]) == (1, 0, 7)


def test_a_profile_averages_over_a_roles_tokens_and_then_over_facts() -> None:
    both = join([_footprint("a", (1, 2, 5, 0)), _footprint("b", (3, 6, 0, 1))])
    profile = both.profile(kind="mlp_out", token="subject_last")
    assert profile["value"].tolist() == [2, 4]
    assert profile["n"].tolist() == [2, 2]
    assert profile["se"].tolist() == pytest.approx([1, 2])  # half the distance of two numbers
    assert both.profile(kind="mlp_out")["value"].tolist() == [4, 4]  # the largest of each fact: 5 and 3, 2 and 6


def test_rows_that_are_not_there_are_named() -> None:
    both = join([_footprint("a"), _footprint("b")])
    with pytest.raises(ResultError, match=r"no row for fact None and kind 'z'\. Facts: a, b"):
        both.of(kind="z")
    with pytest.raises(ResultError, match=r"has 2 facts\. Name one of them"):
        both.grid(kind="mlp_out")
    assert both.grid(kind="mlp_out", fact="b").shape == (2, 2)
    assert (both.facts, both.kinds) == (("a", "b"), ("mlp_out",))


# --- joining ---


def test_joined_results_hold_all_rows_and_all_facts_once() -> None:
    parts = [_footprint("a", kind="mlp_out"), _footprint("a", kind="attn_out"), _footprint("b", kind="mlp_out")]
    whole = join(parts)
    assert isinstance(whole, Footprint)
    assert len(whole.table) == 12
    assert whole.table.index.tolist() == list(range(12))
    assert [fact["id"] for fact in whole.run["facts"]] == ["a", "b"]
    assert whole.extras["facts"]["fact"].tolist() == ["a", "b"]
    assert join(parts[:1]) is parts[0]


def test_what_does_not_belong_together_is_not_joined() -> None:
    with pytest.raises(ResultError, match="no result to join"):
        join([])
    with pytest.raises(ResultError, match="different weight_hash"):
        join([_footprint("a"), _footprint("b", weight_hash="0")])
    with pytest.raises(ResultError, match="different what"):
        join([_footprint("a"), _footprint("b", what="Other")])
    with pytest.raises(ResultError, match=r"different extra tables .*: facts and none"):
        join([_footprint("a"), replace(_footprint("b"), extras={})])


def _save_many(folder: Path) -> None:
    for number in range(40):
        Result(table=pd.DataFrame({"value": [number]}), run=_manifest()).save(folder / str(number))


def test_processes_that_store_the_same_results_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_many, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert all(Result.load(tmp_path / str(number)).table["value"].tolist() == [number] for number in range(40))
    assert not list(tmp_path.glob(".writing-*"))
