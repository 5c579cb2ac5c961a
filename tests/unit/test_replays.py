"""Replays of a CUDA graph taken apart, from traces whose truth is known; no GPU needed."""

import random

import pytest
import torch

from stepmoe.comm.groups import RankGroup
from stepmoe.measure import replays
from stepmoe.measure.replays import _problem, replays_of, split_of
from stepmoe.measure.rounds import Split

NAMES = ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "one_shot_kernel", "gemm", "_two_shot_kernel")


def kernel(name, begin, seconds, launch):
    times = {"ts": begin * 1e6, "dur": seconds * 1e6}
    return {"ph": "X", "cat": "kernel", "name": name, "args": {"correlation": launch}, **times}


def rank_trace(lateness, transfer, compute):
    """Two replays of three products, each followed by a collective that all ranks leave together.

    lateness: seconds that this rank's products take longer than the slowest rank's take less.
    """
    events, now = [], 7.0
    for launch, name in ((11, "cudaGraphLaunch"), (12, "cudaGraphLaunch_v10000")):
        events.append({"ph": "X", "cat": "cuda_runtime", "name": name, "ts": 0,
                       "dur": 1, "args": {"correlation": launch}})  # fmt: skip
        # A meeting before the replay, which a host launched, is none of the replay's.
        events.append(kernel(NAMES[0], now, 0.5, launch + 100))
        now += 1
        for number, (late, work) in enumerate(zip(lateness, compute, strict=True)):
            events.append(kernel("gemm", now, work - late, launch))
            events.append(
                kernel(NAMES[(0, 1, 3)[number]], now + work - late, late + transfer, launch)
            )
            now += work + transfer
    random.Random(0).shuffle(events)
    return {"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}


def test_the_shortest_kernel_is_the_collective_and_the_rest_is_waiting():
    compute, transfer = [0.3, 0.2, 0.4], 0.05
    lateness = [[0, 0.1, 0.02], [0.2, 0, 0.01], [0.1, 0.05, 0]]  # seconds each rank comes early
    ranks = [replays_of(rank_trace(late, transfer, compute)) for late in lateness]
    assert [len(own) for own in ranks] == [2, 2, 2]
    for replay in range(2):
        for index, late in enumerate(lateness):
            split = split_of([own[replay] for own in ranks], index)
            assert split.total == pytest.approx(sum(compute) + 3 * transfer)
            assert split.communication == pytest.approx(3 * transfer)
            assert split.waiting == pytest.approx(sum(late))


def test_profiles_that_do_not_fit_together_are_refused():
    group = RankGroup("tp", (0, 1))
    good = replays_of(rank_trace([0, 0, 0], 0.1, [1, 1, 1]))
    assert _problem([good, good], 2, group, 3) == ""
    assert "saw [1, 2] of 2 replays" in _problem([good, good[:1]], 2, group, 3)
    assert "saw [2, 3] kernels" in _problem(
        [good, [good[0], type(good[1])(1.0, [0.1] * 2)]], 2, group, 3
    )
    # One of four collectives by a kernel of an unknown name, on every rank.
    assert "saw [3] kernels that communicate in a replay, and the ledger 4" in _problem(
        [good, good], 2, group, 4
    )
    silent = [type(replay)(1.0, []) for replay in good]
    assert "saw [0] kernels" in _problem([silent, silent], 2, group, 3)
    assert _problem([silent], 2, RankGroup("tp", (0,)), 0) == ""
    simulated = RankGroup("tp", (0, 1), simulated=True)
    assert _problem([silent], 2, simulated, 3) == ""


def test_a_simulated_rank_s_replays_are_its_own_whatever_its_number(monkeypatch):
    profile, activities = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile(activities=activities))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    silent = [replays.Replay(0.5, []), replays.Replay(0.25, [])]
    monkeypatch.setattr(replays, "replays_of", lambda trace: silent)
    group = RankGroup("tp", (0, 1, 2, 3), index=3, simulated=True)
    splits, problem = replays.split_replays(
        lambda: None, lambda: None, torch.device("cpu"), group, 2, collectives=7
    )
    assert problem == ""
    assert splits == [Split(0.5, 0.0, 0), Split(0.25, 0.0, 0)]
