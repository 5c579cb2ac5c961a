"""What is timed of the fused operation and of the collectives alone: inputs, calls, their error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import RankGroup
from stepmoe.errors import ConfigError
from stepmoe.launch import rank_device

#: In one kernel.
FUSED = ("triton one-shot", "triton two-shot", "flashinfer one-shot", "flashinfer two-shot")
IMPLEMENTATIONS = ("unfused", *FUSED)
#: What carries out the sum alone: torch.distributed's backend, NCCL where each rank has a GPU.
ALONE = ("all_reduce", "reduce_scatter + all_gather")
#: Of `error_of` in bfloat16: n - 1 roundings of a ring of n ranks, then those of the sum with the
#: residual and of the norm. Simulated 0.0028 for 2 ranks and 0.0042 for 8; an addend that is lost
#: makes it 0.3 or more.
TOLERANCE = 2**-6
_EPS = 1e-5


@dataclass
class Inputs:
    """What the calls of one size take; the same on every rank but for `partials`."""

    group: RankGroup
    every: Tensor
    partials: list[Tensor]
    residual: Tensor
    weight: Tensor

    def fill(self) -> None:
        """Write this rank's addend into every call's tensor: the unfused sum overwrites it."""
        for addend in self.partials:
            addend.copy_(self.every[self.group.index])


Call = Callable[[Communicator, Inputs, int], tuple[Tensor, ...]]


def make_inputs(
    group: RankGroup, tokens: int, hidden_size: int, dtype: torch.dtype, calls: int
) -> Inputs:
    device = rank_device()
    generator = torch.Generator(device).manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    every = normal(group.size, tokens, hidden_size)
    partials = [torch.empty_like(every[0]) for _ in range(calls)]
    return Inputs(group, every, partials, normal(tokens, hidden_size), 0.2 * normal(hidden_size))


def call_of(name: str, rehearsal: bool) -> Call:
    """The function that runs call number i of an implementation and returns what `error_of` takes.

    Raises:
        ConfigError: a rehearsal does not run it.
    """
    if rehearsal and name.startswith("flashinfer"):
        raise ConfigError(f"{name}: a rehearsal leaves it out, its module takes minutes to compile")
    return {"all_reduce": _all_reduce, "reduce_scatter + all_gather": _halves}.get(name, _fused)


def _all_reduce(comm: Communicator, inputs: Inputs, number: int) -> tuple[Tensor, ...]:
    return (comm.all_reduce(comm.partial(inputs.partials[number], "partial"), "timing").tensor,)


def _halves(comm: Communicator, inputs: Inputs, number: int) -> tuple[Tensor, ...]:
    partial_sum = inputs.partials[number]
    own = -(-partial_sum.shape[0] // comm.group.size)
    shard = comm.reduce_scatter(comm.partial(partial_sum, "partial"), own, "timing")
    return (comm.all_gather(shard, "timing").tensor,)


def _fused(comm: Communicator, inputs: Inputs, number: int) -> tuple[Tensor, ...]:
    placed = comm.partial(inputs.partials[number], "partial")
    residual = comm.replicated(inputs.residual, "residual")
    normed, total = comm.all_reduce_add_rms_norm(placed, residual, inputs.weight, _EPS, "timing")
    return total.tensor, normed.tensor


def error_of(inputs: Inputs, total: Tensor, normed: Tensor | None = None) -> float:
    """Relative to float64; rows in pieces, because float64 takes four times the room.

    Args:
        total: the sum, or with `normed` the sum with the residual.
    """
    squares = torch.zeros(2, 2, dtype=torch.float64, device=total.device)
    for rows in range(0, total.shape[0], 1024):
        part = slice(rows, rows + 1024)
        exact = inputs.every[:, part].double().sum(0)
        pairs = [(total, exact)]
        if normed is not None:
            exact += inputs.residual[part].double()
            scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + _EPS)
            pairs.append((normed, exact * scale * (1 + inputs.weight.double())))
        for i, (got, wanted) in enumerate(pairs):
            squares[i, 0] += (got[part] - wanted).square().sum()
            squares[i, 1] += wanted.square().sum()
    relative = squares[:, 0] / squares[:, 1]
    return float(relative[: 1 if normed is None else 2].sqrt().max())
