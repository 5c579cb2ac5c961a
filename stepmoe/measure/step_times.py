"""What one rank keeps of one kind of step of one variant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stepmoe.comm.ledger import Ledger
from stepmoe.measure.rounds import Split

#: Steps of each kind that are run again to see where their time goes.
SPLITS = 5


@dataclass
class StepTimes:
    """One kind of step of one variant on one rank.

    Attributes:
        batch, length, context: sequences, new tokens of each, tokens that were in the cache.
        seconds: of every step, in order.
        counts, sent: collectives of one step, by kind, and {(op, bytes): how many}.
        stand_in: seconds of one step that the copies which stand in for a simulated rank's
            collectives took: a real rank has the collectives' time instead. 0 on a real rank, and
            of sums, for which nothing stands in. NaN in decode where a CUDA graph replays them:
            nothing times them there, and they count as compute. In prefill they are timed in a
            step launched by the host, whose launches, some µs each, are then in it.
        is_graph: steps that were replayed from a CUDA graph; of prefill, the full ones.
        splits: where the time of some such steps went, timed apart.
        remark: why there are none.
    """

    phase: str
    batch: int
    length: int
    context: int
    seconds: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    sent: dict[tuple[str, int], int] = field(default_factory=dict)
    bytes_sent: float = 0.0
    stand_in: float = 0.0
    is_graph: bool = False
    splits: list[Split] = field(default_factory=list)
    remark: str = ""

    def note(self, ledger: Ledger) -> None:
        """Keep what one such step sent; of prefill, one launched by the host."""
        self.counts, self.bytes_sent = ledger.counts(), ledger.bytes_sent()
        self.sent = dict(Counter((entry.op, entry.bytes) for entry in ledger.entries))
        # A sum stays as it is, so its seconds are the ledger's own clock; and what the fused
        # operation adds and normalises, a real rank does too.
        times = [
            entry.seconds
            for entry in ledger.entries
            if entry.implementation == "simulated" and entry.op in ("all_gather", "reduce_scatter")
        ]
        untimed = self.is_graph and self.phase == "decode"
        self.stand_in = float("nan") if times and untimed else float(sum(times))


def mean_parts(ranks: Sequence[StepTimes]) -> dict[str, float]:
    """The mean rank's compute, communication and waiting of a step (s), medians over its splits."""
    parts = np.array(
        [[(s.total, s.communication, s.waiting) for s in rank.splits] for rank in ranks]
    )
    if not parts.size:
        return dict.fromkeys(("compute", "communication", "waiting"), float("nan"))
    total, communication, waiting = parts.mean(axis=0).T
    return {
        "compute": float(np.median(total - communication - waiting)),
        "communication": float(np.median(communication)),
        "waiting": float(np.median(waiting)),
    }
