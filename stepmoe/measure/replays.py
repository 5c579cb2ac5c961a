"""Where the time of a replayed CUDA graph goes: its kernels, as torch.profiler saw them.

Inside a replay no host can meet the others or read a clock, so it is taken apart afterwards. All
ranks run the same kernels in the same order. The last rank to reach a collective waits for nobody:
the shortest of the ranks' kernels is the collective, what the others took longer is waiting.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepmoe.comm.groups import RankGroup, meet
from stepmoe.measure.rounds import Split

# Kernels that talk to other ranks: NCCL's; kernels.all_reduce_norm_gpu; FlashInfer's trtllm_ar.
_TALKS = re.compile(r"nccl|one_shot_kernel|two_shot_kernel|allreduce_fusion", re.IGNORECASE)


@dataclass(frozen=True)
class Replay:
    """Seconds from the first kernel's begin to the last one's end, and of each that communicates,
    in order."""

    total: float
    talking: list[float]


def split_replays(
    run: Callable[[], object],
    prepare: Callable[[], None],
    device: torch.device,
    group: RankGroup,
    count: int,
    collectives: int,
) -> tuple[list[Split], str]:
    """This rank's splits of `count` replays, which all ranks of the group make together.

    Args:
        run: replays the graph once; prepare: what comes before each time.
        collectives: how many a replay has, by the ledger.

    Returns:
        The splits; or none, and why: the ranks' profiles do not fit together, or not the ledger.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(count):
            prepare()
            meet(group, device)
            torch.cuda.synchronize(device)
            run()
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        own = replays_of(json.loads(file.read_text()))
    every, place = [own], 0  # a simulated rank, whatever its number, is the only one that was seen
    if group.process_group is not None:
        every, place = [own for _ in range(group.size)], group.index
        dist.all_gather_object(every, own, group=group.process_group)
    if problem := _problem(every, count, group, collectives):
        return [], f"decode steps were not split: {problem}"
    return [split_of([rank[i] for rank in every], place) for i in range(count)], ""


def replays_of(trace: dict[str, Any]) -> list[Replay]:
    """The replays in one rank's exported trace: kernels that one cudaGraphLaunch started."""
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    launches = [
        event["args"]["correlation"]
        for event in complete
        if event["name"].startswith("cudaGraphLaunch")  # CUPTI's own name ends in _v10000
    ]
    kernels: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(complete, key=lambda event: event["ts"]):
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[event["args"].get("correlation")].append(event)
    return [
        Replay(
            (max(e["ts"] + e["dur"] for e in started) - started[0]["ts"]) / 1e6,
            [e["dur"] / 1e6 for e in started if _TALKS.search(e["name"])],
        )
        for launch in sorted(launches)
        if (started := kernels[launch])
    ]


def split_of(ranks: Sequence[Replay], index: int) -> Split:
    """Split of one replay on the rank with this index, given that of every rank."""
    own = ranks[index]
    shortest = [min(times) for times in zip(*(r.talking for r in ranks), strict=True)]
    communication = sum(shortest)
    return Split(own.total, communication, sum(own.talking) - communication)


def _problem(every: list[list[Replay]], count: int, group: RankGroup, collectives: int) -> str:
    if {len(own) for own in every} != {count}:
        return f"torch.profiler saw {sorted(map(len, every))} of {count} replays on the ranks"
    kinds = {len(replay.talking) for own in every for replay in own}
    # A kernel that _TALKS does not know would count as compute. A simulated rank has none.
    if kinds != {0 if group.simulated else collectives}:
        return (
            f"torch.profiler saw {sorted(kinds)} kernels that communicate in a replay, and the "
            f"ledger {collectives} collectives"
        )
    return ""
