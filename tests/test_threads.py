"""Threads share a model without seeing each other's plans, as the app's sessions do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.examples import EIFFEL, JOBS, MESSI, SAID, ZURICH, fresh_lm, tiny_lm
from workbench.hooks import patched, run
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.progress import Cancelled, reporting
from workbench.sites import Site

ROUNDS = 12


def _at_once(work: list[Callable[[], torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Every function's results over many rounds, all threads starting together."""
    barrier = threading.Barrier(len(work))

    def rounds(function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        barrier.wait()
        return [function() for _ in range(ROUNDS)]

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(rounds, work))


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_threads_that_read_and_write_one_model_get_what_they_get_alone(family: str) -> None:
    lm = tiny_lm(family)
    tokens = lm.encode([EIFFEL, ZURICH, MESSI])

    def writer(layer: int) -> Callable[[], torch.Tensor]:
        site, above = Site(layer=layer, kind="mlp_out", token="subject_last"), Site(layer=layer, kind="resid_post")
        return lambda: run(lm, tokens, read=(above,), write={site: lambda x: x + 1 + layer})[above]

    def wrapped() -> torch.Tensor:
        with patched(lm, {Site(layer=1, kind="attn_out"): torch.zeros(())}), torch.no_grad():
            logits: torch.Tensor = lm.model(input_ids=tokens.ids[:1]).logits
        return logits

    def plain() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = lm.model(input_ids=tokens.ids[:1]).logits
        return logits

    work = [writer(0), writer(2), wrapped, plain]
    alone = [function() for function in work]
    assert not alone[2].equal(alone[3])
    for expected, results in zip(alone, _at_once(work), strict=True):
        assert all(result.equal(expected) for result in results)


def test_threads_that_use_a_model_for_the_first_time_install_its_taps_once() -> None:
    lm, n = fresh_lm("gpt2"), 8
    barrier, tokens, site = threading.Barrier(n), lm.encode([EIFFEL]), Site(layer=0, kind="mlp_out")

    def first(_: int) -> torch.Tensor:
        barrier.wait()
        twin = LM(lm.model, lm.tokenizer)
        return run(twin, tokens, read=(site,), write={site: lambda x: x + 1})[site]

    with ThreadPoolExecutor(n) as pool:
        results = list(pool.map(first, range(n)))
    assert all(result.equal(results[0]) for result in results)
    assert len(lm.blocks[0]._forward_hooks) == 1


@pytest.mark.parametrize("engine", ["sweep", "loop"])
def test_three_traces_at_once_are_the_three_traces(gpt2: LM, engine: str) -> None:
    traces = [
        CausalTrace(samples=2, kinds=("mlp_out",), window=3, noise=noise, engine=engine)  # type: ignore[arg-type]
        for noise in (0.1, 0.3, "u0.5")
    ]
    facts = [SAID, JOBS, ZURICH]

    def values(index: int) -> torch.Tensor:
        return torch.tensor(traces[index](gpt2, [facts[index]]).table["score"].to_numpy())

    alone = [values(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            for expected, result in zip(alone, pool.map(values, range(3)), strict=True):
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-7)


def test_progress_is_heard_in_its_own_thread_and_stops_only_that_one(gpt2: LM) -> None:
    heard: dict[str, int] = {"one": 0, "other": 0}

    def one() -> str:
        def listener(what: str, done: int, total: int) -> None:
            heard["one"] += 1
            if heard["one"] > 2:
                raise Cancelled

        with reporting(listener):
            try:
                CausalTrace(samples=1)(gpt2, [EIFFEL])
            except Cancelled:
                return "stopped"
        return "finished"

    def other() -> str:
        def listener(what: str, done: int, total: int) -> None:
            heard["other"] += 1

        with reporting(listener):
            CausalTrace(samples=1)(gpt2, [ZURICH])
        return "finished"

    with ThreadPoolExecutor(2) as pool:
        stopped, finished = pool.submit(one), pool.submit(other)
        assert (stopped.result(), finished.result()) == ("stopped", "finished")
    assert heard["one"] == 3
    assert heard["other"] > 3
