"""Tensors handed to the first rank of a group: what writing a model takes, and no layer does.

They travel as bytes on the CPU, over gloo, which knows no float8; `Ranks` and `init_distributed`
make groups that carry them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from stepmoe.comm.groups import RankGroup, world_size


def send_to_first(tensor: Tensor, group: RankGroup) -> None:
    """Send a CPU tensor, which the first rank has to `receive`. Returns when it is on its way."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    dist.send(flat, dst=group.ranks[0], group=group.process_group)


def receive(shape: tuple[int, ...], dtype: torch.dtype, index: int, group: RankGroup) -> Tensor:
    """The next tensor that the rank at `index` of the group sends to the first: on the CPU."""
    tensor = torch.empty(shape, dtype=dtype)
    dist.recv(tensor.flatten().view(torch.uint8), src=group.ranks[index], group=group.process_group)
    return tensor


def meet_all() -> None:
    """Let no rank of the job pass before all have come, on the host."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))
