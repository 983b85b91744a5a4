"""How well do gradients find what an exact causal trace finds? (attribution patching: arXiv 2310.10348; along a path: 2403.17806)

Claim of the papers: two forward passes and one backward rank the cells of a map nearly as patching every one of them does. Here
both are computed, fact by fact and kind by kind, and compared: by rank, by size, and by what is lost if only the cells that the
estimate puts on top were computed exactly (`CausalTrace`, arXiv 2202.05262, is the exact map).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pandas as pd
from scipy import stats

from workbench.facts import Fact, FactError
from workbench.gradients import At
from workbench.locators import AttributionPatching, locate
from workbench.locators.causal_trace import CausalTrace
from workbench.locators.tracing import Tracing
from workbench.models import LM
from workbench.results import Footprint, Result
from workbench.store import Store

ESTIMATES: tuple[tuple[At, int], ...] = (
    ("corrupted", 1), ("clean", 1), ("both", 1), ("middle", 1), ("clean", 5), ("middle", 5), ("middle", 10)
)  # fmt: skip
"""Where the gradient is taken, and in how many steps: see `workbench.gradients`."""

LARGE = 0.05
"""Which cells must not be missed: those whose effect is above this share of the total effect."""

TOPS = (0.1, 0.2)
"""The shares of a map's cells that count as its top."""


def screening(
    lm: LM,
    facts: Sequence[Fact],
    *,
    trace: CausalTrace | None = None,
    estimates: Sequence[tuple[At, int]] = ESTIMATES,
    store: Store | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """Traces every fact exactly and by estimate, and compares.

    Args:
        lm: the model.
        facts: the facts.
        trace: the protocol of both; None for ROME's.
        estimates: where gradients are taken (`at`) and in how many steps.
        store: where single maps are kept and looked for, so that a stopped run goes on.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.

    Returns:
        A Result with the columns kind, at, steps, measure (see `compare`), value (mean over facts), low and high (95 % percentile
        bootstrap over facts; NaN for a single one), least and most (over facts), n (facts where the measure exists). Extras:
        `each`, the same by fact; `facts`, one row a fact traced.

    Raises:
        FactError: no facts, or a trace that has no estimate: of a rank, or with a severed path.
    """
    trace = (trace or CausalTrace()).resolved(lm, facts)
    if trace.sever != "none":
        raise FactError(f"{trace.sever} is severed, and a severed trace has no estimate. Leave out sever.")
    trace = replace(trace, screen=None, adaptive=None, tolerance=None)
    shared = {f.name: getattr(trace, f.name) for f in fields(Tracing)}
    gradients = [AttributionPatching(**shared, at=at, steps=steps) for at, steps in estimates]
    exact = locate(trace, lm, facts, store=store)
    each = pd.concat(
        [
            compare(exact, locate(gradient, lm, facts, store=store)).assign(at=gradient.at, steps=gradient.steps)
            for gradient in gradients
        ],
        ignore_index=True,
    )
    rows = []
    for factors, own in each.dropna(subset="value").groupby(["kind", "at", "steps", "measure"], sort=False):
        values = own["value"].to_numpy()
        low, high = _interval(values, resamples, seed)
        row = {"value": values.mean(), "low": low, "high": high, "least": values.min(), "most": values.max()}
        rows.append({**dict(zip(("kind", "at", "steps", "measure"), factors, strict=True)), **row, "n": len(values)})
    run = {
        **exact.run,
        "what": "screening",
        "of": exact.run["what"],
        "estimates": [f"{at} {steps}" for at, steps in estimates],
        "large": LARGE,
        "tops": list(TOPS),
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95, "method": "percentile"},
    }
    columns = ["fact", "kind", "at", "steps", "measure", "value"]
    return Result(table=pd.DataFrame(rows), run=run, extras={"each": each[columns], "facts": exact.extras["facts"]})


def compare(exact: Footprint, estimated: Footprint) -> pd.DataFrame:
    """One map against another, for every fact and kind. Cells before the subject, which are 0 in both, do not count.

    - `spearman`, `kendall`, `pearson`: correlations of the values
    - `overlap_5_cells`, `overlap_10_percent`: of the 5 cells, or the 10 % of cells, of largest size, the share that both have
    - `error`: largest difference, as a share of the total effect
    - `large`: share of cells whose exact effect is larger than `LARGE` of the total effect, in size
    - `recall_10_percent`, `recall_20_percent`: the share of these that are in the first 10 (20) % of cells by size of the estimate;
      none where there is no large cell. Where more than 10 % of cells are large, even the exact map does not reach 1
    - `needed`: the smallest share of cells, by size of the estimate, that has all of them

    Returns:
        A table with fact, kind, measure and value; NaN where a measure does not exist.
    """
    rows: list[tuple[str, str, str, float]] = []
    total = exact.extras["facts"].set_index("fact")["total_effect"].abs()
    other = estimated.table[["fact", "site", "value"]]
    both = exact.table.merge(other, on=["fact", "site"], suffixes=("", "_estimated"))
    counted = both[both["token"] != "before_subject"]
    for (fact, kind), own in counted.groupby(["fact", "kind"], sort=False):
        measures = _measures(own["value"].to_numpy(), own["value_estimated"].to_numpy(), float(total[fact]))
        rows += [(fact, kind, name, value) for name, value in measures.items()]
    found: pd.DataFrame = pd.DataFrame(rows, columns=["fact", "kind", "measure", "value"])
    return found


def _measures(exact: np.ndarray, estimated: np.ndarray, total: float) -> dict[str, float]:
    n = len(exact)
    varied = np.ptp(exact) > 0 and np.ptp(estimated) > 0
    order, place = np.argsort(-np.abs(estimated), kind="stable"), np.empty(n, dtype=int)
    place[order] = np.arange(1, n + 1)
    best = np.argsort(-np.abs(exact), kind="stable")
    large, ten = np.abs(exact) > LARGE * total, int(np.ceil(0.1 * n))
    return {
        "spearman": float(stats.spearmanr(exact, estimated).statistic) if varied else np.nan,
        "kendall": float(stats.kendalltau(exact, estimated).statistic) if varied else np.nan,
        "pearson": float(np.corrcoef(exact, estimated)[0, 1]) if varied else np.nan,
        "overlap_5_cells": float((place[best[:5]] <= 5).mean()),
        "overlap_10_percent": float((place[best[:ten]] <= ten).mean()),
        "error": float(np.abs(exact - estimated).max() / total) if total > 0 else np.nan,
        "large": float(large.mean()),
        **{
            f"recall_{round(100 * share)}_percent": float((place[large] <= np.ceil(share * n)).mean())
            if large.any()
            else np.nan
            for share in TOPS
        },
        "needed": float(place[large].max() / n) if large.any() else 0.0,
    }


def _interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of facts; NaN for a single one."""
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    means = values[np.random.default_rng(seed).integers(0, n, (resamples, n))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
