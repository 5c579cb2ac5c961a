"""What the attention kernels share: one more tile of keys taken into a running softmax.

Softmax runs in base 2, which is what the hardware has: 2^(x log2 e) = e^x.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

# A score that is not seen: finite, so that no inf - inf arises, and a power of two, -2^100, exact
# when scaled. A row that sees nothing has it, scaled, for its maximum, and the difference of the
# two, which the compiler fuses with the product, is zero and not what rounding left.
HIDDEN = tl.constexpr(-1267650600228229401496703205376.0)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows (query heads and tokens) and keys at a time.

    registers: most that a thread may take, so that several programs fit a multiprocessor.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    registers: int | None = None


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
    cut,
    scale,
    keys,
    keys_stride,
    values,
    values_stride,
    b,
    WINDOW: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take KEYS more keys into the running maximum, sum of weights and weighted sum of values.

    cut: whether some row does not see some of them. `keys` and `values` are as `_take` wants them.
    """
    taken = _take(keys, keys_stride, b, begin, end, DESCRIBED, SIZE, BLOCK_D, KEYS)
    scores = tl.dot(query, tl.trans(taken), input_precision=PRECISION)
    if cut:
        distance = position[:, None] - (begin + tl.arange(0, KEYS))[None, :]
        seen = distance >= 0
        if WINDOW:
            seen = seen & (distance < WINDOW)
        scores = tl.where(seen, scores, HIDDEN)
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    keep = tl.exp2(top - higher)
    taken = _take(values, values_stride, b, begin, end, DESCRIBED, SIZE, BLOCK_D, KEYS)
    sums = tl.dot(weights.to(taken.dtype), taken, sums * keep[:, None], input_precision=PRECISION)
    return higher, total * keep + tl.sum(weights, 1), sums


@triton.jit
def _take(
    source,
    stride,
    b,
    begin,
    end,
    DESCRIBED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Slots begin to begin + KEYS - 1 of sequence b, of a descriptor of (B, S, d); or of a pointer
    to the sequence's slots, of which those from `end` on are zeros."""
    if DESCRIBED:
        taken = tl.reshape(source.load([b, begin, 0]), (KEYS, BLOCK_D))
    else:
        slot, entry = begin + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)[None, :]
        there = (slot < end)[:, None]
        if SIZE < BLOCK_D:
            there = there & (entry < SIZE)
        taken = tl.load(source + slot[:, None].to(tl.int64) * stride + entry, there, other=0.0)
    return taken
