"""Products of 5 to 16 tokens on tensor cores: one Triton kernel that streams the weight.

As in linear_gpu.py a product reads its weight and does little else. So all of the weight is asked
for at once, before the kernel before has ended, and stays in registers. What is new is the traffic
of the tokens: every program reads all of them, 16 tokens as much as 16 rows of the weight. So a
program has 8 rows or more, and where that makes few programs, each has the more warps: they share
the rows' entries, and their sums are added in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.swiglu_gpu import swiglu_entry

DEPTH = tl.constexpr(32)  # entries of a row that a warp multiplies at once

MOST_TOKENS = 16  # of a product that comes here, and of a program
_AHEAD = 8  # steps of DEPTH entries for which the tokens are asked beforehand
_ENTRIES_EACH = 256  # of a row, the fewest worth a warp of their own
_MOST_WARPS = 8  # of a program
_FEWEST_HELD, _MOST_HELD = 128, 256  # entries of the weight in a thread, two to a register
_WARPS_AT_ONCE = 8 * 132  # of all programs: eight for each multiprocessor of an H200


@dataclass(frozen=True)
class Dots:
    """How a product is cut.

    Attributes:
        rows: of the weight in one program, half of them gate and half up where they are a pair.
        warps: of a program; each has its share of the entries of every row.
    """

    rows: int
    warps: int


def cut_for(weight: Tensor) -> Dots | None:
    """The cut of a product with a weight (N, K); None if that is not for `_dots`.

    It does not depend on the tokens, so neither does a token's result on how many others there are.
    """
    # Of the cuts tried on an H200 (notebooks/results/h200_tuning.md) the best at 16 tokens has the
    # fewest rows with which a thread holds enough and all warps run at once: 8 rows x 8 warps for
    # 288 and 320 rows of 4096 (16 rows took 12 to 17 % longer), 16 x 8 for 1288 and 1808 (8 rows:
    # 27 to 37 %), 16 x 4 for 4096 of 1024 and 1536 (8 warps: 26 to 52 %), 32 x 1 for 4096 of 160
    # (16 rows: 12 %). What would not run at once was not tried, and stays with torch.
    rows, size = weight.shape
    warps = min(_MOST_WARPS, 1 << (max(1, size // _ENTRIES_EACH).bit_length() - 1))
    steps = triton.cdiv(size, warps * DEPTH.value)
    for each in (8, 16, 32):
        enough = each * steps >= _FEWEST_HELD or each == 32
        at_once = triton.cdiv(rows, each) * warps <= _WARPS_AT_ONCE
        if enough and at_once and each * steps <= _MOST_HELD:
            return Dots(each, warps)
    return None


def launch(
    x: Tensor, weight: Tensor, output: Tensor, cut: Dots, limit: float | None = None
) -> None:
    """Fill output (T, N) from x (T, K) and weight (N, K), or, gate above up, (2N, K).

    T is at most MOST_TOKENS. The weight is read while the kernel before still runs: it must not be
    what that kernel writes.
    """
    (tokens, columns), size = output.shape, weight.shape[1]
    paired = len(weight) == 2 * columns
    each = cut.rows // 2 if paired else cut.rows
    steps = triton.cdiv(size, cut.warps * DEPTH.value)
    _dots[(triton.cdiv(columns, each),)](
        x.contiguous(),
        weight,
        output,
        tokens,
        limit or 0.0,
        COLUMNS=columns,
        SIZE=size,
        PARTS=2 if paired else 1,
        CLAMPS=limit is not None,
        TOKENS=MOST_TOKENS,
        EACH=each,
        WARPS=cut.warps,
        STEPS=steps,
        AHEAD=min(_AHEAD, steps),
        num_warps=cut.warps,
        **overlap(x),
    )


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
    CLAMPS: tl.constexpr,
    TOKENS: tl.constexpr,
    EACH: tl.constexpr,
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: EACH columns of the output, or of gate and of up, of all tokens.

    A batched product: a warp has its own STEPS * DEPTH entries of every row. All of the weight is
    asked for before the wait and stays in registers; no memory is shared until the warps' sums are.
    """
    let_next_start(OVERLAPS)
    eight = tl.arange(0, 8)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    entry = warp * (STEPS * DEPTH) + tl.arange(0, DEPTH)[None, None, None, :]
    row = tl.arange(0, PARTS * EACH // 8)[None, None, :, None] * 8 + eight
    column = tl.program_id(0) * EACH + row % EACH
    weight_ptr += (row // EACH * COLUMNS + column).to(tl.int64) * SIZE + entry
    weights = ()  # type: tuple[tl.tensor, ...]
    for step in tl.static_range(STEPS):
        mask = (column < COLUMNS) & (entry < SIZE - step * DEPTH)
        weights += (tl.load(weight_ptr + step * DEPTH, mask=mask, other=0.0),)
    token = tl.arange(0, TOKENS // 8)[None, None, :, None] * 8 + eight
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

    if PARTS == 2:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (TOKENS, 2, EACH)), (0, 2, 1)))
        sums = swiglu_entry(gate, up, limit, CLAMPS)
    token = tl.arange(0, TOKENS)[:, None]
    columns = tl.program_id(0) * EACH + tl.arange(0, EACH)[None, :]
    mask = (token < tokens) & (columns < COLUMNS)
    place = output_ptr + token * COLUMNS + columns
    tl.store(place, sums.to(output_ptr.dtype.element_ty), mask=mask)


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
