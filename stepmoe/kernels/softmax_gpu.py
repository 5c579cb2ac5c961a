"""What the attention kernels share: one more tile of keys taken into a running softmax.

Softmax runs in base 2, which is what the hardware has: 2^(x log2 e) = e^x.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)  # a score that is not seen; finite, so that no inf - inf arises


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows (query heads and tokens) and keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # a matrix product takes no less than 16


@triton.jit
def absorb(
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
        # Scaled before and not after: a row that sees nothing here has HIDDEN for its maximum, and
        # the difference of a fused HIDDEN * scale - maximum is no zero, but what rounding left.
        scores = tl.where(seen, scores * scale, HIDDEN)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
    keep = tl.exp2(top - higher)
    values = tl.load(
        values_ptr + slot[:, None].to(tl.int64) * values_stride + entry, there, other=0.0
    )
    sums = tl.dot(weights.to(values.dtype), values, sums * keep[:, None], input_precision=PRECISION)
    return higher, total * keep + tl.sum(weights, 1), sums
