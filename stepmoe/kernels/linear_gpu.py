"""linear.py on the GPU: Triton kernels where tokens are few, torch where they are many.

A product with few tokens reads the weight and does little else. It is as fast as memory if enough
of the weight is asked for at once, everywhere on the chip. So every program has a few whole rows of
the weight and all tokens: no sum is spread over programs, and a row's is always taken in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.swiglu import clamped_swiglu
from stepmoe.kernels.swiglu_gpu import swiglu_entry

FEW_TOKENS = 4  # most of a product that goes to `_sums`
_PROGRAMS = 132  # as many as an H100 has multiprocessors, or more
_ENTRIES = 8192  # of a weight in one program, where that leaves enough programs
_ENTRIES_EACH = 2048  # of one warp: eight loads of 16 bytes a thread
_MOST_WARPS = 8


@dataclass(frozen=True)
class Piece:
    """What one program of `_sums` computes: the output's columns of `rows` rows of the weight."""

    rows: int
    warps: int


@dataclass(frozen=True)
class Tile:
    """What one program of `_dots` computes: the same, in steps of `depth` inputs."""

    rows: int
    depth: int
    warps: int
    stages: int


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
    launch(x, weight, output, piece_for(weight, output.shape[1]), limit)
    return output


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one of few tokens, and a program can hold a row of its weight."""
    fits = 2 * triton.next_power_of_2(weight.shape[1]) <= _MOST_WARPS * _ENTRIES_EACH
    fits &= x.dtype is weight.dtype and weight.is_contiguous()
    return x.dim() == 2 and 0 < len(x) <= FEW_TOKENS and fits


def piece_for(weight: Tensor, columns: int) -> Piece:
    """A power of two of rows, and warps that hold them; not yet chosen by measurement."""
    beside = len(weight) // columns  # rows that one column needs
    entries = triton.next_power_of_2(weight.shape[1]) * beside
    most = max(1, min(_ENTRIES // entries, columns // _PROGRAMS))
    rows = 1 << (most.bit_length() - 1)
    return Piece(rows, max(1, rows * entries // _ENTRIES_EACH))


def launch(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    piece: Piece | Tile,
    limit: float | None = None,
) -> None:
    """Fill output (T, N) from x (T, K) and weight (N, K), or, gate above up, (2N, K).

    The weight is read while the kernel before still runs: it must not be what that kernel writes.
    """
    columns = output.shape[1]
    shared = {
        "COLUMNS": columns,
        "SIZE": weight.shape[1],
        "SWIGLU": len(weight) == 2 * columns,
        "CLAMPS": limit is not None,
        "ROWS": piece.rows,
        "num_warps": piece.warps,
        **overlap(x),
    }
    arguments = (x.contiguous(), weight, output, len(x), limit or 0.0)
    programs = triton.cdiv(columns, piece.rows)
    if isinstance(piece, Piece):
        block = triton.next_power_of_2(weight.shape[1])
        _sums[(programs,)](*arguments, BLOCK=block, **shared)
    else:
        tokens = max(16, min(64, triton.next_power_of_2(len(x))))
        grid = (programs, triton.cdiv(len(x), tokens))
        _dots[grid](*arguments, DEPTH=piece.depth, TOKENS=tokens, num_stages=piece.stages, **shared)


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


@triton.jit
def _dots(
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
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: ROWS rows of the weight and TOKENS tokens, on the tensor cores."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * SIZE
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    up = tl.zeros((TOKENS, ROWS), tl.float32)
    for begin in range(0, SIZE, DEPTH):
        entry = (begin + tl.arange(0, DEPTH))[None, :]
        x_place = x_ptr + token[:, None] * SIZE + entry
        x = tl.load(x_place, mask=(token < tokens)[:, None] & (entry < SIZE), other=0.0)
        inside = (row < COLUMNS)[:, None] & (entry < SIZE)
        weight = tl.load(weight_rows + entry, mask=inside, other=0.0)
        total = tl.dot(x, weight.T, total, input_precision="ieee")
        if SWIGLU:
            weight = tl.load(weight_rows + COLUMNS * SIZE + entry, mask=inside, other=0.0)
            up = tl.dot(x, weight.T, up, input_precision="ieee")
    if SWIGLU:
        total = swiglu_entry(total, up, limit, CLAMPS)
    place = output_ptr + token[:, None] * COLUMNS + row[None, :]
    kept = (token < tokens)[:, None] & (row < COLUMNS)[None, :]
    tl.store(place, total.to(output_ptr.dtype.element_ty), mask=kept)
