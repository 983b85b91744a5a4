"""How long work tells how far it is, and how it is stopped, without flags handed through every function.

A computation loops over `track(...)`; whoever started it listens with `reporting(...)`. The listener lives in a `ContextVar`, so
two threads do not hear each other, and it stops the work by raising `Cancelled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

Listener = Callable[[str, int, int], None]
"""Called with what is done, how many steps of it are done, and how many there are."""

_listener: ContextVar[Listener | None] = ContextVar("workbench_progress", default=None)


class Cancelled(Exception):
    """Raised by a listener to stop the work it listens to."""


@contextmanager
def reporting(listener: Listener) -> Iterator[None]:
    """Within, every `track` of this thread calls `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def track(steps: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items of `steps`, reported one by one; a listener that raises ends the loop before its next item."""
    listener = _listener.get()
    for done, step in enumerate(steps):
        if listener is not None:
            listener(what, done, total)
        yield step
    if listener is not None:
        listener(what, total, total)
