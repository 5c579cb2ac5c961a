"""permute.sort_by_expert as Triton kernels. The host never learns how many rows an expert has.

A choice's row is the number of choices that sort before it: those of lower experts, and those of
the same expert with a lower number. For few choices one kernel counts them all. For many, three
kernels do: count each expert's choices in every block of them, add the counts up over the blocks,
and place each choice behind the equal ones before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.permute import RowOrder

_FEW = 2048  # choices up to which comparing all pairs is the fastest
_COMPARED = 256  # choices that one step compares with the program's own
_OWN = 16
_BLOCK = 64  # choices of one program where there are many


def sort_by_expert(topk_ids: Tensor, first_expert: int, num_local: int) -> RowOrder:
    """See permute.sort_by_expert."""
    topk_ids, device = topk_ids.contiguous(), topk_ids.device
    num_choices = topk_ids.numel()
    positions = torch.empty(topk_ids.shape, dtype=torch.int32, device=device)
    choices = torch.empty(num_choices, dtype=torch.int32, device=device)
    ends = torch.empty(num_local, dtype=torch.int32, device=device)
    given = (topk_ids, num_choices, first_expert, num_local)
    made = (positions, choices, ends)
    if num_choices <= _FEW:
        programs = triton.cdiv(max(num_choices, num_local), _OWN)
        options = {"OWN": _OWN, "BLOCK": _COMPARED, **overlap(topk_ids)}
        _place_few[(programs,)](*given, *made, **options)
        return RowOrder(*made)
    blocks = triton.cdiv(num_choices, _BLOCK)
    # One more expert: the choices of all that other ranks hold, which stand behind the rows.
    counts = torch.empty(num_local + 1, blocks, dtype=torch.int32, device=device)
    totals = torch.empty(num_local + 1, dtype=torch.int32, device=device)
    size = {"BLOCK_E": triton.next_power_of_2(num_local + 1), "BLOCK": _BLOCK, "num_warps": 1}
    _count[(blocks,)](*given, counts, **size)
    _add_up[(num_local + 1,)](counts, totals, blocks, BLOCK=triton.next_power_of_2(blocks))
    _place[(blocks,)](*given, counts, totals, *made, **size)
    return RowOrder(*made)


@triton.jit
def _load_keys(ids_ptr, choice, num_choices, first_expert, num_local):
    """The local experts of some choices: num_local for any other rank's, more behind the last."""
    key = tl.load(ids_ptr + choice, mask=choice < num_choices, other=-1).to(tl.int32) - first_expert
    key = tl.where((key >= 0) & (key < num_local), key, num_local)
    return tl.where(choice < num_choices, key, num_local + 1)


@triton.jit
def _place_few(
    ids_ptr,
    num_choices,
    first_expert,
    num_local,
    positions_ptr,
    choices_ptr,
    ends_ptr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: the rows of OWN choices and the ends of OWN experts."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)  # both a choice and an expert
    key = _load_keys(ids_ptr, own, num_choices, first_expert, num_local)
    row = tl.zeros((OWN,), tl.int32)
    end = tl.zeros((OWN,), tl.int32)
    start = 0
    while start < num_choices:
        other = start + tl.arange(0, BLOCK)
        other_key = _load_keys(ids_ptr, other, num_choices, first_expert, num_local)[None, :]
        is_equal = (other_key == key[:, None]) & (other[None, :] < own[:, None])
        row += tl.sum(((other_key < key[:, None]) | is_equal).to(tl.int32), axis=1)
        end += tl.sum((other_key <= own[:, None]).to(tl.int32), axis=1)
        start += BLOCK
    inside = own < num_choices
    tl.store(positions_ptr + own, tl.where(key < num_local, row, -1), mask=inside)
    tl.store(choices_ptr + row, own, mask=inside)
    tl.store(ends_ptr + own, end, mask=own < num_local)


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
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _load_keys(ids_ptr, choice, num_choices, first_expert, num_local)
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
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row = choices of lower experts + equal ones in earlier blocks + equal ones before it here."""
    other = tl.arange(0, BLOCK)
    choice = tl.program_id(0) * BLOCK + other
    key = _load_keys(ids_ptr, choice, num_choices, first_expert, num_local)
    inside = choice < num_choices
    is_earlier = (key[None, :] == key[:, None]) & (other[None, :] < other[:, None])
    row = tl.sum(is_earlier.to(tl.int32), axis=1)
    row += tl.load(counts_ptr + key * tl.num_programs(0) + tl.program_id(0), mask=inside, other=0)
    expert = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + expert, mask=expert <= num_local, other=0)
    row += tl.sum(tl.where(expert[None, :] < key[:, None], totals[None, :], 0), axis=1)

    tl.store(positions_ptr + choice, tl.where(key < num_local, row, -1), mask=inside)
    tl.store(choices_ptr + row, choice, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + expert, tl.cumsum(totals, 0), mask=expert < num_local)
