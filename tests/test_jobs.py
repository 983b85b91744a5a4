"""Work beside the page: one worker a model, progress, stopping, failing, and several threads asking at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.examples import EIFFEL, tiny_lm
from workbench.asked import Asked, list_asked
from workbench.errors import InputError
from workbench.jobs import Job, ModelChoice, Workshop
from workbench.layouts import ModelError
from workbench.models import LM
from workbench.progress import track
from workbench.results import Footprint, Result
from workbench.store import Store

A, B = ModelChoice(name="a"), ModelChoice(name="b")
SOON = 20.0
"""Seconds after which a test gives up; nothing here takes one."""


class Gate:
    """Work that waits in the middle until it is let on."""

    def __init__(self, steps: int = 4) -> None:
        self.steps = steps
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, lm: Any) -> str:
        for step in track(range(self.steps), "steps", self.steps):
            if step == 1:
                self.entered.set()
                assert self.open.wait(SOON)
        return f"done on {lm}"


def name_of(choice: ModelChoice) -> Any:
    """Stands in for loading: the name is the model."""
    return choice.name


@pytest.fixture
def shop() -> Iterator[Workshop]:
    workshop = Workshop(name_of)
    yield workshop
    workshop.close()


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_job_gives_its_result_and_says_how_far_it_is(shop: Workshop) -> None:
    gate = Gate()
    job = shop.submit(A, gate, key="k", title="t")
    assert gate.entered.wait(SOON)
    status = job.status
    assert (status.state, status.what, status.fraction) == ("running", "steps", 0.25)
    with pytest.raises(RuntimeError, match="has no result: it is running"):
        _ = job.result
    gate.open.set()
    assert job.wait(SOON).state == "done"
    assert job.status.fraction == 1
    assert job.result == "done on a"


def test_a_loop_inside_a_loop_counts_as_a_part_of_its_step() -> None:
    seen: list[tuple[float, int]] = []

    def work() -> None:
        for _ in track(range(2), "outer", 2):
            for _ in track(range(2), "inner", 2):
                status = job.status
                seen.append((status.fraction, status.rounds))
            seen.append((job.status.fraction, job.status.rounds))

    job = Job(key="k", title="t", model=A, work=work)
    job.run()
    assert seen == [(0.0, 0), (0.25, 0), (0.5, 0), (0.5, 1), (0.75, 1), (1.0, 1)]


def test_stop_ends_a_running_job_at_its_next_step_and_a_waiting_one_at_once(shop: Workshop) -> None:
    gate = Gate()
    running = shop.submit(A, gate, key="1", title="first")
    waiting = shop.submit(A, Gate(), key="2", title="second")
    assert gate.entered.wait(SOON)
    waiting.stop()
    assert waiting.status.state == "stopped"
    running.stop()
    assert running.status.state == "running"
    gate.open.set()
    assert running.wait(SOON).state == "stopped"
    assert waiting.wait(SOON).state == "stopped"
    assert shop.submit(A, lambda lm: "again", key="1", title="first").wait(SOON).state == "done"


def test_an_input_error_is_shown_as_it_is(shop: Workshop) -> None:
    def work(lm: LM) -> None:
        raise ModelError("Expected this, got that. Do so.")

    status = shop.submit(A, work, key="k", title="t").wait(SOON)
    assert (status.state, status.error) == ("failed", "Expected this, got that. Do so.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (MemoryError(), "memory was not enough"),
        (RuntimeError("CUDA out of memory. Tried to"), "memory was not enough"),
    ],
)
def test_any_other_error_becomes_a_sentence_and_the_worker_goes_on(
    shop: Workshop, error: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def work(lm: LM) -> None:
        raise error

    status = shop.submit(A, work, key="k", title="t").wait(SOON)
    assert status.state == "failed"
    assert said in status.error
    assert "failed" in caplog.text
    assert shop.submit(A, lambda lm: 1, key="k2", title="t").wait(SOON).state == "done"


def test_two_models_work_side_by_side_and_one_model_one_after_the_other(shop: Workshop) -> None:
    first, second, other = Gate(), Gate(), Gate()
    shop.submit(A, first, key="1", title="t")
    behind = shop.submit(A, second, key="2", title="t")
    beside = shop.submit(B, other, key="3", title="t")
    assert first.entered.wait(SOON)
    assert other.entered.wait(SOON)
    assert behind.status.state == "waiting"
    other.open.set()
    assert beside.wait(SOON).state == "done"
    assert behind.status.state == "waiting"
    first.open.set()
    second.open.set()
    assert behind.wait(SOON).state == "done"


def test_the_same_question_is_not_queued_twice(shop: Workshop) -> None:
    gate = Gate()
    first = shop.submit(A, gate, key="k", title="t")
    assert shop.submit(A, Gate(), key="k", title="t") is first
    gate.open.set()
    first.wait(SOON)
    again = shop.submit(A, lambda lm: "2", key="k", title="t")
    assert again is not first
    assert len(shop.jobs()) == 1


def test_three_threads_that_ask_at_once_load_a_model_once() -> None:
    loads: list[str] = []

    def load(choice: ModelChoice) -> Any:
        loads.append(choice.name)
        time.sleep(0.05)
        return choice.name

    shop, ready, jobs = Workshop(load), threading.Barrier(3), list[Job[Any]]()

    def ask() -> None:
        ready.wait(SOON)
        jobs.append(shop.submit(A, lambda lm: lm, key="k", title="t"))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert [job.wait(SOON).state for job in jobs] == ["done"] * 3
    assert loads == ["a"]
    assert len(set(map(id, jobs))) == 1
    shop.close()


def test_a_model_that_cannot_be_loaded_fails_its_jobs_with_its_sentence_until_it_is_forgotten() -> None:
    tries: list[int] = []

    def load(choice: ModelChoice) -> Any:
        tries.append(1)
        raise InputError("There is no such model.")

    shop = Workshop(load)
    for number in range(2):
        status = shop.submit(A, lambda lm: 1, key=number, title="t").wait(SOON)
        assert status.error == "There is no such model."
    assert len(tries) == 1
    shop.forget(A)
    shop.model(A).wait(SOON)
    assert len(tries) == 2
    shop.close()


def test_idle_models_make_room_and_busy_ones_stay() -> None:
    loads: list[str] = []

    def load(choice: ModelChoice) -> Any:
        loads.append(choice.name)
        return choice.name

    shop, gate = Workshop(load, keep=2), Gate()
    busy = shop.submit(A, gate, key="k", title="t")
    shop.model(A).wait(SOON)
    for name in ("b", "c", "b", "c"):
        shop.model(ModelChoice(name=name)).wait(SOON)
    assert loads == ["a", "b", "c", "b", "c"]
    gate.open.set()
    assert busy.wait(SOON).state == "done"
    shop.model(A)
    assert loads.count("a") == 1
    shop.close()


def test_closing_stops_what_runs() -> None:
    shop, gate = Workshop(name_of), Gate(steps=3)
    job = shop.submit(A, gate, key="k", title="t")
    assert gate.entered.wait(SOON)
    threading.Timer(0.05, gate.open.set).start()
    shop.close(SOON)
    assert job.status.state == "stopped"


def test_a_stopped_trace_keeps_its_finished_maps_and_goes_on_from_there(tmp_path: Path) -> None:
    store, asked = Store(folder=tmp_path), Asked(model="tiny", fact=EIFFEL, options={"samples": 2})
    shop = Workshop(lambda choice: tiny_lm("gpt2"))

    class StoppingStore(Store):
        """Stops the job as soon as one map is stored."""

        def save(self, result: Result) -> Path:
            path = super().save(result)
            if result.run["what"] == "CausalTrace":
                job.stop()
            return path

    begin = threading.Event()

    def work(lm: LM) -> Footprint:
        assert begin.wait(SOON)
        return asked.compute(lm, StoppingStore(folder=tmp_path))

    job = shop.submit(A, work, key=asked.key, title="t")
    begin.set()
    assert job.wait(SOON).state == "stopped"
    stored = asked.find(store)
    assert stored is not None
    assert stored.footprint is not None
    assert stored.footprint.kinds == ("resid_post",)
    assert stored.missing == ("mlp_out", "attn_out")
    before = stored.footprint.run["made"], (tmp_path / _piece(store, asked, "resid_post")).stat().st_mtime_ns
    again = shop.submit(A, lambda lm: asked.compute(lm, store), key=asked.key, title="t")
    assert again.wait(SOON).state == "done"
    stored = asked.find(store)
    assert stored is not None
    assert stored.missing == ()
    assert stored.footprint is not None
    assert stored.footprint.run["made"] == before[0]
    assert (tmp_path / _piece(store, asked, "resid_post")).stat().st_mtime_ns == before[1]
    assert stored.asked == asked
    assert [listed.asked for listed in list_asked(store)] == [asked]
    shop.close()


def _piece(store: Store, asked: Asked, kind: str) -> str:
    """The folder of one stored map."""
    question = store.get(asked.key, Result)
    assert question is not None
    return str(question.table.set_index("part").loc[kind, "key"])
