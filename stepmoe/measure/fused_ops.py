"""How long one all-reduce + add + norm takes in each implementation, on ranks with a GPU each, and
how long the collectives alone.

Runs inside a rank: `ranks.run(time_fused_ops, [1, 64, 2048])`, or under torchrun through
`python -m stepmoe bench-fusion`. Each implementation is compared with float64 before it is timed,
and is not timed where it is wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from stepmoe.comm.communicator import Communicator
from stepmoe.comm.cost import LINKS
from stepmoe.comm.fusion import force
from stepmoe.comm.fusion.vote import find_place
from stepmoe.comm.graphs import capture
from stepmoe.comm.groups import build_groups, meet, world_size
from stepmoe.errors import ConfigError
from stepmoe.launch import rank_device
from stepmoe.measure.clock import seconds_of
from stepmoe.measure.fused_calls import (
    ALONE,
    IMPLEMENTATIONS,
    TOLERANCE,
    Call,
    Inputs,
    call_of,
    error_of,
    make_inputs,
)
from stepmoe.parallel import ParallelConfig

TIMED_IN = "a CUDA graph of calls one after the other, each on a partial sum of its own"
REHEARSED_IN = "a rehearsal: calls without a CUDA graph, by ranks that take turns; no measurement"
# Calls in one graph: enough that launching the graph, some 10 us, adds little to each.
_CALLS, _CALLS_LARGE, _LARGE = 20, 5, 2048
_CALLS_REHEARSED = 1


@dataclass(frozen=True)
class Timing:
    """One implementation at one size.

    Attributes:
        microseconds: of one call on the slowest rank, for each round; empty if it did not run.
        error: relative to float64, the larger of normed values and residual, or that of the sum, on
            the worst rank.
        refusal: why it did not run.
    """

    tokens: int
    implementation: str
    microseconds: tuple[float, ...] = ()
    error: float = 0.0
    refusal: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)


def wire_floor(tokens: int, hidden_size: int, dtype: torch.dtype, ranks: int) -> float:
    """Microseconds that the fewest bytes of an all-reduce take over NVLink 4 (450 GB/s)."""
    size = tokens * hidden_size * dtype.itemsize
    return 2 * (ranks - 1) / ranks * size / LINKS["nvlink4"].bandwidth * 1e6


def time_fused_ops(
    tokens: Sequence[int],
    hidden_size: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 30,
    *,
    rehearsal: bool = False,
) -> list[Timing]:
    """Time every implementation at every number of tokens; in a round, one after the other.

    All ranks call it together and return the same.

    Args:
        rehearsal: show that it works where ranks share a GPU or have none, without CUDA graphs and
            without FlashInfer, whose module takes minutes to compile.

    Raises:
        ConfigError: there is one rank only, or, except in a rehearsal, the ranks have no GPU of
            their own: ranks that share one take turns, and their times would mean nothing.
    """
    group = build_groups(ParallelConfig(world_size()))["tp"]
    place = find_place(group, rank_device()) if group.size > 1 else None
    if place is None:
        raise ConfigError(
            "the fused operation needs two ranks or more, and this is one: start it with torchrun "
            "--nproc-per-node N"
        )
    if place.topology != "one GPU a rank" and not rehearsal:
        raise ConfigError(
            "timing the fused operation needs two ranks or more with one GPU a rank; here: "
            f"{place.topology}. --rehearse shows that it works"
        )
    comm = Communicator(group)
    return [
        timing
        for number in tokens
        for timing in _time_size(comm, number, hidden_size, dtype, rounds, rehearsal)
    ]


def _time_size(
    comm: Communicator,
    tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    rounds: int,
    rehearsal: bool,
) -> list[Timing]:
    calls = _CALLS if tokens <= _LARGE else _CALLS_LARGE
    calls = _CALLS_REHEARSED if rehearsal else calls
    inputs = make_inputs(comm.group, tokens, hidden_size, dtype, calls)
    refusals: dict[str, str] = {}
    replays: dict[str, Callable[[], None]] = {}
    errors: dict[str, float] = {}
    for name in (*ALONE, *IMPLEMENTATIONS):
        try:
            call = call_of(name, rehearsal)
            with force(name) if name not in ALONE else nullcontext():
                inputs.fill()
                errors[name] = _checked(name, error_of(inputs, *call(comm, inputs, 0)))
            replays[name] = partial(_all_calls, name, call, comm, inputs)
            if not rehearsal:
                replays[name] = _captured(replays[name])
        except ConfigError as error:  # raised on every rank, or on none
            refusals[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for number in range(rounds + 3):
        for name, replay in replays.items():
            inputs.fill()
            meet(comm.group, inputs.residual.device)
            seconds = seconds_of(replay, inputs.residual.device)
            if number >= 3:  # the first rounds warm up
                times[name].append(seconds / calls * 1e6)
    return [
        Timing(tokens, name, _slowest(times[name]), errors[name])
        if name in replays
        else Timing(tokens, name, refusal=refusals[name])
        for name in (*ALONE, *IMPLEMENTATIONS)
    ]


def _checked(name: str, error: float) -> float:
    """The worst rank's error; ConfigError, on every rank, where that is no rounding."""
    (worst,) = _slowest([error if math.isfinite(error) else math.inf])  # a maximum may drop NaN
    if not worst < TOLERANCE:
        raise ConfigError(
            f"{name}: relative to float64 its result is off by {worst:.2g}, and roundings by less "
            f"than {TOLERANCE:.2g}: not timed"
        )
    return worst


def _all_calls(name: str, call: Call, comm: Communicator, inputs: Inputs) -> None:
    with force(name) if name not in ALONE else nullcontext():
        for number in range(len(inputs.partials)):
            call(comm, inputs, number)


def _captured(calls: Callable[[], None]) -> Callable[[], None]:
    """All calls of a size as one CUDA graph."""
    torch.cuda.synchronize()
    with capture() as graph:
        calls()
    return graph.replay


def _slowest(values: list[float]) -> tuple[float, ...]:
    """For each entry the largest of all ranks."""
    largest = torch.tensor(values, dtype=torch.float64, device=rank_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())
