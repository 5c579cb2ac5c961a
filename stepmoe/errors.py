"""The errors a user of stepmoe meets; every message names the value and says what to do."""

from functools import partial
from typing import Any


class ConfigError(ValueError):
    """A shape, a parallel layout or an argument that cannot work; names the numbers."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated or of another layout; names tensor and file."""


class PlacementError(RuntimeError):
    """A collective or an operation that does not fit the placement of its tensor.

    Names the layer, the tensor and the group.
    """


class RankError(RuntimeError):
    """A function failed in at least one rank.

    Attributes:
        rank: the rank that failed first (the cause, not a peer whose connection it closed).
        traceback: that rank's own traceback, as text.
    """

    def __init__(self, message: str, *, rank: int, traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback

    def __reduce__(self) -> tuple[Any, ...]:  # keyword arguments do not travel by themselves
        return partial(RankError, rank=self.rank, traceback=self.traceback), self.args


class RankTimeout(RuntimeError):
    """A call did not end within its time limit.

    Attributes:
        waiting: for each rank, the last collective it entered, or "not in one".
    """

    def __init__(self, message: str, *, waiting: dict[int, str]) -> None:
        super().__init__(message)
        self.waiting = waiting

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RankTimeout, waiting=self.waiting), self.args
