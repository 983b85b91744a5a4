"""The sweep gives the plain loop's numbers, for every family, kind, window and score, and says so when it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.examples import EIFFEL, FACTS, JOBS, SAO_PAULO, fresh_lm, tiny_lm
from workbench import sweep
from workbench.facts import Fact
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM

FEW: dict[str, Any] = {"samples": 2, "noise": "s3", "window": 3}

PROTOCOLS: dict[str, dict[str, Any]] = {
    "three maps": FEW,
    "window of one": {**FEW, "window": 1},
    "even window of the paper": {**FEW, "window": 2, "window_rule": "paper"},
    "window wider than the model": {**FEW, "window": 10},
    "MLP severed": {**FEW, "kinds": ("resid_post",), "sever": "mlp_out"},
    "attention severed": {**FEW, "kinds": ("resid_post", "mlp_out"), "sever": "attn_out"},
    "inner sites": {**FEW, "kinds": ("resid_pre", "z", "mlp_post")},
    "whole answer": {**FEW, "score": "logp"},
    "distance of the answers": {**FEW, "score": "kl"},
    "last subject token only": {**FEW, "token": "subject_last"},
    "noise instead of the embedding": {**FEW, "replace": True},
    "another subject": {**FEW, "corrupt": "swap", "substitutes": ("Tower Eiffel",)},
}


def gap(lm: LM, fact: Fact, **protocol: Any) -> tuple[float, float]:
    """The largest difference between sweep and loop, and the largest effect."""
    trace = CausalTrace(**protocol)
    fast, slow = (replace(trace, engine=engine)(lm, [fact]) for engine in ("sweep", "loop"))
    assert fast.run["engine"] == "sweep"
    assert slow.run["engine"].startswith("loop")
    columns = ["fact", "site", "layer", "kind", "token", "position", "text"]
    assert fast.table[columns].equals(slow.table[columns])
    assert np.allclose(fast.extras["samples"]["score"], slow.extras["samples"]["score"], atol=1e-5, rtol=0)
    return float((fast.table["score"] - slow.table["score"]).abs().max()), float(slow.table["value"].abs().max())


def test_every_family_is_swept_exactly(lm: LM) -> None:
    error, effect = gap(lm, EIFFEL, **FEW)
    assert error < 1e-6
    assert error < 1e-3 * effect  # the map is not flat, so the comparison says something


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_every_protocol_is_swept_exactly(family: str, protocol: str) -> None:
    lm = tiny_lm(family)
    options = PROTOCOLS[protocol]
    error, _ = gap(lm, EIFFEL, **options)
    assert error < (1e-4 if options.get("score") in ("logp", "kl") else 1e-6)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_the_subject_may_stand_anywhere(fact: Fact) -> None:
    for family in ("gpt2", "llama"):
        error, _ = gap(tiny_lm(family), fact, **FEW)
        assert error < 1e-6


def test_chunks_change_nothing(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CausalTrace(**FEW)(gpt2, [JOBS]).table["score"]
    monkeypatch.setattr(sweep, "POSITIONS_AT_ONCE", 1)
    assert np.allclose(CausalTrace(**FEW)(gpt2, [JOBS]).table["score"], whole, atol=1e-7)


def test_a_fact_has_the_same_map_alone_and_among_others(gpt2: LM) -> None:
    trace = CausalTrace(samples=2, noise=0.5, window=3)
    together = trace(gpt2, FACTS)
    for fact in FACTS:
        alone = trace(gpt2, [fact]).table["score"].to_numpy()
        assert np.array_equal(alone, together.of(fact=fact.id)["score"].to_numpy())


def test_a_subject_at_the_end_leaves_only_its_own_cells(gpt2: LM) -> None:
    found = CausalTrace(**FEW)(gpt2, [SAO_PAULO])
    start = gpt2.encode([SAO_PAULO]).spans[0]
    assert start is not None
    before = found.table[found.table["position"] < start[0]]
    assert (before["value"] == 0).all()


def test_flash_attention_is_refused_in_words() -> None:
    lm = fresh_lm("llama")
    lm.model.config._attn_implementation = "flash_attention_2"
    assert "no explicit mask" in sweep.sweepable(lm, [])
    lm.model.config._attn_implementation = "sdpa"
    assert sweep.sweepable(lm, []) == ""
