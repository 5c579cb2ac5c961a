"""grouped.py on the GPU: a Triton kernel; the second half of many rows has grouped_many_gpu.py's.

The kernel reads the tokens where they are and ends in SwiGLU: no copy of the tokens and no output
of gate and up is ever written. With a few rows an expert the product reads weights and does little
else; tiles made for many rows leave much of the GPU idle then, and those for few cut the weights
into more pieces. float32 goes to torch's grouped_mm, and so does the second half of many rows on a
GPU with less shared memory than an H100.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepmoe.kernels import grouped, grouped_many_gpu
from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.permute import RowOrder, permute_rows
from stepmoe.kernels.swiglu import clamped_swiglu
from stepmoe.kernels.swiglu_gpu import swiglu_entry
from stepmoe.kernels.tiles_gpu import Tile, find_tile

FEW_ROWS = 4096  # most rows of a pass for which tiles of 16 rows are the best

# Chosen by measurement: many rows on an H200 (notebooks/results/h200_tuning.md), few on an H100
# (h100_tuning.md).
GATE_UP_FEW = Tile(rows=16, columns=32, depth=256, warps=4, stages=3)
GATE_UP_MANY = Tile(rows=128, columns=128, depth=64, warps=8, stages=4)
DOWN_FEW = Tile(rows=16, columns=128, depth=128, warps=4, stages=3)


def gate_up_swiglu(
    x: Tensor, weight: Tensor, order: RowOrder, start: int, count: int, limit: float | None
) -> Tensor:
    """See grouped.gate_up_swiglu."""
    if x.dtype is torch.float32:
        rows = permute_rows(x, order, start, count)
        gate_up = grouped.grouped_linear(rows, weight, order, start)
        return clamped_swiglu(gate_up, limit, order.ends[-1:] - start)
    output = x.new_empty(count, weight.shape[1] // 2)
    tile = GATE_UP_FEW if count <= FEW_ROWS else GATE_UP_MANY
    launch(x.contiguous(), weight, order, start, output, tile, gathers=True, limit=limit)
    return output


def grouped_linear(rows: Tensor, weight: Tensor, order: RowOrder, start: int) -> Tensor:
    """See grouped.grouped_linear."""
    is_many = len(rows) > FEW_ROWS
    if rows.dtype is torch.float32 or (is_many and not grouped_many_gpu.fits(rows)):
        ends = order.ends_within(start, len(rows))
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    output = rows.new_empty(len(rows), weight.shape[1])
    if is_many:
        grouped_many_gpu.launch(rows.contiguous(), weight, order, start, output)
    else:
        launch(rows.contiguous(), weight, order, start, output, DOWN_FEW)
    return output


def launch(
    x: Tensor,
    weight: Tensor,
    order: RowOrder,
    start: int,
    output: Tensor,
    tile: Tile,
    *,
    gathers: bool = False,
    limit: float | None = None,
) -> None:
    """Run the kernel: output (count, N) from x (T, in) if it gathers, else from rows (count, in).

    Where the weight has twice as many features as the output has columns, they are gate and up.
    """
    num_local, features, size = weight.shape
    count, columns = output.shape
    parts = features // columns
    matrices = weight.view(num_local * parts, columns, size)
    # An expert's last tile is partly empty, and no more experts have rows than there are rows.
    tiles = triton.cdiv(count, tile.rows) + min(num_local, count)
    blocks = triton.cdiv(columns, tile.columns)
    _grouped[(blocks * tiles,)](
        x,
        order.choices,
        order.ends,
        TensorDescriptor.from_tensor(matrices, [parts, tile.columns, tile.depth]),
        output,
        start,
        count,
        limit or 0.0,
        COLUMNS=columns,
        SIZE=size,
        LOCAL=num_local,
        BLOCK_E=triton.next_power_of_2(num_local),
        TOP_K=order.positions.shape[1],
        GATHERS=gathers,
        PARTS=parts,
        CLAMPS=limit is not None,
        ROWS=tile.rows,
        BLOCK=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap(x),
    )


@triton.jit
def _grouped(
    x_ptr,
    choices_ptr,
    ends_ptr,
    weight,
    output_ptr,
    start,
    count,
    limit,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHERS: tl.constexpr,
    PARTS: tl.constexpr,
    CLAMPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: a tile of ROWS rows of one expert and BLOCK columns of the output.

    An expert has one matrix, or PARTS 2: gate and up, side by side in one product, which reads the
    rows once for both, and brought together by SwiGLU.
    """
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    if tl.load(ends_ptr + LOCAL - 1) <= start:
        return  # a pass without a row, found out before all that follows
    expert, row, end = find_tile(
        tl.program_id(0) // blocks, ends_ptr, start, count, LOCAL, BLOCK_E, ROWS
    )
    if row < end:
        rows = row + tl.arange(0, ROWS)
        inside = rows < end
        source = rows - start
        if GATHERS:
            source = tl.load(choices_ptr + rows, mask=inside, other=0) // TOP_K
        x_rows = x_ptr + source.to(tl.int64)[:, None] * SIZE
        first = tl.program_id(0) % blocks * BLOCK
        total = tl.zeros((ROWS, PARTS * BLOCK), tl.float32)
        for begin in range(0, SIZE, DEPTH):
            column = begin + tl.arange(0, DEPTH)[None, :]
            x = tl.load(x_rows + column, mask=inside[:, None] & (column < SIZE), other=0.0)
            matrix = weight.load([PARTS * expert, first, begin])
            total = tl.dot(x, tl.reshape(matrix, (PARTS * BLOCK, DEPTH)).T, total)
        if PARTS == 2:
            side_by_side = tl.permute(tl.reshape(total, (ROWS, 2, BLOCK)), (0, 2, 1))
            gate, up = tl.split(side_by_side)
            total = swiglu_entry(gate, up, limit, CLAMPS)
        columns = first + tl.arange(0, BLOCK)[None, :]
        place = output_ptr + (rows - start).to(tl.int64)[:, None] * COLUMNS + columns
        kept = inside[:, None] & (columns < COLUMNS)
        tl.store(place, total.to(output_ptr.dtype.element_ty), mask=kept)
