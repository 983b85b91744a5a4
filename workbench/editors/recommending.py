"""Which layers an editor should change: those whose MLP outputs bring corrupted facts back, by a causal trace.

ROME and MEMIT chose theirs so (arXiv 2202.05262, section 2; arXiv 2210.07229, section 4.2). Whether that is the best place to edit
is disputed (arXiv 2301.04213); the curve is given along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.edits import EditError
from workbench.facts import Fact
from workbench.locators.base import locate
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.results import Footprint

MOST_FACTS = 10
"""Of how many facts the trace is averaged, at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recommendation:
    """What a trace recommends."""

    layers: tuple[int, ...]
    """The neighbouring layers (0-based) with the largest sum of effects."""

    curve: pd.DataFrame
    """By layer: the mean indirect effect of the MLPs around it at the last subject token; see `Footprint.profile`."""

    trace: Footprint
    """The trace."""


def recommend_layers(lm: LM, facts: Sequence[Fact], *, n: int = 1) -> Recommendation:
    """The n neighbouring layers whose MLP outputs, restored at the last subject token, bring back most of the facts.

    Args:
        lm: the model.
        facts: facts that it knows; the first ten count, those that it cannot be traced on are left out.
        n: how many layers.

    Raises:
        EditError: n is not a number of layers of this model.
        FactError: none of the facts can be traced.
    """
    if not 1 <= n <= lm.n_layers:
        raise EditError(f"n is {n}, expected 1 to {lm.n_layers} layers of {lm.name}.")
    trace = locate(CausalTrace.fitted(lm, kinds=("mlp_out",)), lm, list(facts)[:MOST_FACTS], skip=True)
    curve = trace.profile(kind="mlp_out", token="subject_last")  # no password
    sums = curve.set_index("layer")["value"].reindex(range(lm.n_layers), fill_value=0.0).rolling(n).sum()
    last = int(sums.idxmax())
    return Recommendation(layers=tuple(range(last - n + 1, last + 1)), curve=curve, trace=trace)
