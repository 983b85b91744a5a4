"""The average counts every token once, its intervals are a bootstrap over facts, and the default model shows its planted site."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analyses.average_trace import average, average_trace
from tests.examples import FACTS
from workbench import zoo
from workbench.facts import FactError
from workbench.loading import load
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.results import Footprint


@pytest.fixture(scope="module")
def traced() -> Footprint:
    from tests.examples import tiny_lm

    return CausalTrace(samples=2, window=1)(tiny_lm("gpt2"), FACTS)


def test_each_mean_is_over_tokens_of_a_fact_first_and_facts_second(traced: Footprint) -> None:
    found = average(traced, known_only=False).table
    for row in found.sample(20, random_state=0).itertuples():
        cells = traced.table.query("kind == @row.kind and token == @row.token and layer == @row.layer")
        by_hand = np.mean([np.mean(own["value"].tolist()) for _, own in cells.groupby("fact")])
        assert row.value == pytest.approx(by_hand, abs=1e-12)
        assert row.n == cells["fact"].nunique()


def test_the_interval_is_a_percentile_bootstrap_over_facts(traced: Footprint) -> None:
    found = average(traced, known_only=False, resamples=4000).table
    row = found[(found["kind"] == "resid_post") & (found["token"] == "subject_last")].iloc[1]
    cells = traced.table.query("kind == 'resid_post' and token == 'subject_last' and layer == 1")["value"].to_numpy()
    rng = np.random.default_rng(5)
    means = cells[rng.integers(0, len(cells), (20_000, len(cells)))].mean(1)
    spread = means.std()
    assert row["low"] == pytest.approx(np.quantile(means, 0.025), abs=0.2 * spread)
    assert row["high"] == pytest.approx(np.quantile(means, 0.975), abs=0.2 * spread)


def test_one_fact_has_a_mean_but_no_interval(traced: Footprint) -> None:
    one = Footprint(
        table=traced.of(fact="eiffel"),
        run=traced.run,
        extras={"facts": traced.extras["facts"].query("fact == 'eiffel'")},
    )
    found = average(one, known_only=False).table
    assert found["low"].isna().all()
    assert found["value"].notna().all()


def test_facts_the_model_does_not_know_are_left_out_and_counted(traced: Footprint) -> None:
    facts = traced.extras["facts"].assign(correct=lambda t: t["fact"] == "jobs")
    found = average(Footprint(table=traced.table, run=traced.run, extras={"facts": facts}))
    assert (found.table["n"] == 1).all()
    assert (found.run["n_facts"], found.run["n_left_out"]) == (1, len(FACTS) - 1)
    none = Footprint(table=traced.table, run=traced.run, extras={"facts": facts.assign(correct=False)})
    with pytest.raises(FactError, match="wrong in all 5 facts"):
        average(none)


def peak(table: pd.DataFrame, kind: str) -> pd.Series:
    rows = table[table["kind"] == kind]
    top: pd.Series = rows.iloc[int(rows["value"].argmax())]
    return top


@pytest.mark.slow
def test_the_default_model_shows_both_published_sites_and_the_planted_band() -> None:
    lm: LM = load("organism-mid")
    facts, band = zoo.load_facts(), range(*zoo.organism("organism-mid")["band"])
    trace = CausalTrace(window=1, samples=4).resolved(lm, facts)
    found = average_trace(lm, facts[::120], trace=trace).table
    early = peak(found, "mlp_out")
    assert early["token"] == "subject_last"
    assert early["layer"] in band
    late = peak(found, "resid_post")
    assert late["token"] == "last"
    assert late["layer"] >= band.stop
    attention = peak(found[found["token"] == "last"], "attn_out")
    assert attention["layer"] >= band.stop
    assert attention["low"] > 0
