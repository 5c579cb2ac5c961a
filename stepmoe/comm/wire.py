"""What crosses the group: torch.distributed, or nothing where one rank is simulated alone.

A simulated rank (`ParallelConfig(simulate_rank=...)`) computes what a real one would, and its peers
send nothing. What it cannot know is filled with what it has: a sum stays this rank's own addend,
and the tokens of other ranks are its own with the signs of some features turned. Shapes, dtypes
and the work that follows are those of a real rank; values are not the model's.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from stepmoe.comm.groups import RankGroup

# torch 2.13 renamed these two and warns of the old names; 2.11 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, group: RankGroup) -> None:
    """Replace the tensor by the sum of every rank's. Simulated: it stays this rank's addend."""
    if not group.simulated:
        dist.all_reduce(tensor, group=group.process_group)


def reduce_scatter(own: Tensor, whole: Tensor, group: RankGroup) -> None:
    """Fill own (T_local, D) with the sum of every rank's part of whole (n T_local, D).

    Simulated: the part of this rank's own addend.
    """
    if group.simulated:
        own.copy_(whole.chunk(group.size)[group.index])
    else:
        _reduce_scatter(own, whole, group=group.process_group)


def all_gather(whole: Tensor, own: Tensor, group: RankGroup) -> None:
    """Fill whole (n T_local, D) with every rank's own (T_local, D).

    Simulated: the others' are this rank's with the signs of some features turned, differently for
    each. The router then sees as many different tokens as a real one would. (With plain copies a
    decode step of 64 tokens had 8 different ones, read the weights of few experts and was 1.8 times
    too fast.)
    """
    if group.simulated:
        (tokens, size), ranks = own.shape, group.size
        signs = _signs(ranks, group.index, size, own.dtype, own.device)
        torch.mul(own, signs[:, None], out=whole.view(ranks, tokens, size))
    else:
        _all_gather(whole, own, group=group.process_group)


@functools.cache
def _signs(ranks: int, index: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(ranks, size) of random 1 and -1, in row `index` 1 alone."""
    random = torch.Generator().manual_seed(ranks)
    signs = 1 - 2 * torch.randint(2, (ranks, size), generator=random)
    signs[index] = 1
    return signs.to(device, dtype)
