"""Long work beside the page's script: one worker thread for each model, with a queue. Jobs can be watched and stopped.

1. `Workshop.model(choice)` hands back the job that loads a model; asking again hands back the same job.
2. `Workshop.submit(choice, work, ...)` queues work on that model; a question that is waiting or running is not queued twice.
3. A `Job` tells its `status` to any thread. `stop()` ends it at its next reported step; what the work has stored by then stays.

Progress comes through `workbench.progress`, so the work itself knows nothing of threads.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from workbench.errors import InputError
from workbench.progress import Cancelled, reporting

if TYPE_CHECKING:
    from workbench.models import LM

T = TypeVar("T")

State = Literal["waiting", "running", "done", "stopped", "failed"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model, and in which precision."""

    name: str
    """A bundled model, a folder or a hub name."""

    dtype: str = "float32"
    """As `workbench.load` takes it."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """A job at one moment."""

    state: State
    """`waiting` in the queue, `running`, or how it ended."""

    what: str = ""
    """The step that is being done."""

    fraction: float = 0.0
    """How much is done, from 0 to 1."""

    rounds: int = 0
    """How many steps of its outermost loop are done, so how many pieces of its result are there."""

    seconds: float = 0.0
    """How long it has run."""

    error: str = ""
    """Why it failed, in one sentence."""

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "stopped", "failed")

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the time so far; None until there is something to estimate from."""
        return self.seconds * (1 - self.fraction) / self.fraction if self.fraction > 0.02 else None


class Job(Generic[T]):
    """Work that was handed to a worker. Only the worker changes it; every thread may look and may stop it.

    Args:
        key: names the question; two jobs of the same key have the same answer.
        title: what is shown to the user.
        model: on which model it runs.
        work: the work itself.
    """

    def __init__(self, *, key: Hashable, title: str, model: ModelChoice, work: Callable[[], T]) -> None:
        self.key, self.title, self.model = key, title, model
        self._work: Callable[[], T] | None = work
        self._state: State = "waiting"
        self._error = ""
        self._nested: list[tuple[str, int, int]] = []
        self._began = self._ended = 0.0
        self._result: T | None = None
        self._stop, self._over = threading.Event(), threading.Event()

    @property
    def status(self) -> Status:
        """How far it is."""
        nested, state = list(self._nested), self._state
        if state == "waiting" and self._stop.is_set():
            state = "stopped"  # the worker will pass it over
        fraction = 0.0
        for _, done, total in reversed(nested):
            fraction = min(1.0, (done + fraction) / max(total, 1))
        began = self._began
        return Status(
            state=state,
            what=nested[-1][0] if nested else "",
            fraction=1.0 if state == "done" else fraction,
            rounds=nested[0][1] if nested else 0,
            seconds=(self._ended or time.monotonic()) - began if began else 0.0,
            error=self._error,
        )

    @property
    def result(self) -> T:
        """What the work gave back.

        Raises:
            RuntimeError: it is not done.
        """
        if self._state != "done":
            raise RuntimeError(f"{self.title!r} has no result: it is {self._state}. Wait until its status is done.")
        return cast(T, self._result)

    @property
    def stopping(self) -> bool:
        """Whether somebody asked it to stop."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ends the job: at once while it waits, at its next reported step while it runs."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> Status:
        """Blocks until the job is over, or for `timeout` seconds."""
        self._over.wait(timeout)
        return self.status

    def run(self) -> None:
        """Does the work in this thread; the worker calls it, once."""
        work, self._work = self._work, None
        assert work is not None, "a job runs once"
        self._began, self._state = time.monotonic(), "running"
        try:
            self._raise_if_stopped()
            with reporting(self._listen):
                self._result = work()
            state: State = "done"
        except Cancelled:
            state = "stopped"
        except InputError as error:
            state, self._error = "failed", str(error)
        except Exception as error:
            _log.exception("The job %r failed.", self.title)
            state, self._error = "failed", _sentence(error)
        self._ended, self._state = time.monotonic(), state
        self._over.set()

    def _listen(self, what: str, done: int, total: int) -> None:
        """Notes a step. A loop inside of another counts as a part of the other's current step."""
        names = [name for name, _, _ in self._nested]
        depth = names.index(what) if what in names else len(names)
        if depth and depth == len(names) and self._nested[-1][1] == self._nested[-1][2]:
            depth -= 1  # the innermost loop has ended, and this one follows it
        self._nested = [*self._nested[:depth], (what, done, total)]
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Cancelled


def _sentence(error: Exception) -> str:
    """An error nobody foresaw, for the user."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
        return "The memory was not enough for this. Use a smaller dtype (bfloat16), fewer samples, or a smaller model."
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"This failed unexpectedly ({type(error).__name__}: {first}). The server's log has the details."


class _Worker:
    """A thread that does one job after the other."""

    def __init__(self, name: str) -> None:
        self.queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name=f"worker {name}", daemon=True).start()

    def _loop(self) -> None:
        while (job := self.queue.get()) is not None:
            job.run()


class Workshop:
    """All workers of a process, and the models that they hold.

    Args:
        load: loads a model; it runs in the model's worker.
        keep: how many models stay in memory. The one that was idle longest makes room for a new one.
        remember: how many jobs that are over can still be found.
    """

    def __init__(self, load: Callable[[ModelChoice], LM], *, keep: int = 3, remember: int = 100) -> None:
        self._load, self._keep, self._remember = load, keep, remember
        self._lock = threading.RLock()
        self._workers: dict[ModelChoice, _Worker] = {}
        self._models: dict[ModelChoice, Job[LM]] = {}
        self._jobs: list[Job[Any]] = []
        atexit.register(self.close)

    def model(self, choice: ModelChoice) -> Job[LM]:
        """The job that loads a model; it was started by whoever asked first. After a failure, `forget` it to try again."""
        with self._lock:
            job = self._models.pop(choice, None)
            if job is None:
                self._make_room(choice)
                job = Job(key=choice, title=f"Loading {choice.name}", model=choice, work=lambda: self._load(choice))
                self._workers[choice] = _Worker(choice.name)
                self._workers[choice].queue.put(job)
            self._models[choice] = job  # at the end: the one that was used last
            return job

    def forget(self, choice: ModelChoice) -> None:
        """Lets a model go. Its jobs are stopped."""
        with self._lock:
            self._models.pop(choice, None)
            worker = self._workers.pop(choice, None)
            for job in self._jobs:
                if job.model == choice:
                    job.stop()
        if worker is not None:
            worker.queue.put(None)

    def submit(self, choice: ModelChoice, work: Callable[[LM], T], *, key: Hashable, title: str) -> Job[T]:
        """Queues work on a model, which is loaded first where it is not yet.

        Args:
            choice: the model.
            work: gets the model. It fails with the model's sentence where that cannot be loaded.
            key: names the question. Where a job of this key waits or runs, that one is handed back.
            title: what is shown to the user.
        """
        with self._lock:
            model = self.model(choice)
            found = self.find(key)
            if found is not None and not found.status.over and not found.stopping:
                return found
            job = Job(key=key, title=title, model=choice, work=lambda: work(_loaded(model)))
            over = [old for old in self._jobs if old.status.over]
            dropped = {id(old) for old in over[: max(0, len(over) - self._remember)]}
            self._jobs = [*(old for old in self._jobs if old.key != key and id(old) not in dropped), job]
            self._workers[choice].queue.put(job)
            return job

    def find(self, key: Hashable) -> Job[Any] | None:
        """The newest job of this key."""
        with self._lock:
            return next((job for job in reversed(self._jobs) if job.key == key), None)

    def jobs(self) -> tuple[Job[Any], ...]:
        """All jobs that were submitted, the oldest first, without those that load models."""
        with self._lock:
            return tuple(self._jobs)

    def close(self, timeout: float = 5.0) -> None:
        """Stops everything and waits a little, so that no thread is inside of torch when the process ends."""
        with self._lock:
            jobs = [*self._jobs, *self._models.values()]
            for choice in list(self._workers):
                self.forget(choice)
        until = time.monotonic() + timeout
        for job in jobs:
            job.stop()
        for job in jobs:
            if job.status.state == "running":
                job.wait(max(0.0, until - time.monotonic()))

    def _make_room(self, choice: ModelChoice) -> None:
        """Lets idle models go until there is room for one more; models that work are kept beyond the limit."""
        busy = {job.model for job in self._jobs if not job.status.over}
        idle = [old for old, job in self._models.items() if old not in busy and job.status.over and old != choice]
        for old in idle[: max(0, len(self._models) + 1 - self._keep)]:
            self.forget(old)


def _loaded(model: Job[LM]) -> LM:
    """The model, or its own sentence why it is not there."""
    status = model.wait()
    if status.state != "done":
        raise InputError(status.error or "The model's loading was stopped. Load it again.")
    return model.result
