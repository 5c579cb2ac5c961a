"""permute.py as Triton kernels. The host never learns how many rows an expert has.

Sorting takes three small kernels: count each expert's choices in every block of them, add the
counts up over the blocks, and place each choice behind the equal ones before it. (The choices of up
to 32 tokens are one block, which needs only the last.) The rows move in one kernel each way, a loop
over tokens; a pass that has no row ends before it reads a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.permute import RowOrder

_CHOICES = 256  # of one program while sorting; a rank within it compares all pairs
_PROGRAMS_PER_SM = 16


def sort_by_expert(topk_ids: Tensor, first_expert: int, num_local: int) -> RowOrder:
    """See permute.sort_by_expert."""
    topk_ids, device = topk_ids.contiguous(), topk_ids.device
    num_choices = topk_ids.numel()
    blocks = triton.cdiv(num_choices, _CHOICES)
    positions = torch.empty(topk_ids.shape, dtype=torch.int32, device=device)
    choices = torch.empty(num_choices, dtype=torch.int32, device=device)
    ends = torch.zeros(num_local, dtype=torch.int32, device=device)
    # Two counts an expert and block: the block's own, then those of the blocks before it.
    counts = torch.empty(num_local + 1, blocks, dtype=torch.int32, device=device)
    totals = torch.empty(num_local + 1, dtype=torch.int32, device=device)
    given = (topk_ids, num_choices, first_expert, num_local)
    size = {"BLOCK_E": triton.next_power_of_2(num_local + 1), "BLOCK": _CHOICES}
    if blocks > 1:
        _count[(blocks,)](*given, counts, **size)
        _add_up[(num_local + 1,)](counts, totals, blocks, BLOCK=triton.next_power_of_2(blocks))
    if blocks:
        is_alone = blocks == 1
        _place[(blocks,)](*given, counts, totals, positions, choices, ends, ALONE=is_alone, **size)
    return RowOrder(positions, choices, ends)


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
        _unpermute[_programs(output)](
            rows,
            order.positions,
            order.ends,
            weights.contiguous(),
            output,
            num_tokens,
            start,
            count,
            ADDS=onto is not None,
            **_sizes(order, size),
        )
    return output


def _sizes(order: RowOrder, size: int) -> dict[str, int]:
    return {
        "LOCAL": len(order.ends),
        "TOP_K": order.positions.shape[1],
        "SIZE": size,
        "BLOCK": triton.next_power_of_2(size),
    }


def _programs(x: Tensor) -> tuple[int]:
    """Programs that share the rows of x: enough to keep every multiprocessor of the GPU busy."""
    if not x.is_cuda:  # the interpreter
        return (min(len(x), 3),)
    properties = torch.cuda.get_device_properties(x.device)
    return (min(len(x), _PROGRAMS_PER_SM * properties.multi_processor_count),)


@triton.jit
def _load_keys(ids_ptr, num_choices, first_expert, num_local, BLOCK: tl.constexpr):
    """This program's choices: their numbers and local experts, num_local for any other rank's."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(ids_ptr + choice, mask=choice < num_choices, other=-1).to(tl.int32) - first_expert
    key = tl.where((key >= 0) & (key < num_local), key, num_local)
    return choice, tl.where(choice < num_choices, key, -1)


@triton.jit
def _count(
    ids_ptr,
    num_choices,
    first_expert,
    num_local,
    counts_ptr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[e, block] = the block's choices of expert e."""
    _, key = _load_keys(ids_ptr, num_choices, first_expert, num_local, BLOCK)
    expert = tl.arange(0, BLOCK_E)
    count = tl.sum((key[:, None] == expert[None, :]).to(tl.int32), axis=0)
    slot = counts_ptr + expert * tl.num_programs(0) + tl.program_id(0)
    tl.store(slot, count, mask=expert <= num_local)


@triton.jit
def _add_up(counts_ptr, totals_ptr, num_blocks, BLOCK: tl.constexpr):
    """One program an expert: replace its count in each block by the sum over the blocks before."""
    expert = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    slot = counts_ptr + expert * num_blocks + block
    count = tl.load(slot, mask=block < num_blocks, other=0)
    tl.store(slot, tl.cumsum(count, 0) - count, mask=block < num_blocks)
    tl.store(totals_ptr + expert, tl.sum(count, 0))


@triton.jit
def _place(
    ids_ptr,
    num_choices,
    first_expert,
    num_local,
    counts_ptr,
    totals_ptr,
    positions_ptr,
    choices_ptr,
    ends_ptr,
    ALONE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row of a choice = rows of lower experts + equal choices in earlier blocks and in this one."""
    choice, key = _load_keys(ids_ptr, num_choices, first_expert, num_local, BLOCK)
    inside = choice < num_choices
    other = tl.arange(0, BLOCK)
    is_earlier = (key[None, :] == key[:, None]) & (other[None, :] < other[:, None])
    row = tl.sum(is_earlier.to(tl.int32), axis=1)

    expert = tl.arange(0, BLOCK_E)
    if ALONE:
        totals = tl.sum((key[:, None] == expert[None, :]).to(tl.int32), axis=0)
    else:
        totals = tl.load(totals_ptr + expert, mask=expert <= num_local, other=0)
        row += tl.load(counts_ptr + key * tl.num_programs(0) + tl.program_id(0), mask=inside)
    row += tl.sum(tl.where(expert[None, :] < key[:, None], totals[None, :], 0), axis=1)

    tl.store(positions_ptr + choice, tl.where(key < num_local, row, -1), mask=inside)
    tl.store(choices_ptr + row, choice, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + expert, tl.cumsum(totals, 0), mask=expert < num_local)


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
):
    """With ADDS the output holds what the sums are added to."""
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    if (not ADDS) or tl.load(ends_ptr + LOCAL - 1) > start:
        token = tl.program_id(0)
        while token < num_tokens:
            place = output_ptr + token.to(tl.int64) * SIZE + column
            total = tl.zeros((BLOCK,), tl.float32)
            if ADDS:
                total += tl.load(place, mask=inside).to(tl.float32)
            for k in tl.static_range(TOP_K):
                row = (tl.load(positions_ptr + token * TOP_K + k) - start).to(tl.int64)
                is_here = inside & (row >= 0) & (row < count)
                value = tl.load(rows_ptr + row * SIZE + column, mask=is_here, other=0.0)
                total += value.to(tl.float32) * tl.load(weights_ptr + token * TOP_K + k)
            tl.store(place, total.to(output_ptr.dtype.element_ty), mask=inside)
            token += tl.num_programs(0)
