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
        stand_in: seconds of one step for what stands in for a simulated rank's collectives
            (stand_ins.py); 0 on a real rank.
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
