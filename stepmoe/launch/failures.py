"""Which rank failed first, and how to say so."""

import linecache
import os
import signal
import sys
import textwrap
from dataclasses import dataclass, field

from stepmoe.errors import RankError, RankTimeout
from stepmoe.launch.answers import Answer, Failure, Frame
from stepmoe.launch.where import A_CELL, NOT_IN_ONE, is_cell

AFRESH = "The next call works; what the ranks held (groups, models, launch.rank.state) is gone."
RESTARTED = (
    "The ranks are being restarted, and the next call works; what they held (groups, models, "
    "launch.rank.state) is gone."
)

_GLOO_ABORTS = (
    "gloo does so when a collective's tensors differ in shape or dtype from rank to rank: compare "
    "them, print(tensor.shape, tensor.dtype)"
)

_SAME_COLLECTIVE = (
    "All ranks are in the same collective. If it is not just slow, its tensors differ in shape or "
    "dtype, its groups or roots differ, or one rank is in an earlier call of it than the others"
)

# Ranks start a call within milliseconds of each other, on a busy machine within this (s).
_AT_ONCE = 0.25


@dataclass
class Outcome:
    """What became of a call.

    Attributes:
        answers: of the ranks that answered.
        deaths: exit codes of ranks that ended (negative: the signal), None if unknown.
        where: what ranks reported when the time limit came.
        lost: ranks that neither answered nor let themselves be interrupted.
        limit_passed: no rank had failed until well after the limit.
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    deaths: dict[int, int | None] = field(default_factory=dict)
    where: dict[int, str] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    limit_passed: bool = False

    @property
    def failures(self) -> dict[int, Failure]:
        """The ranks' exceptions, causes before consequences, then in time."""
        found = {rank: a.failure for rank, a in self.answers.items() if a.failure}
        return dict(sorted(found.items(), key=lambda item: (item[1].consequence, item[1].time)))

    def take_values(self) -> list[bytes]:
        """The pickled results, in rank order; they are kept no longer.

        ipyparallel's objects refer to each other in circles and so live on for a while; with the
        results of a few calls they would hold hundreds of MiB.
        """
        values = [a.value for _, a in sorted(self.answers.items()) if a.value is not None]
        for answer in self.answers.values():
            answer.value = None
        return values

    @property
    def failed(self) -> bool:
        """Whether a rank has ended, or answered with anything but a result."""
        return bool(self.deaths) or any(a.value is None for a in self.answers.values())

    @property
    def left(self) -> bool:
        """Whether a function destroyed the process group of its rank."""
        return any(answer.left for answer in self.answers.values())

    @property
    def timed_out(self) -> bool:
        """Whether a rank exceeded the time limit; only then an interrupted one says where."""
        return self.limit_passed or any(answer.interrupted for answer in self.answers.values())

    @property
    def lacks_cause(self) -> bool:
        """Whether ranks merely lost another one, of which nothing is known yet."""
        others = [a for a in self.answers.values() if a.unsendable or a.interrupted is not None]
        failures = self.failures.values()
        return (
            bool(failures)
            and not self.deaths
            and not others
            and all(failure.consequence for failure in failures)
        )


def error_from(outcome: Outcome, world: int, timeout: float | None, after: str) -> Exception:
    """The RankError or RankTimeout for a call that failed.

    Args:
        after: the last line: what the failure did to the ranks.
    """
    failures = outcome.failures
    genuine = {rank: failure for rank, failure in failures.items() if not failure.consequence}
    if genuine:
        return _raised(_first(genuine), genuine, after)
    if outcome.deaths:
        rank, code = next(iter(outcome.deaths.items()))
        return RankError(f"rank {rank} {how_it_ended(code)}\n{after}", rank=rank)
    for rank, answer in sorted(outcome.answers.items()):
        if answer.unsendable:
            message = (
                f"rank {rank} returned {answer.unsendable}, which cannot be sent to the notebook: "
                f"return tensors, numbers, strings or containers of them\n{after}"
            )
            return RankError(message, rank=rank)
    if outcome.timed_out:
        return _timed_out(outcome, world, timeout, after)
    return _raised(next(iter(failures)), failures, after)


def how_it_ended(code: int | None) -> str:
    """For a sentence that starts with the rank."""
    if code is None:
        return "ended: its process is gone"
    if code == -signal.SIGABRT:
        return f"was killed by SIGABRT: native code gave up. {_GLOO_ABORTS}"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


def _first(failures: dict[int, Failure]) -> int:
    """The first rank in time; of those with the same error at the same time, the lowest.

    A mistake in the function fails in every rank at once, and whose clock was ahead tells nothing.
    """
    earliest = next(iter(failures.values()))
    return min(
        rank
        for rank, failure in failures.items()
        if failure.text == earliest.text and failure.time - earliest.time < _AT_ONCE
    )


def _raised(first: int, failures: dict[int, Failure], after: str) -> RankError:
    others = sorted(failures.keys() - {first})
    text = traceback_text(failures[first])
    lines = [f"rank {first} raised {failures[first].text}", f"Traceback of rank {first}:", text]
    if others:
        names = ", ".join(str(rank) for rank in others)
        lines.append(f"{len(others)} more failed with it: rank{'s'[: len(others) - 1]} {names}.")
    return RankError("\n".join([*lines, after]), rank=first, traceback=text)


def _timed_out(outcome: Outcome, world: int, timeout: float | None, after: str) -> RankTimeout:
    waiting = {rank: _waits_in(rank, outcome) for rank in range(world)}
    lines = [f"  rank {rank}: {text}" for rank, text in waiting.items()]
    head = f"the call did not end within {timeout:g} s. The ranks were in:"
    places = set(waiting.values())
    if len(places) == 1 and not any(place.startswith(NOT_IN_ONE) for place in places):
        lines.append(_SAME_COLLECTIVE)
    return RankTimeout("\n".join([head, *lines, after]), waiting=waiting)


def _waits_in(rank: int, outcome: Outcome) -> str:
    answer = outcome.answers.get(rank)
    if outcome.where.get(rank):
        return outcome.where[rank]
    if answer and answer.interrupted:
        return answer.interrupted
    if answer and answer.value is not None:
        return f"{NOT_IN_ONE} (its function has returned)"
    return f"{NOT_IN_ONE} (no report: busy in native code)"


def traceback_text(failure: Failure) -> str:
    """A rank's traceback as Python prints it, with the notebook's cells and without long paths."""
    lines: list[str] = []
    if failure.parent:
        lines += [traceback_text(failure.parent), "which led to:"]
    elif failure.parent_skipped:
        lines.append("(the exceptions that led to this one are left out)")
    stack = [_frame_text(frame) for frame in failure.frames]
    if failure.skipped:
        stack.insert(len(stack) // 2, f"  ... {failure.skipped} more frames ...")
    lines += [*stack, failure.text]
    for number, member in enumerate(failure.members, 1):
        lines += [f"  its member {number}:", textwrap.indent(traceback_text(member), "    ")]
    if failure.members_skipped:
        lines.append(f"  and {failure.members_skipped} more")
    return "\n".join(lines)


def _frame_text(frame: Frame) -> str:
    source = frame.source or linecache.getline(frame.filename, frame.line).strip()
    line = f"  {short_name(frame.filename)}, line {frame.line}, in {frame.function}"
    return "\n".join([line, textwrap.indent(source, "    ")] if source else [line])


def short_name(path: str) -> str:
    """A file's path from the folder it is imported from; "a cell" for a notebook's.

    A cell's number would help, but is not the same each time a notebook runs (and none at all
    under nbval); the line of source that follows tells which cell it is.
    """
    if is_cell(path):
        return A_CELL
    roots = [os.path.abspath(root) for root in sys.path]
    fitting = [root for root in roots if path.startswith(root + os.sep)]
    return os.path.relpath(path, max(fitting, key=len)) if fitting else path
