"""One call in all ranks: sent, waited for, and cleaned up when it fails."""

import time
from queue import Empty, SimpleQueue
from typing import Any

from stepmoe.launch import worker
from stepmoe.launch.cluster import Cluster
from stepmoe.launch.failures import Outcome
from stepmoe.launch.progress import DELAY, Bar

# After the time limit, ranks report where they are and interrupt themselves; one that has not
# within this (s) will not.
_REPORT = 0.75
# A rank's death arrives within milliseconds; its peers' broken connections can be faster (s).
_CAUSE = 1.0
# A failure is to be reported within 1 s. Until then peers are given the time to fail on their
# own, then to be interrupted (s); those that do neither are lost.
_FAIL, _INTERRUPT = 0.2, 0.4
# Output follows its result within milliseconds (s).
_OUTPUT = 2.0
_REDRAW = 0.25


class Member:
    """One rank as the notebook knows it: its engine and its process id."""

    def __init__(self, engine: Any, pid: int) -> None:
        self.engine = engine
        self.pid = pid


class Call:
    """A function under way in every rank."""

    def __init__(
        self,
        cluster: Cluster,
        members: list[Member],
        payload: bytes,
        epoch: int,
        timeout: float | None,
    ) -> None:
        self._cluster = cluster
        self._members = members
        self._news: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._started = time.monotonic()
        self._limit = None if timeout is None else self._started + timeout + _REPORT
        self.outcome = Outcome()
        ranks = {member.pid: rank for rank, member in enumerate(members)}
        cluster.on_death = lambda pid, code: self._news.put((ranks[pid], _Death(code)))
        self._results = [
            member.engine.apply_async(worker.execute, payload, epoch, timeout)
            for member in members
        ]
        self._pending = set(range(len(members)))
        for rank, result in enumerate(self._results):
            result.add_done_callback(lambda _, rank=rank: self._news.put((rank, None)))

    def wait(self) -> None:
        """Until every rank has answered, one has failed, or the time limit has passed."""
        bar = Bar()
        try:
            while self._pending and not self.outcome.failed:
                now = time.monotonic()
                if self._limit is not None and now >= self._limit:
                    return
                redraw = max(now + _REDRAW, self._started + DELAY)
                self._take(redraw if self._limit is None else min(redraw, self._limit))
                self._show(bar)
        finally:
            bar.close()

    def clean_up(self) -> None:
        """After a failure: let no rank wait for another, and note those that cannot be freed."""
        if not self.outcome.has_cause:
            self._take_until(time.monotonic() + _CAUSE, cause=True)
        for rank in self.outcome.answers:
            self._let_go(rank)
        self._take_until(time.monotonic() + _FAIL)
        for rank in self._pending:
            self._cluster.interrupt(self._members[rank].engine, self._members[rank].pid)
        self._take_until(time.monotonic() + _INTERRUPT)
        self.outcome.lost = set(self._pending)
        self._note_where()

    def output(self) -> dict[int, tuple[str, str]]:
        """What each rank wrote to stdout and stderr."""
        until = time.monotonic() + _OUTPUT
        written = {}
        for rank, result in enumerate(self._results):
            if rank in self.outcome.answers:
                result.wait_for_output(max(0.0, until - time.monotonic()))
            written[rank] = (result.metadata["stdout"], result.metadata["stderr"])
        return written

    def _take_until(self, moment: float, *, cause: bool = False) -> None:
        while self._pending and time.monotonic() < moment:
            if cause and self.outcome.has_cause:
                return
            self._take(moment)

    def _take(self, until: float) -> None:
        """The next news, if there is any before then."""
        try:
            rank, news = self._news.get(timeout=max(0.0, until - time.monotonic()))
        except Empty:
            return
        if rank not in self._pending:
            return
        self._pending.discard(rank)
        if isinstance(news, _Death):
            self.outcome.deaths[rank] = news.code
        elif self._results[rank].exception() is not None:  # ipyparallel's: the engine is gone
            self.outcome.deaths[rank] = None
        else:
            self.outcome.answers[rank] = self._results[rank].result()

    def _let_go(self, rank: int) -> None:
        self._members[rank].engine.apply_async(worker.let_go)

    def _note_where(self) -> None:
        for rank, result in enumerate(self._results):
            where = result.metadata["data"].get("where")
            if where:
                self.outcome.where[rank] = where

    def _show(self, bar: Bar) -> None:
        report = self._results[0].metadata["data"].get("progress")
        if report and time.monotonic() - self._started >= DELAY:
            bar.show(report)


class _Death:
    def __init__(self, code: int | None) -> None:
        self.code = code
