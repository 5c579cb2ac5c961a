"""In which order the ranks' addends are summed: the library's own way, or one that is spelled out.

A sum over ranks is n - 1 additions, each rounded to the dtype of the tensor, and which addends meet
first is the library's choice. To see what that choice is worth, `summation` replaces the sums of
`wire` by all-gathers that every rank adds up for itself, in a stated order, to the same bits:

    with summation("ring"):
        logits = model(input_ids)

For looking at rounding errors, not for speed: an all-gather sends n / 2 times as much.
The ledger shows the sum that was asked for. A fused kernel that sums by itself keeps its own order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stepmoe.comm import wire
from stepmoe.comm.groups import RankGroup
from stepmoe.errors import ConfigError

ORDERS = {
    "library": "as gloo or NCCL does it",
    "ring": "rank after rank, each block beginning at another rank; every addition is rounded",
    "tree": "neighbours, then pairs of neighbours; every addition is rounded",
    "wide": "rank after rank in a wider dtype, rounded once at the end",
}
_WIDER = {torch.float32: torch.float64, torch.float64: torch.float64}  # others: float32


@contextmanager
def summation(order: str) -> Iterator[None]:
    """Sum over ranks in this order while open, in this process: every rank has to open it.

    Args:
        order: one of ORDERS.

    Raises:
        ConfigError: another order.
    """
    check_order(order)
    kept = wire.all_reduce, wire.reduce_scatter
    if order != "library":

        def all_reduce(tensor: Tensor, group: RankGroup) -> None:
            tensor.copy_(add_up(_addends(tensor, group), order))

        def reduce_scatter(own: Tensor, whole: Tensor, group: RankGroup) -> None:
            total = add_up(_addends(whole, group), order)
            own.copy_(total.chunk(group.size)[group.index])

        wire.all_reduce, wire.reduce_scatter = all_reduce, reduce_scatter
    try:
        yield
    finally:
        wire.all_reduce, wire.reduce_scatter = kept


def check_order(order: str) -> None:
    """Raise ConfigError unless it is one of ORDERS."""
    if order not in ORDERS:
        raise ConfigError(f"order of summation {order!r}: use one of {', '.join(ORDERS)}")


def add_up(addends: Tensor, order: str) -> Tensor:
    """The sum of addends (n, T, D) over the first dimension in a stated order: (T, D).

    A ring cuts the T rows into n blocks; block b begins at rank b + 1 and ends at rank b.
    """
    if order == "wide":
        wider = addends.to(_WIDER.get(addends.dtype, torch.float32))
        return _one_by_one(list(wider)).to(addends.dtype)
    if order == "tree":
        return _pairwise(list(addends))
    size = len(addends)
    blocks = [addend.tensor_split(size) for addend in addends]
    in_turn = (range(block + 1, block + 1 + size) for block in range(size))
    return torch.cat(
        [_one_by_one([blocks[rank % size][b] for rank in turn]) for b, turn in enumerate(in_turn)]
    )


def _one_by_one(addends: list[Tensor]) -> Tensor:
    total = addends[0]
    for addend in addends[1:]:
        total = total + addend
    return total


def _pairwise(addends: list[Tensor]) -> Tensor:
    if len(addends) == 1:
        return addends[0]
    middle = (len(addends) + 1) // 2
    return _pairwise(addends[:middle]) + _pairwise(addends[middle:])


def _addends(tensor: Tensor, group: RankGroup) -> Tensor:
    """Every rank's (T, D): (n, T, D)."""
    every = tensor.new_empty(group.size * tensor.shape[0], tensor.shape[1])
    wire.all_gather(every, tensor.contiguous(), group)
    return every.view(group.size, *tensor.shape)
