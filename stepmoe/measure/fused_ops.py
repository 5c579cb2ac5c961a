"""How long one all-reduce + add + norm takes in each implementation, on ranks with a GPU each.

Runs inside a rank: `ranks.run(time_fused_ops, [1, 64, 2048])`, or under torchrun through
`python -m stepmoe bench-fusion`. Each implementation is checked against float64 before it is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stepmoe.comm.communicator import Communicator
from stepmoe.comm.cost import LINKS
from stepmoe.comm.fusion import force
from stepmoe.comm.fusion.vote import find_place
from stepmoe.comm.groups import RankGroup, build_groups, meet, world_size
from stepmoe.errors import ConfigError
from stepmoe.launch import rank_device
from stepmoe.parallel import ParallelConfig

IMPLEMENTATIONS = (
    "unfused",
    "triton one-shot",
    "triton two-shot",
    "flashinfer one-shot",
    "flashinfer two-shot",
)
TIMED_IN = "a CUDA graph of calls one after the other, each on a partial sum of its own"
# Calls in one graph: enough that launching the graph, some 10 us, adds little to each.
_CALLS, _CALLS_LARGE, _LARGE = 20, 5, 2048
_EPS = 1e-5


@dataclass(frozen=True)
class Timing:
    """One implementation at one size.

    Attributes:
        microseconds: of one call on the slowest rank, for each round; empty if it did not run.
        error: relative to float64, the larger of normed values and residual, on the worst rank.
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


@dataclass
class _Inputs:
    """What the calls of one size take; the same on every rank but for `partials`."""

    group: RankGroup
    every: Tensor
    partials: list[Tensor]
    residual: Tensor
    weight: Tensor

    def fill(self) -> None:
        """Write this rank's addend into every call's tensor: the unfused sum overwrites it."""
        for partial in self.partials:
            partial.copy_(self.every[self.group.index])


def wire_floor(tokens: int, hidden_size: int, dtype: torch.dtype, ranks: int) -> float:
    """Microseconds that the fewest bytes of an all-reduce take over NVLink 4 (450 GB/s)."""
    size = tokens * hidden_size * dtype.itemsize
    return 2 * (ranks - 1) / ranks * size / LINKS["nvlink4"].bandwidth * 1e6


def time_fused_ops(
    tokens: Sequence[int],
    hidden_size: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 30,
) -> list[Timing]:
    """Time every implementation at every number of tokens; in a round, one after the other.

    All ranks call it together and return the same.

    Raises:
        ConfigError: there is one rank only, or the ranks have no GPU of their own: ranks that share
            one take turns, and their times would mean nothing.
    """
    group = build_groups(ParallelConfig(world_size()))["tp"]
    place = find_place(group, rank_device()) if group.size > 1 else None
    if place is None or place.topology != "one GPU a rank":
        here = f"here: {place.topology}" if place else "here: one rank"
        raise ConfigError(
            f"timing the fused operation needs two ranks or more with one GPU a rank; {here}. "
            "On a machine with GPUs: torchrun --nproc-per-node (their number)"
        )
    comm = Communicator(group)
    return [
        timing
        for number in tokens
        for timing in _time_size(comm, number, hidden_size, dtype, rounds)
    ]


def _time_size(
    comm: Communicator, tokens: int, hidden_size: int, dtype: torch.dtype, rounds: int
) -> list[Timing]:
    calls = _CALLS if tokens <= _LARGE else _CALLS_LARGE
    inputs = _inputs(comm.group, tokens, hidden_size, dtype, calls)
    refusals: dict[str, str] = {}
    replays: dict[str, Callable[[], None]] = {}
    errors: dict[str, float] = {}
    for name in IMPLEMENTATIONS:
        try:
            with force(name):
                inputs.fill()
                errors[name] = _error(inputs, *_call(comm, inputs, 0))
                replays[name] = _captured(comm, inputs)
        except ConfigError as error:  # raised on every rank, or on none
            refusals[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for number in range(rounds + 3):
        for name, replay in replays.items():
            inputs.fill()
            meet(comm.group, inputs.residual.device)
            seconds = _time(replay)
            if number >= 3:  # the first rounds warm up
                times[name].append(seconds / calls * 1e6)
    return [
        Timing(tokens, name, _slowest(times[name]), max(_slowest([errors[name]])))
        if name in replays
        else Timing(tokens, name, refusal=refusals[name])
        for name in IMPLEMENTATIONS
    ]


def _inputs(
    group: RankGroup, tokens: int, hidden_size: int, dtype: torch.dtype, calls: int
) -> _Inputs:
    device = rank_device()
    generator = torch.Generator(device).manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    every = normal(group.size, tokens, hidden_size)
    partials = [torch.empty_like(every[0]) for _ in range(calls)]
    return _Inputs(group, every, partials, normal(tokens, hidden_size), 0.2 * normal(hidden_size))


def _call(comm: Communicator, inputs: _Inputs, number: int) -> tuple[Tensor, Tensor]:
    partial = comm.partial(inputs.partials[number], "partial")
    residual = comm.replicated(inputs.residual, "residual")
    normed, total = comm.all_reduce_add_rms_norm(partial, residual, inputs.weight, _EPS, "timing")
    return normed.tensor, total.tensor


def _captured(comm: Communicator, inputs: _Inputs) -> Callable[[], None]:
    """All calls of a size as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for number in range(len(inputs.partials)):
            _call(comm, inputs, number)
    return graph.replay


def _time(replay: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _error(inputs: _Inputs, normed: Tensor, total: Tensor) -> float:
    """Relative to float64; rows in pieces, because float64 takes four times the room."""
    squares = torch.zeros(2, 2, dtype=torch.float64, device=total.device)
    for rows in range(0, total.shape[0], 1024):
        part = slice(rows, rows + 1024)
        exact = inputs.every[:, part].double().sum(0) + inputs.residual[part].double()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + _EPS)
        exact_normed = exact * scale * (1 + inputs.weight.double())
        for i, (got, wanted) in enumerate(((total, exact), (normed, exact_normed))):
            squares[i, 0] += (got[part] - wanted).square().sum()
            squares[i, 1] += wanted.square().sum()
    return float((squares[:, 0] / squares[:, 1]).sqrt().max())


def _slowest(values: list[float]) -> tuple[float, ...]:
    """For each entry the largest of all ranks."""
    largest = torch.tensor(values, dtype=torch.float64, device=rank_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())
