"""decode_attention as Triton kernels: the slots of a cache are dealt to several programs."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.softmax_gpu import HIDDEN, Tile, absorb, block_d


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, gate: Tensor, position: Tensor
) -> Tensor:
    """See attention.decode_attention. The slots are dealt to several programs a sequence."""
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, slots = keys.shape[1:3]
    group = num_heads // num_kv_heads
    exact = query.dtype is torch.float32
    tile = Tile(max(16, triton.next_power_of_2(group)), 32 if exact else 64, 4, 2 if exact else 4)
    splits = num_splits(slots, batch * num_kv_heads, tile.keys)
    out = query.new_empty(batch, num_heads * head_dim)
    parts = query.new_empty(
        (batch * num_heads, splits, head_dim + 2) if splits > 1 else (0,), dtype=torch.float32
    )
    padded = block_d(head_dim)
    _decode[(splits, batch * num_kv_heads)](
        query,
        *query.stride()[:2],
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        gate,
        gate.stride(0),
        position,
        out,
        parts,
        slots,
        splits,
        math.log2(math.e) / math.sqrt(head_dim),
        GROUP=group,
        KV_HEADS=num_kv_heads,
        WHOLE=splits == 1,
        SIZE=head_dim,
        BLOCK_D=padded,
        ROWS=tile.rows,
        KEYS=tile.keys,
        PRECISION="ieee" if exact else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **overlap(query),
    )
    if splits > 1:
        _combine[(batch * num_heads,)](
            parts,
            gate,
            gate.stride(0),
            out,
            splits,
            HEADS=num_heads,
            BLOCK_S=triton.next_power_of_2(splits),
            SIZE=head_dim,
            BLOCK_D=padded,
            **overlap(query),
        )
    return out


def num_splits(slots: int, rows: int, keys: int) -> int:
    """Programs among which the slots of one sequence and key-value head are dealt.

    As many as an H100 has multiprocessors, each with a tile of keys or more: measured at contexts
    of 512 and 4096 and 1 to 256 sequences, more of them cost more in combining than they save.
    Depends on the slots a cache has and not on those taken: a captured graph stays right while the
    cache fills up.
    """
    return max(1, min(132 // rows, triton.cdiv(slots, keys), 64))


@triton.jit
def _decode(
    query_ptr,
    query_stride_b,
    query_stride_h,
    keys_ptr,
    keys_stride_b,
    keys_stride_g,
    keys_stride_s,
    values_ptr,
    values_stride_b,
    values_stride_g,
    values_stride_s,
    gate_ptr,
    gate_stride,
    position_ptr,
    out_ptr,
    parts_ptr,
    slots,
    splits,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: all query heads of one key-value head, over its share of the slots taken.

    WHOLE: there is one share, and the result needs no combining.
    """
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    split = tl.program_id(0)
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    g = tl.program_id(1) % KV_HEADS
    taken = tl.minimum(tl.load(position_ptr) + 1, slots).to(tl.int32)
    span = tl.cdiv(tl.cdiv(taken, splits), KEYS) * KEYS
    end = tl.minimum(split * span + span, taken)
    member, entry = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    head = g * GROUP + member
    inside = (member < GROUP)[:, None] & (entry < SIZE)[None, :]
    query_ptr += b * query_stride_b + head * query_stride_h
    query = tl.load(query_ptr[:, None] + entry[None, :], mask=inside, other=0.0)
    keys_ptr += b * keys_stride_b + g * keys_stride_g
    values_ptr += b * values_stride_b + g * values_stride_g

    top = tl.full((ROWS,), HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    everywhere = tl.full((ROWS,), 0, tl.int32) + (end - 1)  # sees every slot before `end`
    for begin in range(split * span, end, KEYS):
        top, total, sums = absorb(
            top, total, sums, query, everywhere, begin, end, True, scale,
            keys_ptr, keys_stride_s, values_ptr, values_stride_s,
            0, 0, False, SIZE, BLOCK_D, KEYS, PRECISION,
        )  # fmt: skip

    out_row = b * (GROUP * KV_HEADS) + head
    if WHOLE:
        gate = tl.load(gate_ptr + b * gate_stride + head, mask=member < GROUP, other=0.0)
        result = sums * (tl.sigmoid(gate.to(tl.float32)) / total)[:, None]
        out = out_ptr + out_row[:, None] * SIZE + entry[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = parts_ptr + (out_row * splits + split) * (SIZE + 2)
        tl.store(part[:, None] + entry[None, :], sums, mask=inside)
        tl.store(part + SIZE, top, mask=member < GROUP)
        tl.store(part + SIZE + 1, total, mask=member < GROUP)


@triton.jit
def _combine(
    parts_ptr,
    gate_ptr,
    gate_stride,
    out_ptr,
    splits,
    HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: one head of one sequence, its splits brought to a common maximum and added."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    split, entry = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    there, inside = split < splits, entry < SIZE
    part = parts_ptr + (row * splits + split) * (SIZE + 2)
    top = tl.load(part + SIZE, mask=there, other=HIDDEN)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(part + SIZE + 1, mask=there, other=0.0) * weight, 0)
    both = there[:, None] & inside[None, :]
    sums = tl.load(part[:, None] + entry[None, :], mask=both, other=0.0)
    gate = tl.load(gate_ptr + row // HEADS * gate_stride + row % HEADS).to(tl.float32)
    result = tl.sum(sums * weight[:, None], 0) * (tl.sigmoid(gate) / total)
    tl.store(out_ptr + row * SIZE + entry, result.to(out_ptr.dtype.element_ty), mask=inside)
