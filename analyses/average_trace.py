"""Where are facts on average? Causal traces over a set of facts, by the role of the token (Meng et al. 2022, arXiv 2202.05262).

Claim (sec. 2.2, Fig. 2): an early site at the last subject token, carried by MLPs, and a late site at the last token, carried by
attention. Protocol: App. B and the average of Fig. 2; per fact the mean over the tokens of a role, then the mean over facts.

Where this departs from ROME's notebook: every token has one role, so nothing counts twice (a one-token subject is `subject_last`
only, a token after the subject that ends the prompt is `last` only); effects are not floored at 0; intervals are bootstrapped over
facts instead of 1.96 standard errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from workbench.facts import Fact, FactError
from workbench.locators import Locator, locate
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.results import Footprint, Result
from workbench.sites import TOKEN_ROLES
from workbench.store import Store


def average_trace(
    lm: LM,
    facts: Sequence[Fact],
    *,
    trace: Locator | None = None,
    store: Store | None = None,
    known_only: bool = True,
    resamples: int = 2000,
    seed: int = 0,
    memory: int | None = None,
) -> Result:
    """Traces every fact and averages.

    Args:
        lm: the model.
        facts: the facts.
        trace: the protocol; None for ROME's.
        store: where single traces are kept and looked for, so that a stopped run goes on.
        known_only: leave out facts whose answer is not the model's most probable next token, as ROME does.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.
        memory: bytes that tracing may take for intermediate states; None: half of what is free.

    Returns:
        See `average`; extras: `facts`, one row a fact traced.

    Raises:
        FactError: no fact is left to average.
    """
    traces = locate(trace or CausalTrace(), lm, facts, store=store, memory=memory)
    return average(traces, known_only=known_only, resamples=resamples, seed=seed)


def average(footprint: Footprint, *, known_only: bool = True, resamples: int = 2000, seed: int = 0) -> Result:
    """The average of traces, by kind, role and layer: per fact the mean over the tokens of a role, then the mean over facts.

    Returns:
        A Result with the columns kind, token (role), layer (0-based), value (mean effect over facts), low and high (95 % bootstrap
        interval over facts), n (facts that have a token of this role).

    Raises:
        FactError: no fact is left to average.
    """
    facts = footprint.extras["facts"]
    kept = facts[facts["correct"]] if known_only else facts
    if kept.empty:
        raise FactError(
            f"The model's answer is wrong in all {len(facts)} facts, so there is nothing to average. "
            "Choose facts that it knows, or average all of them (known_only=False)."
        )
    rows = footprint.table[footprint.table["fact"].isin(kept["fact"])]
    averaged = []
    for kind in footprint.kinds:
        for role in TOKEN_ROLES:
            of_role = rows[(rows["kind"] == kind) & (rows["token"] == role)]
            if of_role.empty:
                continue
            by_layer = of_role.pivot_table(index="layer", columns="fact", values="value", aggfunc="mean")
            low, high = _interval(by_layer.to_numpy(), resamples, seed)
            averaged.append(
                pd.DataFrame(
                    {
                        "kind": kind,
                        "token": role,
                        "layer": by_layer.index,
                        "value": by_layer.mean(axis=1).to_numpy(),
                        "low": low,
                        "high": high,
                        "n": by_layer.shape[1],
                    }
                )
            )
    run = {
        **footprint.run,
        "what": "average_trace",
        "of": footprint.run["what"],
        "n_facts": len(kept),
        "n_left_out": len(facts) - len(kept),
        "clean": float(kept["clean"].mean()),
        "corrupted": float(kept["corrupted"].mean()),
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95, "method": "percentile"},
    }
    return Result(table=pd.concat(averaged, ignore_index=True), run=run, extras={"facts": facts})


def _interval(values: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile intervals of the mean of each row (layer) over its columns (facts); NaN for a single fact."""
    if values.shape[1] < 2:
        return np.full(len(values), np.nan), np.full(len(values), np.nan)
    found = stats.bootstrap(
        (values,), np.mean, axis=1, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
    )
    return np.asarray(found.confidence_interval.low), np.asarray(found.confidence_interval.high)
