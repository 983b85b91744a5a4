"""Superposition: P against its formula, pair by pair; ROME's interference is P, to the last digits; what averaging keys does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from analyses.catalogue import analysis_named
from analyses.superposition import _kurtosis_interval, agreement, chart, inner_products, summary, superposition
from tests.examples import EIFFEL, FACTS
from tests.tiny_models import tiny_lm_parts
from workbench.charts import CellPlot, ScatterPlot
from workbench.editors._values import read_keys
from workbench.facts import FactError
from workbench.models import LM
from workbench.moments import second_moments
from workbench.results import Result
from workbench.store import Store

TOKENS = 600
KNOWN = [
    replace(fact, target_new=new) for fact, new in zip(FACTS, ("Rome", "Paris", "Google", "London", "Rio"), strict=True)
]


@pytest.fixture(scope="module")
def lm() -> LM:
    """In float64, so that what is exact is exact."""
    model, tokenizer = tiny_lm_parts("gpt2", 0)
    return LM(model.double(), tokenizer, name="tiny-gpt2")


@pytest.fixture(scope="module")
def found(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RESULTS", str(tmp_path_factory.mktemp("results")))
        return superposition(lm, KNOWN, corpus="bundled", moment_tokens=TOKENS, edits=2, resamples=200)


def test_p_is_the_formula_pair_by_pair(lm: LM, found: Result, tmp_path: Path) -> None:
    layer = 2
    c = second_moments(lm, [layer], corpus="bundled", tokens=TOKENS, folder=tmp_path).matrix(layer).numpy()
    keys = dict(zip([f.id for f in KNOWN], read_keys(lm, KNOWN, [layer])[layer][:, 0].double().numpy(), strict=True))
    pairs = found.extras["pairs"]
    pairs = pairs[pairs["layer"] == layer]
    assert len(pairs) == len(KNOWN) * (len(KNOWN) - 1)
    for row in pairs.itertuples():
        first, second = keys[row.fact], keys[row.other]
        expected = first @ np.linalg.solve(c, second) / (first @ np.linalg.solve(c, first))
        assert row.p == pytest.approx(expected, rel=1e-6, abs=1e-9)
    row = found.table.set_index("layer").loc[layer]
    assert row["kurtosis"] == pytest.approx(stats.kurtosis(pairs["p"]))
    assert row["n"] == len(pairs)


def test_what_rome_does_to_other_values_is_p(found: Result) -> None:
    one = found.extras["interference"]
    one = one[one["keys"] == "alone"]
    assert len(one) == 2 * (len(KNOWN) - 1)
    assert one["p"].abs().max() > 0.01
    assert np.allclose(one["measured"], one["p"], rtol=1e-8, atol=1e-10)
    assert np.allclose(
        one["size"], one["p"].abs() * one["delta"], rtol=1e-8, atol=1e-10
    )  # along the edit's own change, no other


def test_averaged_keys_part_from_p_and_follow_the_mean_key(found: Result) -> None:
    one = found.extras["interference"]
    one = one[one["keys"] == "averaged"]
    assert (one["measured"] - one["p"]).abs().max() > 1e-3
    assert np.allclose(one["measured"], one["own"], rtol=1e-8, atol=1e-10)
    told = agreement(found.extras["interference"]).set_index("keys")
    assert told.loc["alone", "correlation"] == pytest.approx(1)
    assert told.loc["alone", "largest"] < 1e-8 < told.loc["averaged", "largest"]


def test_orthogonal_keys_do_not_interfere() -> None:
    c = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    inner = inner_products(torch.eye(3)[:2], torch.eye(3), c)
    assert torch.allclose(inner, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.0]], dtype=torch.float64))


def test_the_interval_is_the_bootstrap_over_facts() -> None:
    rng = np.random.default_rng(3)
    p, counted = rng.standard_t(4, size=(9, 9)), ~np.eye(9, dtype=bool)
    low, high = _kurtosis_interval(p, counted, resamples=300, seed=5)
    weights = np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), size=300)
    slow = []
    for weight in weights:
        drawn = np.repeat(np.arange(9), weight)
        slow.append(stats.kurtosis(p[drawn][:, drawn][counted[drawn][:, drawn]]))
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))))


def test_one_subject_is_told_apart(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    twin = replace(EIFFEL, id="twin", prompt="The {} is in")
    found = superposition(lm, [*KNOWN[:3], twin], corpus="bundled", moment_tokens=TOKENS, edits=0, layers=(1,))
    assert int(found.table["n"].iloc[0]) == 4 * 3 - 2
    same = found.extras["pairs"].set_index(["fact", "other"])["same_subject"]
    assert same["eiffel", "twin"]
    assert same.sum() == 2
    bare = superposition(
        lm, [*KNOWN[:3], twin], corpus="bundled", moment_tokens=TOKENS, edits=0, layers=(1,), where="subject"
    )
    assert bare.extras["pairs"].set_index(["fact", "other"]).loc[("eiffel", "twin"), "p"] == pytest.approx(1)
    assert "Knowledge" in chart(found).title
    alone = superposition(lm, [EIFFEL, twin], corpus="bundled", moment_tokens=TOKENS, edits=0, layers=(1,))
    assert alone.table["n"].tolist() == [0]
    assert alone.table["kurtosis"].isna().all()
    assert alone.extras["pairs"]["p"].notna().all()
    assert "nan" in summary(alone)
    assert [type(plot) for plot in chart(alone).plots] == [CellPlot]
    with pytest.raises(FactError, match="only fact"):
        superposition(lm, [EIFFEL], corpus="bundled")
    with pytest.raises(FactError, match="no fact to compare"):
        superposition(lm, [], corpus="bundled")


def test_chart_summary_and_disk(found: Result, tmp_path: Path) -> None:
    again = Result.load(found.save(tmp_path / "found"))
    assert summary(again) == summary(found)
    scatter = chart(again).plots[2]
    assert isinstance(scatter, ScatterPlot)
    assert scatter.diagonal
    assert len(scatter.rows) == len(found.extras["interference"])
    assert "1.0000" in summary(found)


def test_from_the_catalogue_with_the_store(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    store, analysis = Store(folder=tmp_path / "store"), analysis_named("superposition")
    options = {"corpus": "bundled", "moment_tokens": TOKENS, "edits": 1, "keys": ("alone",), "resamples": 50}
    first = analysis(lm, KNOWN[:3], store=store, **options)
    assert len(list((store.folder / "edits").iterdir())) == 1
    again = analysis(lm, KNOWN[:3], store=store, **options)
    assert again.run["made"] == first.run["made"]
    assert again.extras["interference"].equals(first.extras["interference"])
