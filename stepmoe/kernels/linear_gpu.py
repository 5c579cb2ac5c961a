"""linear.py on the GPU: Triton kernels where tokens are few, torch where they are many.

Up to 4 tokens `_sums` here, up to 16 `_dots` in dots_gpu.py.

A product with few tokens reads the weight and does little else. It is as fast as memory if enough
of the weight is asked for at once, everywhere on the chip. So every program has a few whole rows of
the weight and all tokens: no sum is spread over programs, and a row's is always taken in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels import dots_gpu
from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.swiglu import clamped_swiglu
from stepmoe.kernels.swiglu_gpu import swiglu_entry

FEW_TOKENS = 4  # most of a product that goes to `_sums`
_PROGRAMS = 264  # twice as many as an H200 has multiprocessors, or more
_ROWS = 4  # of a weight in one program, where that leaves enough programs
_ENTRIES_EACH = 2048  # of one warp: eight loads of 16 bytes a thread
_MOST_WARPS = 8


@dataclass(frozen=True)
class Piece:
    """What one program of `_sums` computes: the output's columns of `rows` rows of the weight."""

    rows: int
    warps: int


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See linear.linear."""
    if not is_few(x, weight):
        return F.linear(x, weight)
    return few_tokens(x, weight, x.new_empty(len(x), len(weight)))


def linear_swiglu(x: Tensor, weight: Tensor, limit: float | None) -> Tensor:
    """See linear.linear_swiglu. Gate and up are not rounded on the way, as in grouped_gpu.py."""
    if not is_few(x, weight):
        return clamped_swiglu(F.linear(x, weight), limit)
    return few_tokens(x, weight, x.new_empty(len(x), len(weight) // 2), limit)


def few_tokens(x: Tensor, weight: Tensor, output: Tensor, limit: float | None = None) -> Tensor:
    """A product for which `is_few` holds, in `output`, whose dtype may be wider; see `launch`."""
    if len(x) <= FEW_TOKENS:
        launch(x, weight, output, piece_for(weight, output.shape[1]), limit)
    else:
        cut = dots_gpu.cut_for(weight)
        assert cut is not None, "is_few says so"
        dots_gpu.launch(x, weight, output, cut, limit)
    return output


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one of few tokens, and programs can hold its weight."""
    if x.dim() != 2 or x.dtype is not weight.dtype or not weight.is_contiguous():
        return False
    if 0 < len(x) <= FEW_TOKENS:
        return 2 * triton.next_power_of_2(weight.shape[1]) <= _MOST_WARPS * _ENTRIES_EACH
    if x.dtype is torch.float32 or not 0 < len(x) <= dots_gpu.MOST_TOKENS:
        return False
    return dots_gpu.cut_for(weight) is not None


def piece_for(weight: Tensor, columns: int) -> Piece:
    """Rows and warps, powers of two. The rule gives what was the fastest on an H200, or within 2%
    of it, for one token and the products of tp=8, where 5 or 6 pieces of each were measured."""
    size = weight.shape[1]
    entries = size * (len(weight) // columns)  # that one column needs
    most = min(columns // _PROGRAMS, _MOST_WARPS * _ENTRIES_EACH // entries)
    rows = _power_of_2(min(most, max(_ROWS, _ENTRIES_EACH // entries)))
    # One row is spread over more warps: its programs are few.
    warps = max(rows * entries // _ENTRIES_EACH, 2 * size // _ENTRIES_EACH)
    return Piece(rows, min(_MOST_WARPS, _power_of_2(warps)))


def _power_of_2(most: int) -> int:
    """The largest that is at most `most`; 1 if none is."""
    return 1 << (max(1, most).bit_length() - 1)


def launch(
    x: Tensor, weight: Tensor, output: Tensor, piece: Piece, limit: float | None = None
) -> None:
    """Fill output (T, N) from x (T, K) and weight (N, K), or, gate above up, (2N, K).

    The weight is read while the kernel before still runs: it must not be what that kernel writes.
    """
    columns, size = output.shape[1], weight.shape[1]
    _sums[(triton.cdiv(columns, piece.rows),)](
        x.contiguous(),
        weight,
        output,
        len(x),
        limit or 0.0,
        COLUMNS=columns,
        SIZE=size,
        SWIGLU=len(weight) == 2 * columns,
        CLAMPS=limit is not None,
        ROWS=piece.rows,
        BLOCK=triton.next_power_of_2(size),
        num_warps=piece.warps,
        **overlap(x),
    )


@triton.jit
def _sums(
    x_ptr,
    weight_ptr,
    output_ptr,
    tokens,
    limit,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    SWIGLU: tl.constexpr,
    CLAMPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: ROWS rows of the weight, one token after the other.

    The rows are asked for at once and stay in registers. The wait also keeps the compiler from
    computing with some of them before it asks for the others.
    """
    let_next_start(OVERLAPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.arange(0, BLOCK)
    there = (entry < SIZE)[None, :]
    inside = (row < COLUMNS)[:, None] & there
    place = weight_ptr + row.to(tl.int64)[:, None] * SIZE + entry[None, :]
    weight = tl.load(place, mask=inside, other=0.0)
    if SWIGLU:
        up_weight = tl.load(place + COLUMNS * SIZE, mask=inside, other=0.0)
    wait(OVERLAPS)
    for token in tl.range(0, tokens, num_stages=3):
        x = tl.load(x_ptr + token * SIZE + entry, mask=entry < SIZE, other=0.0).to(tl.float32)
        total = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
        if SWIGLU:
            up = tl.sum(up_weight.to(tl.float32) * x[None, :], axis=1)
            total = swiglu_entry(total, up, limit, CLAMPS)
        result = total.to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + token * COLUMNS + row, result, mask=row < COLUMNS)
