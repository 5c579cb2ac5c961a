"""Which rank failed first, and how to say so."""

import linecache
import os
import signal
import sys
import textwrap
from dataclasses import dataclass, field

from stepmoe.errors import RankError, RankTimeout
from stepmoe.launch.answers import Answer, Failure, Frame
from stepmoe.launch.where import NOT_IN_ONE

AFRESH = (
    "The next call works; what the ranks held (groups, models, launch.rank.state) is gone."
)
RESTARTED = (
    "The ranks are being restarted, and the next call works; what they held (groups, models, "
    "launch.rank.state) is gone."
)


@dataclass
class Outcome:
    """What became of a call.

    Attributes:
        answers: of the ranks that answered.
        deaths: exit codes of ranks that ended (negative: the signal), None if unknown.
        where: what ranks reported when the time limit came.
        lost: ranks that neither answered nor let themselves be interrupted.
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    deaths: dict[int, int | None] = field(default_factory=dict)
    where: dict[int, str] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)

    @property
    def failures(self) -> dict[int, Failure]:
        """The ranks' exceptions, causes before consequences, then in time."""
        found = {rank: a.failure for rank, a in self.answers.items() if a.failure}
        return dict(sorted(found.items(), key=lambda item: (item[1].consequence, item[1].time)))

    @property
    def has_cause(self) -> bool:
        """Whether a rank failed on its own, not because another one had."""
        unsendable = any(answer.unsendable for answer in self.answers.values())
        return bool(self.deaths) or unsendable or any(
            not failure.consequence for failure in self.failures.values()
        )

    @property
    def all_returned(self) -> bool:
        """Whether every rank that answered has a result, and none ended."""
        return not self.deaths and all(a.value is not None for a in self.answers.values())


def error_from(outcome: Outcome, world: int, timeout: float | None, after: str) -> Exception:
    """The RankError or RankTimeout for a call that failed.

    Args:
        after: the last line: what the failure did to the ranks.
    """
    failures = outcome.failures
    genuine = [rank for rank, failure in failures.items() if not failure.consequence]
    if genuine:
        return _raised(genuine, failures, after)
    if outcome.deaths:
        rank, code = next(iter(outcome.deaths.items()))
        return RankError(f"rank {rank} {how_it_ended(code)}\n{after}", rank=rank)
    for rank, answer in outcome.answers.items():
        if answer.unsendable:
            message = (
                f"rank {rank} returned {answer.unsendable}, which cannot be sent to the notebook: "
                f"return tensors, numbers, strings or containers of them\n{after}"
            )
            return RankError(message, rank=rank)
    if outcome.where or outcome.lost or any(
        answer.interrupted is not None for answer in outcome.answers.values()
    ):
        return _timed_out(outcome, world, timeout, after)
    return _raised(list(failures)[:1], failures, after)


def how_it_ended(code: int | None) -> str:
    """For a sentence that starts with the rank."""
    if code is None:
        return "ended: its process is gone"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


def _raised(ranks: list[int], failures: dict[int, Failure], after: str) -> RankError:
    first, others = ranks[0], ranks[1:]
    text = traceback_text(failures[first])
    lines = [f"rank {first} raised {failures[first].text}", f"Traceback of rank {first}:", text]
    if others:
        names = ", ".join(str(rank) for rank in sorted(others))
        lines.append(f"{len(others)} more raised after it: rank{'s'[:len(others) - 1]} {names}.")
    return RankError("\n".join([*lines, after]), rank=first, traceback=text)


def _timed_out(outcome: Outcome, world: int, timeout: float | None, after: str) -> RankTimeout:
    waiting = {rank: _waits_in(rank, outcome) for rank in range(world)}
    lines = [f"  rank {rank}: {text}" for rank, text in waiting.items()]
    message = "\n".join([f"the call did not end within {timeout:g} s. In which collective:", *lines])
    return RankTimeout(f"{message}\n{after}", waiting=waiting)


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
    for frame in failure.frames:
        source = frame.source or linecache.getline(frame.filename, frame.line).strip()
        lines.append(f"  {short_name(frame)}, line {frame.line}, in {frame.function}")
        if source:
            lines.append(textwrap.indent(source, "    "))
    return "\n".join([*lines, failure.text])


def short_name(frame: Frame) -> str:
    """"Cell In[3]" for a notebook's cell, else the path from the folder it is imported from."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        named = shell.compile.format_code_name(frame.filename)
        if named is not None:
            return " ".join(named)
    roots = [os.path.abspath(root) for root in sys.path]
    fitting = [root for root in roots if frame.filename.startswith(root + os.sep)]
    return os.path.relpath(frame.filename, max(fitting, key=len)) if fitting else frame.filename
