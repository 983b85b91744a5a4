"""The rows of a footprint, as every locator writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.facts import Fact
from workbench.metrics import Answer
from workbench.models import LM, Tokens
from workbench.results import FOOTPRINT_COLUMNS
from workbench.sites import Site, SiteKind

Numbers = Sequence[Any] | np.ndarray
"""One entry a row."""


def site_rows(
    fact: Fact,
    tokens: Tokens,
    *,
    kind: SiteKind | Sequence[SiteKind],
    layer: Numbers,
    position: Numbers | None,
    value: Numbers,
    head: Numbers | None = None,
    neuron: Numbers | None = None,
    se: Numbers | None = None,
    score: Numbers | None = None,
) -> pd.DataFrame:
    """Rows with `FOOTPRINT_COLUMNS`, in the order given; all arguments are equally long.

    Args:
        fact: whose rows they are.
        tokens: its prompt, one row.
        kind: of every site, or one for all.
        layer: 0-based.
        position: from 0; None where the values belong to no token.
        value: the effects.
        head: 0-based, NA for whole rows; None: all are whole.
        neuron: 0-based, NA for whole rows; None: all are whole.
        se: standard errors; None where there are no samples.
        score: raw scores; None where there are none.
    """
    n = len(value)
    kinds = [kind] * n if isinstance(kind, str) else list(kind)
    positions = [None] * n if position is None else [int(p) for p in position]
    heads, neurons = (_parts(part, n) for part in (head, neuron))
    roles, texts = tokens.roles(), tokens.texts[0]
    sites = [
        str(Site(layer=int(level), kind=kind, token=where, head=h, neuron=i))
        for level, kind, where, h, i in zip(layer, kinds, positions, heads, neurons, strict=True)
    ]
    table: pd.DataFrame = pd.DataFrame(
        {
            "fact": fact.id,
            "site": sites,
            "layer": np.asarray(layer, dtype=np.int64),
            "kind": kinds,
            "head": pd.array(heads, dtype="Int64"),
            "neuron": pd.array(neurons, dtype="Int64"),
            "token": ["all" if where is None else roles[where] for where in positions],
            "position": pd.array(positions, dtype="Int64" if position is None else "int64"),
            "text": ["" if where is None else texts[where] for where in positions],
            "value": np.asarray(value, dtype=float),
            "se": np.full(n, np.nan) if se is None else np.asarray(se, dtype=float),
            "score": np.full(n, np.nan) if score is None else np.asarray(score, dtype=float),
        }
    )
    assert tuple(table.columns) == FOOTPRINT_COLUMNS
    return table


def fact_row(lm: LM, fact: Fact, answer: Answer, *, said: int, **more: Any) -> pd.DataFrame:
    """The one row of the extra table `facts`: what was asked and scored, `said` (the token the model itself says), and `more`."""
    row = {
        "fact": fact.id,
        "prompt": fact.text,
        "subject": fact.subject,
        "answer": answer.text,
        "answer_ids": " ".join(map(str, answer.ids)),
        "foil": answer.foil_text,
        "said": lm.word(said).strip(),
        "correct": said == answer.ids[0],
    }
    table: pd.DataFrame = pd.DataFrame([{**row, **more}])
    return table


def _parts(numbers: Numbers | None, n: int) -> list[int | None]:
    given = [None] * n if numbers is None else list(numbers)
    return [None if number is None or number is pd.NA else int(number) for number in given]
