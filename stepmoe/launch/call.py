"""One call in all ranks: sent, waited for, and cleaned up when it fails."""

import time
from queue import Empty, SimpleQueue
from typing import Any

from stepmoe.launch import worker
from stepmoe.launch.failures import Outcome
from stepmoe.launch.progress_bar import DELAY, Bar
from stepmoe.launch.team import Team

# After the time limit, ranks report where they are and interrupt themselves; one that has not
# within this (s) will not.
_REPORT = 0.75
# A rank's death arrives within milliseconds; its peers' broken connections can be faster (s).
_CAUSE = 1.0
# Then peers are given the time to fail on their own (10 ms suffice on a quiet machine), and to be
# interrupted (s); those that do neither are lost. An error is to be reported within 1 s; after a
# time limit or an interrupt there is more time, and ranks that can be freed need no restart.
_FAIL = 0.1
_INTERRUPT_AFTER_ERROR, _INTERRUPT = 0.5, 1.25
# Output follows its result within milliseconds (s).
_OUTPUT = 2.0
_REDRAW = 0.25


class Call:
    """A function under way in every rank."""

    def __init__(self, team: Team, payload: bytes, timeout: float | None) -> None:
        self._team = team
        self._payload = payload
        self._timeout = timeout
        self._news: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._started = time.monotonic()
        self._limit = None if timeout is None else self._started + timeout + _REPORT
        self.outcome = Outcome()
        self._cleaning = False
        news = self._news
        team.cluster.on_death = lambda pid, code: news.put((team.rank_of(pid), _Death(code)))
        for death in team.cluster.deaths:
            team.cluster.on_death(*death)
        self._results: list[Any] = []
        self._pending = set(range(len(team.members)))

    def wait(self) -> None:
        """Send it; until every rank has answered, one has failed, or the time limit has passed."""
        self._send()
        bar = Bar()
        try:
            while self._pending and not self.outcome.failed:
                now = time.monotonic()
                if self._limit is not None and now >= self._limit:
                    self.outcome.limit_passed = True
                    return
                redraw = max(now + _REDRAW, self._started + DELAY)
                self._take(redraw if self._limit is None else min(redraw, self._limit))
                self._show(bar)
        finally:
            bar.close()

    def _send(self) -> None:
        for rank, member in enumerate(self._team.members):
            arguments = (self._payload, self._team.epoch, self._timeout)
            result = member.engine.apply_async(worker.execute, *arguments)
            self._results.append(result)
            result.add_done_callback(lambda _, rank=rank: self._news.put((rank, None)))
        self._payload = b""

    @property
    def succeeded(self) -> bool:
        """Whether every rank has returned."""
        return not self._pending and not self.outcome.failed

    @property
    def needs_restart(self) -> bool:
        """After `clean_up`: whether these ranks can no longer be used."""
        return bool(self.outcome.deaths or self.outcome.lost) or self._team.always_restart

    def clean_up(self) -> None:
        """After a failure: let no rank wait for another, and note those that cannot be freed."""
        self._cleaning = True
        if self.outcome.lacks_cause:
            self._take_until(time.monotonic() + _CAUSE, cause=True)
        for rank in self.outcome.answers:
            self._let_go(rank)
        self._take_until(time.monotonic() + _FAIL)
        for rank in self._pending:
            member = self._team.members[rank]
            self._team.cluster.interrupt(member.engine, member.pid)
        patience = (
            _INTERRUPT_AFTER_ERROR
            if self.outcome.failures and not self.outcome.timed_out
            else _INTERRUPT
        )
        self._take_until(time.monotonic() + patience)
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
            if cause and not self.outcome.lacks_cause:
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
            if self._cleaning:
                self._let_go(rank)

    def _let_go(self, rank: int) -> None:
        """A rank that has returned keeps the connections on which others wait for it."""
        if self.outcome.answers[rank].value is not None:
            self._team.members[rank].engine.apply_async(worker.let_go)

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
