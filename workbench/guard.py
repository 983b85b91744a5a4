"""Who may touch a model's weights when several threads share it: many readers, or one editor.

Reading means that a pass runs or that weights are hashed. A thread that edits may read, and edit again within; the others wait. So
no thread ever computes with weights that another one has changed for a while.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Guard:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.readers: Counter[int] = Counter()
        self.editor: int | None = None
        self.depth = 0


_guards: weakref.WeakKeyDictionary[Any, _Guard] = weakref.WeakKeyDictionary()
_making = threading.Lock()


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Within, no other thread changes the model's weights; waits while one does."""
    guard, me = _guard(model), threading.get_ident()
    with guard.changed:
        guard.changed.wait_for(lambda: guard.editor in (None, me))
        guard.readers[me] += 1
    try:
        yield
    finally:
        with guard.changed:
            guard.readers[me] -= 1
            guard.readers += Counter()  # drops the threads that read no more
            guard.changed.notify_all()


@contextmanager
def editing(model: Any) -> Iterator[None]:
    """Within, this thread alone uses the model; waits until the others have finished.

    Raises:
        RuntimeError: this thread is in the middle of a pass through the model.
    """
    guard, me = _guard(model), threading.get_ident()
    with guard.changed:
        if guard.readers[me] and guard.editor != me:
            raise RuntimeError("A model's weights cannot be changed in the middle of a pass through it.")
        guard.changed.wait_for(lambda: guard.editor == me or (guard.editor is None and not guard.readers.total()))
        guard.editor = me
        guard.depth += 1
    try:
        yield
    finally:
        with guard.changed:
            guard.depth -= 1
            if not guard.depth:
                guard.editor = None
                guard.changed.notify_all()


def _guard(model: Any) -> _Guard:
    with _making:
        return _guards.setdefault(model, _Guard())
