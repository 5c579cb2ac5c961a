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
UNPERMUTE_PARTS = 8  # of a row, a program each, where tokens are few
_FEW_TOKENS = 64


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
        parts = UNPERMUTE_PARTS if num_tokens <= _FEW_TOKENS else 1
        sizes = _sizes(order, size)
        sizes |= {"BLOCK": max(1, sizes["BLOCK"] // parts), "num_warps": 8 // parts}
        _unpermute[(*_programs(output), triton.cdiv(size, sizes["BLOCK"]))](
            rows,
            order.positions,
            order.ends,
            weights.contiguous(),
            output,
            num_tokens,
            start,
            count,
            ADDS=onto is not None,
            **sizes,
            **overlap(rows),
        )
    return output


def _sizes(order: RowOrder, size: int) -> dict[str, int]:
    return {
        "LOCAL": len(order.ends),
        "TOP_K": order.positions.shape[1],
        "SIZE": size,
        "BLOCK": triton.next_power_of_2(size),
        "num_warps": 8,
    }


def _programs(x: Tensor) -> tuple[int]:
    """Programs that share the rows of x: enough to keep every multiprocessor of the GPU busy."""
    if not x.is_cuda:  # the interpreter
        return (min(len(x), 3),)
    properties = torch.cuda.get_device_properties(x.device)
    return (min(len(x), _PROGRAMS_PER_SM * properties.multi_processor_count),)


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
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """BLOCK columns; with ADDS the output holds what the sums are added to."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    if (not ADDS) or tl.load(ends_ptr + LOCAL - 1) > start:
        token = tl.program_id(0)
        while token < num_tokens:
            place = output_ptr + token.to(tl.int64) * SIZE + column
            total = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(TOP_K):
                row = (tl.load(positions_ptr + token * TOP_K + k) - start).to(tl.int64)
                is_here = inside & (row >= 0) & (row < count)
                value = tl.load(rows_ptr + row * SIZE + column, mask=is_here, other=0.0)
                total += value.to(tl.float32) * tl.load(weights_ptr + token * TOP_K + k)
            if ADDS:  # rounded before as well, as an addition of two tensors would have it
                sums = total.to(output_ptr.dtype.element_ty).to(tl.float32)
                total = tl.load(place, mask=inside).to(tl.float32) + sums
            tl.store(place, total.to(output_ptr.dtype.element_ty), mask=inside)
            token += tl.num_programs(0)
