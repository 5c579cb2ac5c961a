"""grouped.grouped_linear of many rows as a Triton kernel: a program a multiprocessor, many tiles.

A program that did one tile would end, another start, find its tile and wait for its first inputs,
and all that while nothing is multiplied. Here the loop over tiles and the loop over a tile's inputs
are one loop, and Triton's pipeline runs through it: while a tile is finished and written, the
inputs of the next are on their way. A pass without a row is one short program a multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.permute import RowOrder
from stepmoe.kernels.tiles_gpu import Tile, tiles_of_experts

TILE = Tile(rows=128, columns=256, depth=64, warps=8, stages=4)  # by h200_tuning.md
_CHUNK = 32  # tiles a program looks up together: one for each thread of a warp


def fits(rows: Tensor) -> bool:
    """Whether a multiprocessor has the memory: an H100's, H200's or B200's 228 KiB are enough."""
    if not rows.is_cuda:  # the interpreter
        return True
    inputs = TILE.stages * (TILE.rows + TILE.columns) * TILE.depth
    needed = 2 * inputs + TILE.rows * TILE.columns + 2048  # results on their way; CUDA's 1 KiB
    properties = torch.cuda.get_device_properties(rows.device)
    return properties.shared_memory_per_multiprocessor >= needed


def launch(rows: Tensor, weight: Tensor, order: RowOrder, start: int, output: Tensor) -> None:
    """Fill output (count, N) from rows (count, K) and weight (num_local, N, K)."""
    num_local, columns, size = weight.shape
    count = len(rows)
    # An expert's last tile is partly empty, and no more experts have rows than there are rows.
    tiles = triton.cdiv(count, TILE.rows) + min(num_local, count)
    tiles *= triton.cdiv(columns, TILE.columns)
    _walk[(min(tiles, _programs(rows)),)](
        TensorDescriptor.from_tensor(rows, [TILE.rows, TILE.depth]),
        TensorDescriptor.from_tensor(weight, [1, TILE.columns, TILE.depth]),
        order.ends,
        output,
        tiles,
        start,
        count,
        COLUMNS=columns,
        SIZE=size,
        LOCAL=num_local,
        BLOCK_E=triton.next_power_of_2(num_local),
        ROWS=TILE.rows,
        BLOCK=TILE.columns,
        DEPTH=TILE.depth,
        CHUNK=_CHUNK,
        num_warps=TILE.warps,
        num_stages=TILE.stages,
        **overlap(rows),
    )


def _programs(rows: Tensor) -> int:
    """One a multiprocessor: its registers and shared memory have room for no other."""
    if not rows.is_cuda:  # the interpreter
        return 3
    return torch.cuda.get_device_properties(rows.device).multi_processor_count


@triton.jit
def _find_tiles(
    tile,
    ends_ptr,
    start,
    count,
    LOCAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Expert (LOCAL behind the last tile), first row, end of its rows and block of columns of each
    of some tiles: those of one expert after the other, and all of its rows for a block of columns
    before those for the next. So programs side by side read the same part of the weight."""
    begins, ends, tiles = tiles_of_experts(ends_ptr, start, count, LOCAL, BLOCK_E, ROWS)
    up_to = tl.cumsum(tiles * BLOCKS, 0)
    found = tl.minimum(tl.sum((up_to[None, :] <= tile[:, None]).to(tl.int32), 1), LOCAL)
    is_found = tl.arange(0, BLOCK_E)[None, :] == found[:, None]
    within = tile - tl.sum(tl.where(is_found, (up_to - tiles * BLOCKS)[None, :], 0), 1)
    high = tl.maximum(tl.sum(tl.where(is_found, tiles[None, :], 0), 1), 1)
    first = tl.sum(tl.where(is_found, begins[None, :], 0), 1) + within % high * ROWS
    return found, first, tl.sum(tl.where(is_found, ends[None, :], 0), 1), within // high


@triton.jit
def _pick(values, index, CHUNK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, CHUNK) == index, values, 0), 0)


@triton.jit
def _walk(
    rows,
    weight,
    ends_ptr,
    output_ptr,
    max_tiles,
    start,
    count,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: every num_programs-th tile."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    STEPS: tl.constexpr = (SIZE + DEPTH - 1) // DEPTH
    if tl.load(ends_ptr + LOCAL - 1) <= start:
        return  # a pass without a row, found out before all that follows
    for low in range(tl.program_id(0), max_tiles, CHUNK * tl.num_programs(0)):
        experts, firsts, ends, blocks = _find_tiles(
            low + tl.arange(0, CHUNK) * tl.num_programs(0),
            ends_ptr, start, count, LOCAL, BLOCK_E, ROWS, BLOCKS,
        )  # fmt: skip
        tiles = tl.sum((experts < LOCAL).to(tl.int32), 0)
        tile = 0
        step = 0
        expert = 0
        row = 0
        end = 0
        column = 0
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for _ in range(tiles * STEPS):
            if step == 0:  # a tile begins
                expert = _pick(experts, tile, CHUNK)
                row = _pick(firsts, tile, CHUNK) - start
                end = _pick(ends, tile, CHUNK) - start
                column = _pick(blocks, tile, CHUNK) * BLOCK
                tile += 1
            # Behind an expert's last row stand another's: nobody reads those products.
            part = rows.load([row, step * DEPTH])
            matrix = weight.load([expert, column, step * DEPTH])
            total = tl.dot(part, tl.reshape(matrix, (BLOCK, DEPTH)).T, total)
            is_last = step == STEPS - 1
            if is_last:  # sets nothing that loads need: they are some steps ahead of it
                _store(total, output_ptr, row, end, column, COLUMNS, ROWS, BLOCK)
                total = tl.zeros((ROWS, BLOCK), tl.float32)
            step = tl.where(is_last, 0, step + 1)


@triton.jit
def _store(
    result,
    output_ptr,
    row,
    end,
    column,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result (ROWS, BLOCK) to the output from (row, column) on, up to row `end`."""
    rows = (row + tl.arange(0, ROWS))[:, None]
    columns = column + tl.arange(0, BLOCK)[None, :]
    kept = rows < end
    if COLUMNS % BLOCK != 0:
        kept &= columns < COLUMNS
    place = output_ptr + rows.to(tl.int64) * COLUMNS + columns
    tl.store(place, result.to(output_ptr.dtype.element_ty), mask=kept)
