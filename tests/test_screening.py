"""What is compared is right on maps made by hand, and on a model the estimates along a path beat the single gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses.screening import compare, screening
from tests.examples import FACTS, tiny_lm
from workbench.facts import FactError
from workbench.gradients import At
from workbench.locators.causal_trace import CausalTrace
from workbench.results import FOOTPRINT_COLUMNS, Footprint
from workbench.store import Store


def a_map(values: list[float], *, before: float = 0.0, total: float = 1.0) -> Footprint:
    """A map of one token before the subject and 20 layers of the subject's only token."""
    table = pd.DataFrame(
        {
            "fact": "x",
            "layer": range(len(values) + 1),
            "kind": "mlp_out",
            "position": [0, *[1] * len(values)],
            "token": ["before_subject", *["subject_last"] * len(values)],
            "value": [before, *values],
        }
    )
    table["site"] = [f"L{row.layer}.mlp_out@{row.position}" for row in table.itertuples()]
    table = table.reindex(columns=list(FOOTPRINT_COLUMNS))
    return Footprint(table=table, run={}, extras={"facts": pd.DataFrame([{"fact": "x", "total_effect": total}])})


def measures(exact: Footprint, estimated: Footprint) -> dict[str, float]:
    return dict(compare(exact, estimated).set_index("measure")["value"])


def test_a_map_equals_itself() -> None:
    here = a_map([0.5, -0.4, 0.3, 0.2, 0.1, *np.linspace(0.001, 0.04, 15).tolist()])
    found = measures(here, here)
    one = ("spearman", "kendall", "pearson", "overlap_5_cells", "overlap_10_percent")
    assert [found[name] for name in one] == pytest.approx([1.0] * 5)
    assert found["error"] == 0
    assert found["large"] == found["needed"] == 5 / 20
    assert (found["recall_10_percent"], found["recall_20_percent"]) == (
        2 / 5,
        4 / 5,
    )  # the first tenth of 20 cells has 2


def test_measures_by_hand() -> None:
    exact = a_map([0.6, -0.3, 0.02, *[0.0] * 17], before=0.0, total=-2.0)
    estimated = a_map([0.2, 0.01, -0.1, 0.05, *[0.0] * 16], before=9.0)
    found = measures(exact, estimated)
    assert found["large"] == 2 / 20  # above a tenth of a unit, which 5 % of 2 are
    assert found["recall_10_percent"] == 1 / 2  # the estimate's two largest are the cells 0 and 2
    assert found["recall_20_percent"] == 1
    assert found["needed"] == 4 / 20  # cell 1 is its fourth
    assert found["error"] == pytest.approx(0.4 / 2)
    assert found["overlap_10_percent"] == 1 / 2
    none = measures(a_map([0.01] * 20), a_map([0.02, *[0.01] * 19]))
    assert (none["large"], none["needed"]) == (0, 0)
    assert np.isnan(none["recall_10_percent"])
    assert np.isnan(none["spearman"])


def test_the_summary_is_over_facts_and_the_path_beats_the_single_gradient(tmp_path: Path) -> None:
    lm, trace = tiny_lm("gpt2"), CausalTrace(samples=2, window=1)
    estimates: tuple[tuple[At, int], ...] = (("corrupted", 1), ("middle", 20))
    found = screening(lm, FACTS[:3], trace=trace, estimates=estimates, store=Store(folder=tmp_path))
    each, table = found.extras["each"], found.table
    assert len(each) == 3 * 3 * 2 * 10
    for row in table.sample(10, random_state=0).itertuples():
        own = each.query("kind == @row.kind and at == @row.at and steps == @row.steps and measure == @row.measure")
        values = own["value"].dropna()
        assert (row.value, row.least, row.most, row.n) == pytest.approx(
            (values.mean(), values.min(), values.max(), len(values))
        )
        assert row.least - 1e-9 <= row.low <= row.value <= row.high <= row.most + 1e-9
    pearson = table[table["measure"] == "pearson"].set_index(["kind", "at"])["value"]
    assert all(pearson[kind, "middle"] > pearson[kind, "corrupted"] for kind in trace.kinds)
    assert pearson.min() > 0.3
    assert found.run["of"] == "CausalTrace"
    assert found.run["parameters"]["noise"] != "s3"
    exact = trace.resolved(lm, FACTS[:3])(lm, FACTS[:3])
    pd.testing.assert_frame_equal(found.extras["facts"], exact.extras["facts"])


def test_what_has_no_estimate_is_refused() -> None:
    refused: list[dict[str, Any]] = [{"score": "rank"}, {"sever": "mlp_out", "kinds": ("resid_post",)}]
    for settings in refused:
        with pytest.raises(FactError, match=r"expected one of|severed trace"):
            screening(tiny_lm("gpt2"), FACTS[:1], trace=CausalTrace(samples=1, **settings))
