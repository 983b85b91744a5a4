"""A store finds what it has computed, and counts what is incomplete as absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.examples import EIFFEL, fresh_lm, tiny_lm
from tests.tiny_models import tiny_tokenizer
from workbench.asked import WHAT, list_asked
from workbench.facts import FactError
from workbench.hooks import patched
from workbench.locators import locate
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.results import Footprint, Result, question_key
from workbench.sites import Site
from workbench.store import Store, results_folder


def _result(what: str = "Test") -> Result:
    return Result(
        table=pd.DataFrame({"value": [1.5]}), run={"what": what, "weight_hash": "0", "parameters": {}, "facts": []}
    )


def test_what_was_saved_is_found_by_its_question(tmp_path: Path) -> None:
    store, result = Store(folder=tmp_path / "results"), _result()
    assert store.find(result.run, Result) is None
    assert store.save(result) == tmp_path / "results" / result.key
    found = store.find({**result.run, "made": "now"}, Result)
    assert found is not None
    pd.testing.assert_frame_equal(found.table, result.table)
    assert store.find({**result.run, "what": "Other"}, Result) is None
    assert store.get(question_key(result.run), Result) is not None


def test_a_bundled_result_is_found_and_an_own_one_comes_first(tmp_path: Path) -> None:
    bundled, store = Store(folder=tmp_path / "bundled"), Store(folder=tmp_path / "own", bundled=tmp_path / "bundled")
    result = _result()
    bundled.save(result)
    found = store.find(result.run, Result)
    assert found is not None
    own = Result(table=pd.DataFrame({"value": [9.0]}), run=result.run)
    store.save(own)
    found = store.find(result.run, Result)
    assert found is not None
    assert found.table["value"].tolist() == [9.0]
    assert bundled.find(result.run, Result) is not None


@pytest.mark.parametrize("lost", ["run.json", "table.parquet"])
def test_an_incomplete_folder_counts_as_none_and_is_written_over(tmp_path: Path, lost: str) -> None:
    store, result = Store(folder=tmp_path), _result()
    (store.save(result) / lost).unlink()
    assert store.find(result.run, Result) is None
    store.save(result)
    assert store.find(result.run, Result) is not None


@pytest.mark.parametrize("text", ["", "[]", "null", '{"what"'])
def test_a_damaged_manifest_counts_as_none(tmp_path: Path, text: str) -> None:
    store, result = Store(folder=tmp_path), _result()
    (store.save(result) / "run.json").write_text(text)
    assert store.find(result.run, Result) is None


def test_a_result_of_another_kind_counts_as_none(tmp_path: Path) -> None:
    store, result = Store(folder=tmp_path), _result()
    store.save(result)
    assert store.find(result.run, Footprint) is None


def test_manifests_come_newest_first_and_damaged_ones_not_at_all(tmp_path: Path) -> None:
    store = Store(folder=tmp_path)
    assert Store(folder=tmp_path / "nowhere").manifests() == []
    for age, what in ((30, "old"), (10, "new"), (20, "middle")):
        path = store.save(_result(what)) / "run.json"
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    (store.save(_result("damaged")) / "run.json").write_text("{")
    (tmp_path / ".writing-abc" / "x").mkdir(parents=True)
    found = store.manifests()
    assert [run["what"] for _, run in found] == ["new", "middle", "old"]
    assert found[0][0] == _result("new").key


def test_the_results_folder_is_the_environments_or_the_current_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WORKBENCH_RESULTS", raising=False)
    assert results_folder() == Path("results")
    monkeypatch.setenv("WORKBENCH_RESULTS", "")
    assert results_folder() == Path("results")
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    assert results_folder() == tmp_path


def test_a_manifest_of_another_shape_is_passed_over(tmp_path: Path) -> None:
    for name, text in {"a": "[]", "b": "null", "c": "3", "d": "{", "e": "[" * 100_000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    assert Store(folder=tmp_path).manifests() == []
    for run in ({"what": WHAT}, {"what": WHAT, "parameters": {}, "facts": []}):
        (tmp_path / "a" / "run.json").write_text(json.dumps(run))
        assert list_asked(Store(folder=tmp_path)) == []


def test_the_same_weights_under_another_config_or_tokenizer_are_another_question(tmp_path: Path) -> None:
    store, trace = Store(folder=tmp_path), CausalTrace(samples=1, noise=0.5, kinds=("resid_post",))
    lm = fresh_lm("llama")
    before = locate(trace, lm, [EIFFEL], store=store).key
    lm.model.config.rope_parameters["rope_theta"] = 10.0
    after = locate(trace, lm, [EIFFEL], store=store)
    assert after.run["weight_hash"] == lm.weight_hash
    assert after.key != before
    other = LM(lm.model, tiny_tokenizer("byte_level"))
    assert other.setup_hash != lm.setup_hash


def test_nothing_is_stored_of_a_patched_model(tmp_path: Path) -> None:
    lm, store = tiny_lm("gpt2"), Store(folder=tmp_path)
    trace = CausalTrace(samples=1, noise=0.5, kinds=("resid_post",))
    with patched(lm, {Site(layer=0, kind="mlp_out"): torch.zeros_like}), pytest.raises(FactError, match="Use no store"):
        locate(trace, lm, [EIFFEL], store=store)
    assert store.manifests() == []
