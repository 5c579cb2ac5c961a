"""How long a simulated rank's step takes for what stands in for its collectives.

A real rank has the collectives' time instead, so a prediction takes it off again.
"""

from __future__ import annotations

import statistics
from collections import Counter

import torch

from stepmoe.comm import wire
from stepmoe.comm.groups import RankGroup
from stepmoe.comm.ledger import Ledger
from stepmoe.measure.clock import seconds_of
from stepmoe.measure.flush import graph_of

_CALLS = 8  # in one graph
_REPLAYS = 7
_Kind = tuple[str, tuple[int, ...], torch.dtype | None]


def stand_in_seconds(ledger: Ledger, group: RankGroup, device: torch.device) -> float:
    """Seconds of one step, of which the ledger is.

    For a sum nothing stands in: it stays this rank's addend. And what a fused operation adds and
    normalises, a real rank does too. On a GPU the others are run again, alone and from a CUDA
    graph: in a step launched by the host their time would be that of the launches, and within a
    graph nothing times them.
    """
    entries = [
        entry
        for entry in ledger.entries
        if entry.implementation == "simulated" and entry.op in ("all_gather", "reduce_scatter")
    ]
    if device.type != "cuda":
        return float(sum(entry.seconds for entry in entries))
    kinds: Counter[_Kind] = Counter((entry.op, entry.shape, entry.dtype) for entry in entries)
    return sum(count * _replayed(kind, group, device) for kind, count in kinds.items())


def _replayed(kind: _Kind, group: RankGroup, device: torch.device) -> float:
    """Seconds of one stand-in among others like it."""
    op, shape, dtype = kind
    whole = torch.randn(shape, device=device).to(dtype)
    own = whole.chunk(group.size)[group.index].clone()

    def run() -> None:
        for _ in range(_CALLS):
            if op == "all_gather":
                wire.all_gather(whole, own, group)
            else:
                wire.reduce_scatter(own, whole, group)

    replay = graph_of(run)
    replay()
    return statistics.median(seconds_of(replay, device) for _ in range(_REPLAYS)) / _CALLS
