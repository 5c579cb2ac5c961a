"""qk_norm_rotary.py as a Triton kernel: one pass over the projection, one rounding at its end."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait


class Cut(NamedTuple):
    """Of a program: entries of the tile it has of a head, heads whose entries it has asked for."""

    entries: int
    num_warps: int
    num_stages: int


# Few tokens: a program does one head of some tokens, so that heads run side by side: of 128 entries
# those of 4 tokens, two angles a thread. Fewer make too many programs: on an H200, one of each
# token and head took 4.8 us for 256 tokens, of 4 tokens 2.7.
_FEW = Cut(512, 4, 1)
# Many: a program does every head of its tokens, for one set of cosines, from about twice as many
# programs as an H200 has multiprocessors on. Of a prefill with 2 x 600 tokens (150 programs) and 8
# heads a head a program took 7.0 us, every head 8.6; with 2 x 8192 and 12 heads 67.9 and 36.8.
# Between these nothing was timed.
_MANY = Cut(1024, 2, 4)
_MANY_PROGRAMS = 256


def qk_norm_rotary(
    projected: Tensor,
    batch: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    frequencies: Tensor,
    start: Tensor,
    num_heads: int,
    num_kv_heads: int,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See qk_norm_rotary.qk_norm_rotary. Without `into`, values are a view of `projected`."""
    tokens, head_dim = projected.shape[0], q_weight.shape[0]
    length = tokens // batch
    query = projected.new_empty(batch, length, num_heads, head_dim)
    if into is None:
        keys = projected.new_empty(batch, num_kv_heads, length, head_dim)
        first = (num_heads + num_kv_heads) * head_dim
        width = num_kv_heads * head_dim
        values = projected[:, first : first + width].view(batch, length, num_kv_heads, head_dim)
        values = values.transpose(1, 2)
    else:
        keys, values = into
    num_parts = num_heads + num_kv_heads * (1 if into is None else 2)
    padded = triton.next_power_of_2(head_dim)
    are_many = tokens >= _MANY_PROGRAMS * max(1, _MANY.entries // padded)
    cut, parts_each = (_MANY, num_parts) if are_many else (_FEW, 1)
    block_t = max(1, cut.entries // padded)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(num_parts, parts_each))
    half = frequencies.shape[0]
    _norm_rotate[grid](
        projected,
        projected.stride(0),
        q_weight,
        k_weight,
        frequencies,
        start,
        query,
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        tokens,
        length,
        keys.shape[2],
        eps,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        PARTS=num_parts,
        PARTS_EACH=parts_each,
        INTO_CACHE=into is not None,
        SIZE=head_dim,
        HALF=half,
        BLOCK_T=block_t,
        BLOCK_H=triton.next_power_of_2(half),
        BLOCK_R=triton.next_power_of_2(max(1, head_dim - 2 * half)),
        STAGES=cut.num_stages,
        num_warps=cut.num_warps,
        **overlap(projected),
    )
    return query.transpose(1, 2), keys, values


@triton.jit
def _norm_rotate(
    projected_ptr,
    projected_stride,
    q_weight_ptr,
    k_weight_ptr,
    frequencies_ptr,
    start_ptr,
    query_ptr,
    keys_ptr,
    keys_stride_b,
    keys_stride_g,
    keys_stride_s,
    values_ptr,
    values_stride_b,
    values_stride_g,
    values_stride_s,
    tokens,
    length,
    slots,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_EACH: tl.constexpr,
    INTO_CACHE: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: BLOCK_T tokens, PARTS_EACH of the heads of queries, keys and values.

    Entry i < HALF turns with entry i + HALF. So a head is three blocks: these two, and the rest.
    """
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    sequence, offset = (token // length).to(tl.int64), token % length
    start = tl.load(start_ptr)
    slot = offset
    if INTO_CACHE:
        slot = ((start % slots).to(tl.int32) + offset) % slots
    turning, still = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_R)[None, :] + 2 * HALF
    turns, stays = (token < tokens) & (turning < HALF), (token < tokens) & (still < SIZE)
    frequency = tl.load(frequencies_ptr + turning, mask=turning < HALF, other=0.0)
    angle = (start + offset).to(tl.float32) * frequency.to(tl.float32)
    cos, sin = tl.cos(angle), tl.sin(angle)

    first_part = tl.program_id(1) * PARTS_EACH
    projected_ptr += token.to(tl.int64) * projected_stride
    for part in tl.range(first_part, min(first_part + PARTS_EACH, PARTS), num_stages=STAGES):
        row = projected_ptr + part * SIZE
        first = tl.load(row + turning, mask=turns, other=0.0).to(tl.float32)
        second = tl.load(row + turning + HALF, mask=turns, other=0.0).to(tl.float32)
        rest = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        if 2 * HALF < SIZE:
            rest = tl.load(row + still, mask=stays, other=0.0).to(tl.float32)
        if part < HEADS + KV_HEADS:
            weight_ptr = q_weight_ptr if part < HEADS else k_weight_ptr
            first_weight = _one_plus(weight_ptr + turning, turns)
            second_weight = _one_plus(weight_ptr + turning + HALF, turns)
            rest_weight = _one_plus(weight_ptr + still, stays)
            squares = tl.sum(first * first + second * second, axis=1) + tl.sum(rest * rest, axis=1)
            scale = tl.rsqrt(squares / SIZE + eps)[:, None]
            first *= first_weight
            second *= second_weight
            rest *= rest_weight * scale
            turned = (first * cos - second * sin) * scale
            second = (second * cos + first * sin) * scale
            first = turned
        if part < HEADS:
            place = query_ptr + (token.to(tl.int64) * HEADS + part) * SIZE
            _store(place, first, second, rest, turning, still, turns, stays, HALF, SIZE)
        elif part < HEADS + KV_HEADS:
            place = keys_ptr + sequence * keys_stride_b + slot * keys_stride_s
            place += (part - HEADS) * keys_stride_g
            _store(place, first, second, rest, turning, still, turns, stays, HALF, SIZE)
        else:
            place = values_ptr + sequence * values_stride_b + slot * values_stride_s
            place += (part - HEADS - KV_HEADS) * values_stride_g
            _store(place, first, second, rest, turning, still, turns, stays, HALF, SIZE)


@triton.jit
def _one_plus(weight_ptr, mask):
    """1 + weight for every token of `mask`, so that each thread reads what it needs itself."""
    weight_ptr = tl.broadcast_to(weight_ptr, mask.shape)
    return 1.0 + tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(
    place, first, second, rest, turning, still, turns, stays, HALF: tl.constexpr, SIZE: tl.constexpr
):
    """A head's three blocks, rounded once."""
    dtype = place.dtype.element_ty
    tl.store(place + turning, first.to(dtype), mask=turns)
    tl.store(place + turning + HALF, second.to(dtype), mask=turns)
    if 2 * HALF < SIZE:
        tl.store(place + still, rest.to(dtype), mask=stays)
