"""Ledger: every collective of this rank's Communicators, with layer, site, size and time.

    with sm.Ledger() as ledger:
        model(input_ids)
    ledger.counts()        # {"all_reduce": 10}
    print(ledger)

Without an open ledger nothing is recorded and nothing is timed.

`split_waiting()`, for measuring, tells waiting for other ranks from the time a collective takes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stepmoe.comm.entry import Entry as Entry
from stepmoe.comm.groups import RankGroup, meet


class Counts(dict[str, int]):
    """Numbers by name, and 0 for a name that is not there; equal to a plain dict."""

    def __missing__(self, name: str) -> int:
        return 0


@dataclass
class Ledger:
    """Collects what this rank does while it is open. Ledgers nest, and travel between processes.

        with sm.Ledger() as ledger:
            model(input_ids)
        ledger.counts()                                        # {"all_reduce": 10}
        [(e.op, e.layer, e.site, e.bytes, e.seconds) for e in ledger.entries]

    Args:
        annotates: whether torch.profiler, where it runs, is to see the steps by `label`.
    Attributes:
        steps: an Entry for every collective and, between them, for local work.
        notes: what ran instead of what one would expect, and why.
        rank: of this process; 0 without torch.distributed.
    Raises:
        RuntimeError: it is opened a second time.
    """

    steps: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rank: int = 0
    annotates: bool = False
    _opened: float = field(default=0.0, repr=False)
    _pending: list[tuple[Entry, Any]] = field(default_factory=list, repr=False)

    def __enter__(self) -> Ledger:
        if self._opened:
            raise RuntimeError("this Ledger has already been used: open a new one")
        dist = torch.distributed
        self.rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._opened = time.perf_counter()
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        for entry, (begin, met, end) in self._pending:
            first_entry, (first, *_) = self._pending[0]
            end.synchronize()
            entry.start = first_entry.start + first.elapsed_time(begin) / 1e3
            entry.seconds = begin.elapsed_time(end) / 1e3
            entry.waited = begin.elapsed_time(met) / 1e3 if met else 0.0
        self._pending.clear()

    @property
    def entries(self) -> list[Entry]:
        """The collectives, in order."""
        return [step for step in self.steps if step.kind == "collective"]

    def counts(self) -> dict[str, int]:
        """How many collectives of each kind (`Entry.op`), on this rank; none without peers.

        A dict of the kinds that ran; [another kind] is 0.
        """
        return Counts(Counter(entry.op for entry in self.entries))

    def bytes_sent(self) -> float:
        """Fewest bytes this rank must have sent, over all collectives."""
        return sum(entry.bytes_sent for entry in self.entries)

    def of_layer(self, layer: int | None) -> list[Entry]:
        """The collectives of one decoder layer (None: those outside the layers)."""
        return [entry for entry in self.entries if entry.layer == layer]

    def __str__(self) -> str:
        rows = [("layer", "site", "collective", "group", "shape", "sends")]
        for e in self.entries:
            layer = "-" if e.layer is None else str(e.layer)
            op = f"{e.op} [{e.implementation}]" if e.implementation else e.op
            shape = " x ".join(map(str, e.shape))
            rows.append((layer, e.site, op, e.group, shape, f"{e.bytes_sent:,.0f} B"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if column in (0, 5) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        total = ", ".join(f"{n} {op}" for op, n in self.counts().items()) or "no collective"
        reasons = sorted({f"{e.implementation}: {e.reason}" for e in self.entries if e.reason})
        total = f"total: {total}; {self.bytes_sent():,.0f} B sent"
        return "\n".join([*lines, total, *reasons, *self.notes])


_open: list[Ledger] = []
_in_flight: Entry | None = None
_splits = False
_untimed: Ledger | None = None


def note(text: str) -> None:
    """Write a remark to every open ledger, once each: what ran instead, and why."""
    for ledger in _open if _untimed is None else [_untimed]:
        if text not in ledger.notes:
            ledger.notes.append(text)


def in_flight() -> str | None:
    """The collective this process is inside at this moment, in words; None if in none.

    Another thread may ask: it is how a rank that waits is told from one that computes.
    """
    entry = _in_flight
    if entry is None:
        return None
    layer = "outside the layers" if entry.layer is None else f"layer {entry.layer}"
    return f"{entry.op} of {entry.tensor}, {layer}, {entry.site}, group {entry.group}"


@contextmanager
def split_waiting() -> Iterator[None]:
    """Let the ranks meet before every collective that an open ledger records, and time that.

    A measuring mode, which adds a small message to each. All ranks must be inside it together, with
    a ledger open; without a ledger it does nothing.
    """
    global _splits
    _splits = True
    try:
        yield
    finally:
        _splits = False


@contextmanager
def untimed() -> Iterator[Ledger]:
    """Around the capture of a CUDA graph: its steps go to a ledger of their own, without times.

    While a graph is captured nothing runs, and no clock may be read. `repeat` writes the steps to
    the open ledgers each time the graph is replayed.
    """
    global _untimed
    _untimed = ledger = Ledger()
    try:
        yield ledger
    finally:
        _untimed = None


def repeat(captured: Ledger) -> None:
    """Write the steps and notes of a replayed graph to every open ledger, with 0 seconds each."""
    for ledger in _open:
        now = time.perf_counter() - ledger._opened
        ledger.steps += [replace(step, start=now) for step in captured.steps]
    for text in captured.notes:
        note(text)


@contextmanager
def record(entry: Entry, device: torch.device, group: RankGroup | None = None) -> Iterator[Entry]:
    """Around one step: marks a collective as in flight, and times it if a ledger is open.

    Args:
        group: the ranks of a collective; None for local work.
    """
    global _in_flight
    if entry.kind == "collective":
        _in_flight = entry
    try:
        if _untimed is not None:
            yield entry
            _untimed.steps.append(replace(entry))
        elif _open:
            with _annotation(entry), _timed(entry, device, group):
                yield entry
        else:
            yield entry
    finally:
        if entry.kind == "collective":
            _in_flight = None


def _annotation(entry: Entry) -> AbstractContextManager[Any]:
    if any(ledger.annotates for ledger in _open):
        return torch.profiler.record_function(entry.label)
    return nullcontext()


@contextmanager
def _timed(entry: Entry, device: torch.device, group: RankGroup | None) -> Iterator[None]:
    ledgers = list(_open)
    on_gpu = device.type == "cuda"
    mark: Callable[[], Any] = _event if on_gpu else time.perf_counter
    opened = time.perf_counter()
    begin, met = mark(), None
    if _splits and group is not None and group.size > 1:
        meet(group, device)
        met = mark()
    yield
    end = mark()
    if not on_gpu:
        entry.seconds, entry.waited = end - begin, (met or begin) - begin
    for ledger in ledgers:
        kept = replace(entry, start=opened - ledger._opened)
        ledger.steps.append(kept)
        if on_gpu:
            ledger._pending.append((kept, (begin, met, end)))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
