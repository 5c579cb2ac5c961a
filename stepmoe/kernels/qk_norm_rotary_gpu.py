"""qk_norm_rotary.py as a Triton kernel: one pass over the projection, one rounding at its end."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait

_ENTRIES = 1024  # of one head's tile


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
    block_d = triton.next_power_of_2(head_dim)
    block_t = min(max(1, _ENTRIES // block_d), triton.next_power_of_2(tokens))
    # Many tokens: one program does every head of its tokens, for one set of cosines. Few: a program
    # a head, so that they run side by side.
    parts_each = num_parts if tokens >= 64 * block_t else 1
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(num_parts, parts_each))
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
        HALF=frequencies.shape[0],
        BLOCK_T=block_t,
        BLOCK_D=block_d,
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
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: BLOCK_T tokens, PARTS_EACH of the heads of queries, keys and values."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    entry = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < tokens) & (entry < SIZE)
    start = tl.load(start_ptr)
    position = start + token % length
    slot = position % slots if INTO_CACHE else token % length

    # Entry i < HALF turns with entry i + HALF; entries from 2 HALF on have angle 0 and no partner.
    turns = entry < 2 * HALF
    frequency = tl.load(frequencies_ptr + entry % HALF, mask=turns, other=0.0).to(tl.float32)
    angle = position.to(tl.float32) * frequency
    cos, sin = tl.cos(angle), tl.sin(angle)
    partner = tl.where(entry < HALF, entry + HALF, tl.where(turns, entry - HALF, entry))
    sin = tl.where(entry < HALF, -sin, sin)

    for offset in range(PARTS_EACH):
        part = tl.program_id(1) * PARTS_EACH + offset
        row = projected_ptr + token * projected_stride + part * SIZE
        x = tl.load(row + entry, mask=inside & (part < PARTS), other=0.0)
        if part >= HEADS + KV_HEADS:
            into = (token // length) * values_stride_b + slot * values_stride_s + entry
            into += (part - HEADS - KV_HEADS) * values_stride_g
            tl.store(values_ptr + into, x, mask=inside & (part < PARTS))
        else:
            wide = x.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)[:, None]
            weight_ptr = q_weight_ptr if part < HEADS else k_weight_ptr
            weight = tl.load(weight_ptr + entry, mask=entry < SIZE, other=0.0).to(tl.float32)
            other_weight = tl.load(weight_ptr + partner, mask=entry < SIZE, other=0.0)
            other = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
            turned = wide * (1.0 + weight) * cos
            turned += other * (1.0 + other_weight.to(tl.float32)) * sin
            y = (turned * scale).to(query_ptr.dtype.element_ty)
            if part < HEADS:
                tl.store(query_ptr + (token * HEADS + part) * SIZE + entry, y, mask=inside)
            else:
                into = (token // length) * keys_stride_b + slot * keys_stride_s + entry
                tl.store(keys_ptr + into + (part - HEADS) * keys_stride_g, y, mask=inside)
