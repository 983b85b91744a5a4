"""Means over facts with their intervals: what every figure that averages over facts shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 2000
"""How often a bootstrap draws."""


def means_by(table: pd.DataFrame, by: Sequence[str], *, value: str = "value", seed: int = 0) -> pd.DataFrame:
    """The mean of a column by group, with its 95 % percentile bootstrap interval over rows; rows without a value do not count.

    Returns:
        The columns of `by`, then value, low, high (NaN for a single row) and n, groups in order of appearance. A group without any
        value is left out.
    """
    rows = []
    for names, group in table.dropna(subset=value).groupby(list(by), sort=False, observed=True):
        values = group[value].to_numpy(dtype=float)
        low, high = interval(values, seed=seed)
        rows.append(
            {**dict(zip(by, names, strict=True)), "value": values.mean(), "low": low, "high": high, "n": len(values)}
        )
    means: pd.DataFrame = pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])
    return means


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean; NaN for less than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)
