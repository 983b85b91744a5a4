"""What each shortcut gives up, and no more than that."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.examples import EIFFEL, SAID, tiny_lm
from workbench import zoo
from workbench.facts import FactError
from workbench.loading import load
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.results import Footprint

ORGANISM = "organism-tiny"


@cache
def organism() -> LM:
    return load(ORGANISM)


@cache
def traced(**options: Any) -> Footprint:
    facts = zoo.load_facts(ORGANISM)
    trace = CausalTrace(window=2, samples=8).resolved(organism(), facts)
    return replace(trace, **options)(organism(), facts[:4])


def test_what_a_screened_map_computes_is_exact_and_the_rest_is_marked() -> None:
    exact, screened = traced().table, traced(screen=0.1).table
    computed = ~screened["estimated"]
    assert 0.1 < computed.mean() < 1
    assert np.allclose(screened["value"][computed], exact["value"][computed], atol=1e-6)
    assert not np.allclose(screened["value"][~computed], exact["value"][~computed], atol=1e-6)
    total = exact["fact"].map(traced().extras["facts"].set_index("fact")["total_effect"])
    large = exact["value"].abs() > 0.05 * total
    assert large.any()
    assert not (large & screened["estimated"]).any()
    told = traced(screen=0.1).run["screened"]
    assert told["computed"] == computed[screened["token"] != "before_subject"].mean()
    assert 0 < told["rms_error_there"] < 1


def test_a_screen_without_more_computes_its_share_of_every_kind() -> None:
    table = traced(screen=0.1, screen_more=False).table
    known = table["token"] == "before_subject"  # restored, they change nothing
    assert known.any()
    assert not table["estimated"][known].any()
    for _, rows in table[~known].groupby(["fact", "kind"]):
        assert (~rows["estimated"]).sum() == np.ceil(0.1 * len(rows))


@pytest.mark.parametrize("options", [{"screen": 0.1}, {"adaptive": 0.02}])
@pytest.mark.parametrize("kind", ["mlp_out", "attn_out"])
def test_kinds_do_not_matter_to_each_other(options: dict[str, Any], kind: str) -> None:
    """They are stored one by one."""
    together, alone = traced(**options), traced(**options, kinds=(kind,))
    both = together.of(kind=kind).reset_index(drop=True)
    assert np.allclose(alone.table["value"], both["value"], atol=1e-6)
    assert np.allclose(alone.table["se"], both["se"], atol=1e-6)
    assert np.allclose(alone.extras["facts"]["corrupted"], together.extras["facts"]["corrupted"], atol=1e-6)
    if "screen" in options:
        assert (alone.table["estimated"] == both["estimated"]).all()


def test_a_screen_of_cells_that_change_nothing_has_nothing_to_do() -> None:
    found = traced(screen=0.1, token="before_subject").table
    assert (found["value"] == 0).all()
    assert not found["estimated"].any()


def test_cells_stop_sampling_once_they_are_sure_enough() -> None:
    exact, adaptive = traced(), traced(adaptive=0.02)
    taken = adaptive.extras["samples"].groupby(["fact", "site"], sort=False)["sample"].agg(["count", "max"])
    assert taken["count"].min() < 8
    assert taken["count"].max() == 8
    assert (taken["max"] == taken["count"] - 1).all()  # the first ones, in their order
    both = exact.extras["samples"].merge(adaptive.extras["samples"], on=["fact", "site", "sample"], suffixes=("", "_a"))
    assert len(both) == len(adaptive.extras["samples"])
    assert np.allclose(both["score"], both["score_a"], atol=1e-6)
    assert (adaptive.extras["facts"]["corrupted"] == exact.extras["facts"]["corrupted"]).all()
    least = adaptive.table.groupby(["fact", "kind"])["value"].transform(lambda values: values.abs().max())
    stopped = (taken["count"] < 8).to_numpy()
    assert (adaptive.table["se"] <= 0.03 * least)[stopped].all()  # the largest may have changed since they stopped
    everything = traced(adaptive=1e-9).table  # never sure
    nothing_to_learn = everything["se"] == 0
    assert np.allclose(everything["value"], exact.table["value"], atol=1e-6)
    assert nothing_to_learn.any()


def test_dropped_runs_cost_little_and_a_wide_tolerance_drops_all() -> None:
    exact, near = traced().table, traced(tolerance=0.01).table
    assert 0 < (exact["value"] - near["value"]).abs().max() < 0.01
    dropped = traced(tolerance=0.999).table
    states = dropped[(dropped["kind"] == "mlp_out") & (dropped["layer"] < 2) & (dropped["token"] == "subject_middle")]
    assert (states["value"] == 0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"screen": 0.0}, "screen is 0.0, expected a share between 0 and 1"),
        ({"adaptive": 2.0}, "adaptive is 2.0, expected a share between 0 and 1"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"screen": "0.1"}, "screen is '0.1', expected a number"),
        ({"screen_more": "no"}, "screen_more is 'no', expected True or False"),
        ({"screen": 0.1, "engine": "loop"}, "The loop is exact and takes no screen"),
        ({"screen": 0.1, "adaptive": 0.1}, "Give one of them"),
        ({"screen": 0.1, "score": "rank"}, "A rank has no gradient"),
        ({"screen": 0.1, "sever": "mlp_out", "kinds": ("resid_post",)}, "A severed path has no gradient"),
    ],
)
def test_what_cannot_be_is_said_at_once(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FactError, match=sentence):
        CausalTrace(**options)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "falcon"])
def test_shortcuts_work_where_blocks_are_taken_to_pieces_and_where_not(family: str) -> None:
    lm = tiny_lm(family)
    trace = CausalTrace(window=2, samples=4).resolved(lm, [EIFFEL, SAID])
    exact = trace(lm, [SAID]).table["value"]
    every: list[dict[str, Any]] = [{"adaptive": 0.01}, {"tolerance": 1e-6}, {"screen": 0.3}]
    for options in every:
        found = replace(trace, **options)(lm, [SAID]).table
        assert np.isfinite(found["value"]).all()
        if "tolerance" in options:
            assert np.allclose(found["value"], exact, atol=1e-5)
