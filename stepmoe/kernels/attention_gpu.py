"""attention.py as Triton kernels: online softmax, and the query heads of a group in one tile.

All query heads that share a key-value head see the same keys. So a tile's rows are (token, head of
the group) pairs, token after token: with 12 heads a group, 128 rows are 11 tokens. That reads each
key once for all heads, and under a window of 512 a tile touches 523 keys instead of 640.

Softmax runs in base 2, which is what the hardware has: 2^(x log2 e) = e^x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_HIDDEN = tl.constexpr(-1e30)  # a score that is not seen; finite, so that no inf - inf arises


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows (query heads and tokens) and keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, gate: Tensor, window: int | None
) -> Tensor:
    """See attention.prefill_attention."""
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads, seen = keys.shape[1:3]
    group = num_heads // num_kv_heads
    out = query.new_empty(batch * length, num_heads * head_dim)
    exact = query.dtype is torch.float32  # its tiles are twice as large, and its products exact
    tile = Tile(32, 32, 4, 2) if exact else Tile(128, 64, 8, 3)
    grid = (triton.cdiv(length * group, tile.rows), batch * num_kv_heads)
    _attend[grid](
        query,
        *query.stride()[:3],
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        gate,
        gate.stride(0),
        out,
        length,
        seen - length,
        math.log2(math.e) / math.sqrt(head_dim),
        GROUP=group,
        KV_HEADS=num_kv_heads,
        WINDOW=window or 0,
        SIZE=head_dim,
        BLOCK_D=_block_d(head_dim),
        ROWS=tile.rows,
        KEYS=tile.keys,
        PRECISION="ieee" if exact else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # a matrix product takes no less than 16


@triton.jit
def _attend(
    query_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_l,
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
    out_ptr,
    length,
    past,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS (token, head) pairs of one key-value head of one sequence."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: they see most keys
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    g = tl.program_id(1) % KV_HEADS
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, g * GROUP + row % GROUP
    entry = tl.arange(0, BLOCK_D)
    inside = (token < length)[:, None] & (entry < SIZE)[None, :]
    query_ptr += b * query_stride_b + head * query_stride_h + token * query_stride_l
    query = tl.load(query_ptr[:, None] + entry[None, :], mask=inside, other=0.0)
    keys_ptr += b * keys_stride_b + g * keys_stride_g
    values_ptr += b * values_stride_b + g * values_stride_g

    # Keys first:end are seen by some row of the tile, keys all_from:all_to by every row. Softmax
    # asks for no order: first come the tiles of keys that need no mask, then those at both edges.
    newest = past + tl.minimum((tile * ROWS + ROWS - 1) // GROUP, length - 1)
    oldest = past + tile * ROWS // GROUP
    end, all_to = newest + 1, oldest + 1
    first, all_from = 0, 0
    if WINDOW:
        first = tl.maximum(0, oldest - WINDOW + 1)
        all_from = tl.maximum(0, newest - WINDOW + 1)
    inner = first + tl.cdiv(all_from - first, KEYS) * KEYS
    outer = tl.maximum(inner, first + (all_to - first) // KEYS * KEYS)

    top = tl.full((ROWS,), _HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for begin in range(inner, outer, KEYS):
        top, total, sums = _absorb(
            top, total, sums, query, past + token, begin, end, scale,
            keys_ptr, keys_stride_s, values_ptr, values_stride_s,
            WINDOW, False, SIZE, BLOCK_D, KEYS, PRECISION,
        )  # fmt: skip
    for edge in range(first, end - (outer - inner), KEYS):
        begin = edge if edge < inner else edge + (outer - inner)
        top, total, sums = _absorb(
            top, total, sums, query, past + token, begin, end, scale,
            keys_ptr, keys_stride_s, values_ptr, values_stride_s,
            WINDOW, True, SIZE, BLOCK_D, KEYS, PRECISION,
        )  # fmt: skip

    out_row = (b * length + token) * (GROUP * KV_HEADS) + head
    gate_ptr += (b * length + token) * gate_stride + head
    gate = tl.load(gate_ptr, mask=token < length, other=0.0).to(tl.float32)
    result = sums * (tl.sigmoid(gate) / total)[:, None]
    out = out_ptr + out_row[:, None] * SIZE + entry[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _absorb(
    top,
    total,
    sums,
    query,
    position,
    begin,
    end,
    scale,
    keys_ptr,
    keys_stride,
    values_ptr,
    values_stride,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take KEYS more keys into the running maximum, sum of weights and weighted sum of values."""
    slot = begin + tl.arange(0, KEYS)
    entry = tl.arange(0, BLOCK_D)[None, :]
    there = tl.full((KEYS, BLOCK_D), True, tl.int1)
    if SIZE < BLOCK_D:
        there = there & (entry < SIZE)
    if MASKED:
        there = there & (slot < end)[:, None]
    keys = tl.load(keys_ptr + slot[:, None].to(tl.int64) * keys_stride + entry, there, other=0.0)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        distance = position[:, None] - slot[None, :]
        seen = distance >= 0
        if WINDOW:
            seen = seen & (distance < WINDOW)
        scores = tl.where(seen, scores, _HIDDEN)
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    keep = tl.exp2(top - higher)
    values = tl.load(
        values_ptr + slot[:, None].to(tl.int64) * values_stride + entry, there, other=0.0
    )
    sums = tl.dot(weights.to(values.dtype), values, sums * keep[:, None], input_precision=PRECISION)
    return higher, total * keep + tl.sum(weights, 1), sums


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
    block_d = _block_d(head_dim)
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
        BLOCK_D=block_d,
        ROWS=tile.rows,
        KEYS=tile.keys,
        PRECISION="ieee" if exact else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
            BLOCK_D=block_d,
        )
    return out


def num_splits(slots: int, rows: int, keys: int) -> int:
    """Programs among which the slots of one sequence and key-value head are dealt.

    Enough to fill the GPU twice over, each with two tiles of keys or more. Depends on the slots a
    cache has and not on those taken: a captured graph stays right while the cache fills up.
    """
    programs = 2 * 132  # of an H100: its multiprocessors, two programs each
    return max(1, min(triton.cdiv(programs, rows), triton.cdiv(slots, 2 * keys), 64))


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
):
    """One program: all query heads of one key-value head, over its share of the slots taken.

    WHOLE: there is one share, and the result needs no combining.
    """
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

    top = tl.full((ROWS,), _HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    everywhere = tl.full((ROWS,), 0, tl.int32) + (end - 1)  # sees every slot before `end`
    for begin in range(split * span, end, KEYS):
        top, total, sums = _absorb(
            top, total, sums, query, everywhere, begin, end, scale,
            keys_ptr, keys_stride_s, values_ptr, values_stride_s,
            0, True, SIZE, BLOCK_D, KEYS, PRECISION,
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
):
    """One program: one head of one sequence, its splits brought to a common maximum and added."""
    row = tl.program_id(0).to(tl.int64)
    split, entry = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    there, inside = split < splits, entry < SIZE
    part = parts_ptr + (row * splits + split) * (SIZE + 2)
    top = tl.load(part + SIZE, mask=there, other=_HIDDEN)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(part + SIZE + 1, mask=there, other=0.0) * weight, 0)
    both = there[:, None] & inside[None, :]
    sums = tl.load(part[:, None] + entry[None, :], mask=both, other=0.0)
    gate = tl.load(gate_ptr + row // HEADS * gate_stride + row % HEADS).to(tl.float32)
    result = tl.sum(sums * weight[:, None], 0) * (tl.sigmoid(gate) / total)
    tl.store(out_ptr + row * SIZE + entry, result.to(out_ptr.dtype.element_ty), mask=inside)
