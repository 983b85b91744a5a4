"""What an engine is: it moves runs and lanes through one block after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor

from workbench.models import LM
from workbench.sweep.lanes import Lane, Run

POSITIONS_AT_ONCE = 1024
"""Positions (rows x tokens) that go through a block together, so that intermediates stay in cache."""


class Engine(ABC):
    """Moves clean rows, corrupted rows and lanes through one block after the other."""

    def __init__(self, lm: LM, runs: Sequence[Run]) -> None:
        self.lm, self.runs = lm, runs

    @abstractmethod
    def enter(self, layer: int) -> None:
        """Takes the clean and corrupted rows through a block, into `run.above`, and keeps what lanes need of them."""

    @abstractmethod
    def through(self, layer: int, lanes: Sequence[Lane]) -> None:
        """Takes lanes through the block."""

    @abstractmethod
    def restored(self, layer: int, lanes: Sequence[Lane]) -> dict[Lane, Tensor]:
        """For lanes whose window starts at this layer: the state (sample, d_model) of the restored token above it."""

    def error(self) -> float:
        """The largest difference of a clean block from the model's own, in parts of what the block adds."""
        return 0.0


def chunks(lanes: Sequence[Lane]) -> Iterator[list[Lane]]:
    """Lanes in order, as many at a time as `POSITIONS_AT_ONCE` allows; one at least."""
    some: list[Lane] = []
    used = 0
    for lane in lanes:
        size = lane.group.run.samples * (lane.group.run.length - lane.group.first)
        if some and used + size > POSITIONS_AT_ONCE:
            yield some
            some, used = [], 0
        some.append(lane)
        used += size
    if some:
        yield some
