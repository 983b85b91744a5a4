"""Footprints made of given numbers, for tests of what is drawn and exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.results import Footprint, Result, join
from workbench.sites import TOKEN_ROLES

EIFFEL = ("The", " Eiff", "el", " Tower", " is", " in", " the", " city", " of")
ODD = ("<s>", "\n", " $5", " $x$", "#1", " 東京", "\t", " ", "&<b>", "a\u0301", "\u200b", "NA", "%{x}")
"""Tokens that break what is careless: markup, formulas, comments, other scripts, what cannot be seen, a missing value's name."""


def footprint(
    texts: Sequence[str] = EIFFEL,
    *,
    subject: tuple[int, int] = (1, 4),
    n_layers: int = 6,
    kinds: Sequence[str] = ("resid_post", "mlp_out", "attn_out"),
    fact: str = "eiffel",
    answer: str = "Paris",
    score: str = "p",
    samples: int = 10,
    window: int = 3,
    seed: int = 0,
) -> Footprint:
    """A causal trace with random numbers: a score at every site, over a corrupted run's 0.1 of a clean run's 0.8."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "fact": fact,
            "site": f"L{layer}.{kind}@{position}",
            "layer": layer,
            "kind": kind,
            "head": pd.NA,
            "neuron": pd.NA,
            "token": _role(position, len(texts), subject),
            "position": position,
            "text": text,
            "se": rng.uniform(0, 0.05) if samples > 1 else float("nan"),
            "score": rng.uniform(0.05, 0.8),
        }
        for kind in kinds
        for position, text in enumerate(texts)
        for layer in range(n_layers)
    ]
    table = pd.DataFrame(rows).astype({"head": "Int64", "neuron": "Int64"})
    table["value"] = table["score"] - 0.1
    facts = pd.DataFrame(
        [
            {
                "fact": fact,
                "prompt": "".join(texts),
                "subject": "Eiffel Tower",
                "answer": answer,
                "foil": "Rome",
                "clean": 0.8,
                "corrupted": 0.1,
                "total_effect": 0.7,
            }
        ]
    )
    return Footprint(
        table=table, run=_run(fact, texts, n_layers, window, samples, score, list(kinds)), extras={"facts": facts}
    )


def of_values(
    values: Sequence[Sequence[float]],
    *,
    kind: str = "mlp_out",
    part: str = "",
    fact: str = "eiffel",
    what: str = "CausalTrace",
) -> Footprint:
    """A footprint that belongs to no token, without scores: one row of values, or one for each `head` or `neuron`; by layer."""
    rows = [
        {
            "fact": fact,
            "site": f"L{layer}.{kind}" + (f"[{row}]" if part else ""),
            "layer": layer,
            "kind": kind,
            "head": row if part == "head" else pd.NA,
            "neuron": row if part == "neuron" else pd.NA,
            "token": "all",
            "position": pd.NA,
            "text": "",
            "value": value,
            "se": float("nan"),
            "score": float("nan"),
        }
        for row, own in enumerate(values)
        for layer, value in enumerate(own)
    ]
    table = pd.DataFrame(rows).astype({"head": "Int64", "neuron": "Int64", "position": "Int64"})
    run = {**_run(fact, EIFFEL, len(values[0]), 1, 1, "logit", [kind]), "what": what, "unit": "logit of the answer"}
    return Footprint(table=table, run=run, extras={"facts": pd.DataFrame([{"fact": fact, "answer": "Paris"}])})


def several(n: int = 4) -> Footprint:
    """Footprints of several facts as one."""
    return join([footprint(seed=i, fact=f"fact-{i}") for i in range(n)])


def average() -> Result:
    """An average over facts, in the form of `analyses.average_trace`."""
    traces = several()
    parts = [
        traces.profile(kind=kind, token=role).assign(kind=kind, token=role)
        for kind in traces.kinds
        for role in TOKEN_ROLES
    ]
    table = pd.concat(parts, ignore_index=True)
    table = table.assign(low=table["value"] - 0.1, high=table["value"] + 0.1)
    run = {
        **traces.run,
        "what": "average_trace",
        "of": "CausalTrace",
        "n_facts": 4,
        "n_left_out": 1,
        "bootstrap": {"resamples": 2000, "seed": 0, "level": 0.95},
    }
    return Result(table=table[["kind", "token", "layer", "value", "low", "high", "n"]], run=run, extras=traces.extras)


def _role(position: int, length: int, subject: tuple[int, int]) -> str:
    start, stop = subject
    if start <= position < stop:
        return "subject_last" if position == stop - 1 else "subject_first" if position == start else "subject_middle"
    if position == length - 1:
        return "last"
    return "before_subject" if position < start else "first_after_subject" if position == stop else "further"


def _run(
    fact: str, texts: Sequence[str], n_layers: int, window: int, samples: int, score: str, kinds: list[str]
) -> dict[str, Any]:
    return {
        "what": "CausalTrace",
        "model": "tiny",
        "family": "gpt2",
        "weight_hash": "0123456789abcdef",
        "n_layers": n_layers,
        "dtype": "float32",
        "attention": "sdpa",
        "bos": None,
        "parameters": {
            "kinds": kinds,
            "window": window,
            "window_rule": "rome",
            "corrupt": "noise",
            "noise": "0.18",
            "sigma_from": "subjects",
            "sigma_note": "s3: sigma_t = 0.06 of 12 subjects",
            "samples": samples,
            "seed": 1,
            "replace": False,
            "sever": "none",
            "score": score,
        },
        "facts": [{"id": fact, "prompt": "".join(texts), "subject": "Eiffel Tower"}],
        "layer_base": 0,
        "unit": f"indirect effect in {score}",
        "made": "2026-01-02T03:04:05+00:00",
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
    }
