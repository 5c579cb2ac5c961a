"""Products of 5 to 16 tokens on tensor cores: one Triton kernel that streams the weight.

As in linear_gpu.py a product reads its weight and does little else. So all of the weight is asked
for at once, before the kernel before has ended, and stays in registers. What is new is the traffic
of the tokens: every program reads all of them, 16 tokens as much as 16 rows of the weight. So a
program has 16 rows or more, and where that makes few programs, each has the more warps: they share
the rows' entries, and their sums are added in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.swiglu_gpu import swiglu_entry

DEPTH = tl.constexpr(32)  # entries of a row that a warp multiplies at once

MOST_TOKENS = 16  # of a product that comes here; 0: none does
_PROGRAMS = 264  # most of a product: two for each multiprocessor of an H200
_ENOUGH = 128  # programs, about as many as there are multiprocessors
_ENTRIES_HELD = 256  # most of the weight that a thread holds, half as many registers
_WARPS = 8
_ENTRIES_EACH = 128  # of a row, the fewest worth a warp of their own


@dataclass(frozen=True)
class Dots:
    """How a product is cut.

    Attributes:
        rows: of the weight in one program, half of them gate and half up where they are a pair.
        warps: of a program; each has its share of the entries of every row.
        splits: programs that share the entries of the same rows; their sums are added by a second
            kernel if there are several.
        ahead: steps of DEPTH entries for which the tokens are asked beforehand.
    """

    rows: int
    warps: int
    splits: int = 1
    ahead: int = 8


def cut_for(weight: Tensor) -> Dots | None:
    """The cut of a product with a weight (N, K); None if that is not for `_dots`.

    It does not depend on the tokens, so neither does a token's result on how many others there are.
    """
    rows, size = weight.shape
    warps = min(_WARPS, 1 << (max(1, size // _ENTRIES_EACH).bit_length() - 1))
    steps = triton.cdiv(size, warps * DEPTH.value)
    each = 32 if rows >= 32 * _ENOUGH and 32 * steps <= _ENTRIES_HELD else 16
    fits = each * steps <= _ENTRIES_HELD and triton.cdiv(rows, each) <= _PROGRAMS
    return Dots(each, warps) if fits else None


def launch(
    x: Tensor, weight: Tensor, output: Tensor, cut: Dots, limit: float | None = None
) -> None:
    """Fill output (T, N) from x (T, K) and weight (N, K), or, gate above up, (2N, K).

    The weight is read while the kernel before still runs: it must not be what that kernel writes.
    """
    (tokens, columns), size = output.shape, weight.shape[1]
    paired = len(weight) == 2 * columns
    each = cut.rows // 2 if paired else cut.rows
    block = 16 if tokens <= 16 else 32
    steps = triton.cdiv(size, cut.splits * cut.warps * DEPTH.value)
    options = {"COLUMNS": columns, "CLAMPS": limit is not None, **overlap(x)}
    made = output
    if cut.splits > 1:
        made = output.new_empty((cut.splits, tokens, len(weight)), dtype=torch.float32)
    _dots[(triton.cdiv(columns, each), cut.splits, triton.cdiv(tokens, block))](
        x.contiguous(),
        weight,
        made,
        tokens,
        limit or 0.0,
        SIZE=size,
        PARTS=2 if paired else 1,
        WHOLE=cut.splits == 1,
        TOKENS=block,
        EACH=each,
        WARPS=cut.warps,
        STEPS=steps,
        AHEAD=min(cut.ahead, steps, 128 // block),
        num_warps=cut.warps,
        **options,
    )
    if cut.splits > 1:
        _add_splits[(tokens, triton.cdiv(columns, 256))](
            made, output, limit or 0.0, PARTS=2 if paired else 1, SPLITS=cut.splits, BLOCK=256,
            num_warps=2, **options,
        )  # fmt: skip


@triton.jit
def _dots(
    x_ptr,
    weight_ptr,
    output_ptr,
    tokens,
    limit,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    CLAMPS: tl.constexpr,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: EACH columns of the output, or of gate and of up, for TOKENS tokens.

    A batched product: a warp has its own STEPS * DEPTH entries of every row. All of the weight is
    asked for before the wait and stays in registers; no memory is shared until the warps' sums are.
    """
    let_next_start(OVERLAPS)
    eight = tl.arange(0, 8)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    entry = tl.program_id(1) * (STEPS * WARPS * DEPTH) + warp * (STEPS * DEPTH)
    entry += tl.arange(0, DEPTH)[None, None, None, :]
    row = tl.arange(0, PARTS * EACH // 8)[None, None, :, None] * 8 + eight
    column = tl.program_id(0) * EACH + row % EACH
    weight_ptr += (row // EACH * COLUMNS + column).to(tl.int64) * SIZE + entry
    weights = ()  # type: tuple[tl.tensor, ...]
    for step in tl.static_range(STEPS):
        mask = (column < COLUMNS) & (entry < SIZE - step * DEPTH)
        weights += (tl.load(weight_ptr + step * DEPTH, mask=mask, other=0.0),)
    first_token = tl.program_id(2) * TOKENS
    token = first_token + tl.arange(0, TOKENS // 8)[None, None, :, None] * 8 + eight
    x_ptr += token * SIZE + entry
    wait(OVERLAPS)
    first = ()  # type: tuple[tl.tensor, ...]
    for step in tl.static_range(AHEAD):
        mask = (token < tokens) & (entry < SIZE - step * DEPTH)
        first += (tl.load(x_ptr + step * DEPTH, mask=mask, other=0.0),)
    total = tl.zeros((WARPS, TOKENS, PARTS * EACH), tl.float32)
    tl.debug_barrier()
    if tokens > 0:  # always; with the barrier it keeps the compiler from asking for the rest later
        tiles = first
        for step in tl.static_range(STEPS):
            matrix = tl.permute(_spread(weights[step]), (0, 2, 1))
            total = tl.dot(_spread(tiles[step]), matrix, total)
            if step + AHEAD < STEPS:
                mask = (token < tokens) & (entry < SIZE - (step + AHEAD) * DEPTH)
                tiles += (tl.load(x_ptr + (step + AHEAD) * DEPTH, mask=mask, other=0.0),)
    sums = tl.sum(total, 0)

    token = first_token + tl.arange(0, TOKENS)[:, None]
    kept = token < tokens
    if WHOLE:
        first = tl.program_id(0) * EACH
        if PARTS == 2:
            gate, up = tl.split(tl.permute(tl.reshape(sums, (TOKENS, 2, EACH)), (0, 2, 1)))
            sums = swiglu_entry(gate, up, limit, CLAMPS)
        columns = first + tl.arange(0, EACH)[None, :]
        place = output_ptr + token * COLUMNS + columns
        tl.store(place, sums.to(output_ptr.dtype.element_ty), mask=kept & (columns < COLUMNS))
    else:
        own = tl.arange(0, PARTS * EACH)
        column = tl.program_id(0) * EACH + own % EACH
        place = (tl.program_id(1) * tokens + token) * (PARTS * COLUMNS) + own // EACH * COLUMNS
        tl.store(output_ptr + place + column, sums, mask=kept & (column < COLUMNS)[None, :])


@triton.jit
def _spread(x):
    """x (W, R, DEPTH) in another order of its DEPTH entries, the same for tokens and weights.

    Of a load a thread has eight neighbours, as 16 bytes. Of a tensor core's 16 entries it must have
    the pairs t and t + 4, where t is its number among four. In this order what it loaded is what it
    must have, for two products of 16: nothing is exchanged between threads.
    """
    WARPS: tl.constexpr = x.shape[1]
    EIGHTS: tl.constexpr = x.shape[2]
    x = tl.reshape(x, (8, WARPS, EIGHTS, 4, 4, 2))  # of DEPTH: thread, pair, entry
    return tl.reshape(tl.permute(x, (1, 2, 0, 4, 3, 5)), (WARPS, 8 * EIGHTS, DEPTH))


@triton.jit
def _add_splits(
    sums_ptr,
    output_ptr,
    limit,
    COLUMNS: tl.constexpr,
    CLAMPS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: BLOCK columns of one token, the splits of each added in their order."""
    let_next_start(OVERLAPS)
    token, tokens = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    total = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    wait(OVERLAPS)
    for split in tl.static_range(SPLITS):
        place = sums_ptr + (split * tokens + token) * (PARTS * COLUMNS) + column
        total += tl.load(place, mask=inside, other=0.0)
        if PARTS == 2:
            up += tl.load(place + COLUMNS, mask=inside, other=0.0)
    if PARTS == 2:
        total = swiglu_entry(total, up, limit, CLAMPS)
    place = output_ptr + token * COLUMNS + column
    tl.store(place, total.to(output_ptr.dtype.element_ty), mask=inside)
