"""The moves of permute.py as Triton kernels: one kernel each way, a loop over tokens.

The host never learns how many rows there are; a pass that has no row ends before it reads a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.permute import RowOrder

_PROGRAMS_PER_SM = 32
# An un-permute of up to so many tokens has several programs a row; one of more than so many reads
# a token's rows in pairs. By h200_tuning.md: 16 and 64 tokens, and 16384.
_FEW_TOKENS, _MANY_TOKENS = 64, 4096
UNPERMUTE_PARTS = 8  # of a row, a program each, where tokens are few


def permute_rows(x: Tensor, order: RowOrder, start: int, count: int) -> Tensor:
    """See permute.permute_rows. Each token is read once and written to each of its rows."""
    x = x.contiguous()
    num_tokens, size = x.shape
    rows = torch.empty(count, size, dtype=x.dtype, device=x.device)
    if num_tokens:
        _permute[_programs(x)](
            x, order.positions, order.ends, rows, num_tokens, start, count, **_sizes(order, size)
        )
    return rows


def unpermute_rows(
    rows: Tensor, order: RowOrder, weights: Tensor, start: int, onto: Tensor | None
) -> Tensor:
    """See permute.unpermute_rows. The sum of a token is added up in registers."""
    (count, size), num_tokens = rows.shape, len(order.positions)
    output = rows.new_empty(num_tokens, size) if onto is None else onto.contiguous()
    if num_tokens:
        grid, cut = _cut_of_unpermute(output, start)
        _unpermute[grid](
            rows,
            order.positions,
            order.ends,
            weights.contiguous(),
            output,
            num_tokens,
            start,
            count,
            ADDS=onto is not None,
            **_sizes(order, size) | cut,
            **overlap(rows),
        )
    return output


def _cut_of_unpermute(output: Tensor, start: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs, and what is not as `_sizes` has it: its columns, warps, rows read at once."""
    num_tokens, size = output.shape
    block = triton.next_power_of_2(size)
    if num_tokens <= _FEW_TOKENS:
        part = max(1, block // UNPERMUTE_PARTS)
        grid = (*_programs(output), triton.cdiv(size, part))
        return grid, {"BLOCK": part, "num_warps": 8 // UNPERMUTE_PARTS, "IN_PAIRS": False}
    # What a thread holds of two rows, and of what they are added to, must fit its registers.
    if num_tokens <= _MANY_TOKENS or block * output.element_size() > 8192:
        return (*_programs(output), 1), {"IN_PAIRS": False}
    if start == 0:
        return (*_programs(output, 16), 1), {"num_warps": 4, "IN_PAIRS": True}
    # A later pass hardly ever has a row (model/experts.py); few programs find that out sooner.
    return (*_programs(output, 4), 1), {"IN_PAIRS": True}


def _sizes(order: RowOrder, size: int) -> dict[str, int]:
    return {
        "LOCAL": len(order.ends),
        "TOP_K": order.positions.shape[1],
        "SIZE": size,
        "BLOCK": triton.next_power_of_2(size),
        "num_warps": 8,
    }


def _programs(x: Tensor, per_sm: int = _PROGRAMS_PER_SM) -> tuple[int]:
    """Programs that share the rows of x: enough to keep every multiprocessor of the GPU busy."""
    if not x.is_cuda:  # the interpreter
        return (min(len(x), 3),)
    properties = torch.cuda.get_device_properties(x.device)
    return (min(len(x), per_sm * properties.multi_processor_count),)


@triton.jit
def _permute(
    x_ptr,
    positions_ptr,
    ends_ptr,
    rows_ptr,
    num_tokens,
    start,
    count,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    if tl.load(ends_ptr + LOCAL - 1) > start:
        token = tl.program_id(0)
        while token < num_tokens:
            x = tl.load(x_ptr + token.to(tl.int64) * SIZE + column, mask=inside)
            for k in tl.static_range(TOP_K):
                row = (tl.load(positions_ptr + token * TOP_K + k) - start).to(tl.int64)
                is_here = (row >= 0) & (row < count)
                tl.store(rows_ptr + row * SIZE + column, x, mask=inside & is_here)
            token += tl.num_programs(0)


@triton.jit
def _unpermute(
    rows_ptr,
    positions_ptr,
    ends_ptr,
    weights_ptr,
    output_ptr,
    num_tokens,
    start,
    count,
    ADDS: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """BLOCK columns; with ADDS the output holds what the sums are added to."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    column = tl.arange(0, BLOCK)
    if SIZE > BLOCK:
        column += tl.program_id(1) * BLOCK
    inside = column < SIZE
    if (not ADDS) or tl.load(ends_ptr + LOCAL - 1) > start:
        token = tl.program_id(0)
        while token < num_tokens:
            place = output_ptr + token.to(tl.int64) * SIZE + column
            if ADDS:
                before = tl.load(place, mask=inside, other=0.0)
            first = token * TOP_K
            if IN_PAIRS:
                total = _sum_in_pairs(
                    rows_ptr, positions_ptr + first, weights_ptr + first, start, count,
                    column, inside, TOP_K, SIZE, BLOCK,
                )  # fmt: skip
            else:
                total = _sum_of_all(
                    rows_ptr, positions_ptr + first, weights_ptr + first, start, count,
                    column, inside, TOP_K, SIZE, BLOCK,
                )  # fmt: skip
            if ADDS:  # rounded before as well, as an addition of two tensors would have it
                total = before.to(tl.float32) + total.to(output_ptr.dtype.element_ty).to(tl.float32)
            tl.store(place, total.to(output_ptr.dtype.element_ty), mask=inside)
            token += tl.num_programs(0)


@triton.jit
def _sum_of_all(
    rows_ptr,
    positions_ptr,
    weights_ptr,
    start,
    count,
    column,
    inside,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's rows, weighted: all are asked for at once, those that are elsewhere for nothing."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = (tl.load(positions_ptr + k) - start).to(tl.int64)
        is_here = inside & (row >= 0) & (row < count)
        value = tl.load(rows_ptr + row * SIZE + column, mask=is_here, other=0.0)
        total += value.to(tl.float32) * tl.load(weights_ptr + k)
    return total


@triton.jit
def _sum_in_pairs(
    rows_ptr,
    positions_ptr,
    weights_ptr,
    start,
    count,
    column,
    inside,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same, in the same order, of the rows that are here, two at a time."""
    BLOCK_K: tl.constexpr = triton.next_power_of_2(TOP_K)
    k = tl.arange(0, BLOCK_K)
    row = tl.load(positions_ptr + k, mask=k < TOP_K, other=-1) - start
    weight = tl.load(weights_ptr + k, mask=k < TOP_K, other=0.0)
    is_here = ((row >= 0) & (row < count)).to(tl.int32)
    rank = tl.cumsum(is_here, 0) * is_here  # 1 for the first row that is here
    num_rows = tl.sum(is_here, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    done = 0
    while done < num_rows:
        is_1 = rank == done + 1
        is_2 = rank == done + 2
        row_1 = tl.sum(tl.where(is_1, row, 0), 0).to(tl.int64)
        row_2 = tl.sum(tl.where(is_2, row, 0), 0).to(tl.int64)
        has_2 = inside & (done + 1 < num_rows)
        value_1 = tl.load(rows_ptr + row_1 * SIZE + column, mask=inside, other=0.0)
        value_2 = tl.load(rows_ptr + row_2 * SIZE + column, mask=has_2, other=0.0)
        total += value_1.to(tl.float32) * tl.sum(tl.where(is_1, weight, 0.0), 0)
        total += value_2.to(tl.float32) * tl.sum(tl.where(is_2, weight, 0.0), 0)
        done += 2
    return total
