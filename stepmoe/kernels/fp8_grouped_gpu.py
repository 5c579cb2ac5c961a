"""fp8_grouped.py as a Triton kernel: grouped_gpu.py's, with both operands in FP8.

Scales change every 128 columns, so each step of 128 columns is a product of its own, multiplied by
the scales of its rows and columns and then added in float32. That is also what keeps the sum good:
Hopper's tensor cores hold sums of FP8 products in about 14 bits (DeepSeek-V3 Technical Report,
arXiv 2412.19437, section 3.3.2).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepmoe.kernels.block_scale import BLOCK, BlockScaled, ScaledRows
from stepmoe.kernels.grouped_gpu import FEW_ROWS
from stepmoe.kernels.permute import RowOrder
from stepmoe.kernels.swiglu_gpu import swiglu_entry
from stepmoe.kernels.tiles_gpu import Tile, find_tile

# Chosen by measurement on an H200 (notebooks/results/h200_tuning.md). A step's own product takes
# registers beside the sums, and more so if gate and up are one product, as in grouped_gpu.py.
GATE_UP_FEW = Tile(rows=16, columns=32, depth=BLOCK, warps=4, stages=5)
GATE_UP_MANY = Tile(rows=64, columns=64, depth=BLOCK, warps=4, stages=3)
DOWN_FEW = Tile(rows=16, columns=128, depth=BLOCK, warps=4, stages=3)
DOWN_MANY = Tile(rows=64, columns=128, depth=BLOCK, warps=4, stages=3)


def gate_up_swiglu(
    x: Tensor,
    quantised: ScaledRows,
    weight: BlockScaled,
    order: RowOrder,
    start: int,
    count: int,
    limit: float | None,
) -> Tensor:
    """See fp8_grouped.gate_up_swiglu."""
    output = x.new_empty(count, weight.weight.shape[1] // 2)
    tile = GATE_UP_FEW if count <= FEW_ROWS else GATE_UP_MANY
    launch(quantised, weight, order, start, output, tile, gathers=True, limit=limit)
    return output


def grouped_linear(
    rows: Tensor, quantised: ScaledRows, weight: BlockScaled, order: RowOrder, start: int
) -> Tensor:
    """See fp8_grouped.grouped_linear; rows are given for their number and dtype."""
    output = rows.new_empty(len(rows), weight.weight.shape[1])
    tile = DOWN_FEW if len(rows) <= FEW_ROWS else DOWN_MANY
    launch(quantised, weight, order, start, output, tile)
    return output


def launch(
    x: ScaledRows,
    weight: BlockScaled,
    order: RowOrder,
    start: int,
    output: Tensor,
    tile: Tile,
    *,
    gathers: bool = False,
    limit: float | None = None,
) -> None:
    """Run the kernel: output (count, N) from the tokens x if it gathers, else from rows x.

    Where the weight has twice as many features as the output has columns, they are gate and up.
    """
    num_local, features, size = weight.weight.shape
    count, columns = output.shape
    tiles = triton.cdiv(count, tile.rows) + min(num_local, count)
    blocks = triton.cdiv(columns, tile.columns)
    _grouped_fp8[(blocks * tiles,)](
        x.numbers,
        x.scale,
        order.choices,
        order.ends,
        TensorDescriptor.from_tensor(weight.weight.view(-1, size), [tile.columns, BLOCK]),
        weight.scale,
        output,
        x.scale.stride(1),
        *weight.scale.stride(),
        start,
        count,
        limit or 0.0,
        COLUMNS=columns,
        SIZE=size,
        LOCAL=num_local,
        BLOCK_E=triton.next_power_of_2(num_local),
        TOP_K=order.positions.shape[1],
        GRAIN=weight.grain,
        GATHERS=gathers,
        SWIGLU=features == 2 * columns,
        CLAMPS=limit is not None,
        ROWS=tile.rows,
        BLOCK=tile.columns,
        DEPTH=BLOCK,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _grouped_fp8(
    x_ptr,
    x_scale_ptr,
    choices_ptr,
    ends_ptr,
    weight,
    scale_ptr,
    output_ptr,
    x_scale_stride,
    expert_stride,
    row_stride,
    block_stride,
    start,
    count,
    limit,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    GRAIN: tl.constexpr,
    GATHERS: tl.constexpr,
    SWIGLU: tl.constexpr,
    CLAMPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program: a tile of ROWS rows of one expert and BLOCK columns of the output."""
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
        x_rows = x_ptr + source.to(tl.int64)[:, None] * SIZE + tl.arange(0, DEPTH)[None, :]
        x_scales = x_scale_ptr + source
        first = tl.program_id(0) % blocks * BLOCK
        columns = first + tl.arange(0, BLOCK)
        kept = columns < COLUMNS
        # The matrices of all experts stand one below the other; up stands below gate.
        top = expert * (2 * COLUMNS if SWIGLU else COLUMNS) + first
        scales = scale_ptr + expert.to(tl.int64) * expert_stride
        # A scale for each column, though 128 may share it: with one number for all, Triton's
        # pipeline was wrong in 0.1 % of results (github.com/meta-pytorch/tritonbench/pull/1163).
        gate_scales = scales + columns // GRAIN * row_stride
        up_scales = scales + (COLUMNS + columns) // GRAIN * row_stride
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        up = tl.zeros((ROWS, BLOCK), tl.float32)
        for step in range(0, SIZE // DEPTH):
            begin = step * DEPTH
            x = tl.load(x_rows + begin, mask=inside[:, None], other=0.0)
            x_scale = tl.load(x_scales + step * x_scale_stride, mask=inside, other=0.0)[:, None]
            scale = tl.load(gate_scales + step * block_stride, mask=kept, other=0.0)
            total += tl.dot(x, weight.load([top, begin]).T) * (x_scale * scale[None, :])
            if SWIGLU:
                scale = tl.load(up_scales + step * block_stride, mask=kept, other=0.0)
                product = tl.dot(x, weight.load([top + COLUMNS, begin]).T)
                up += product * (x_scale * scale[None, :])
        if SWIGLU:
            total = swiglu_entry(total, up, limit, CLAMPS)
        place = output_ptr + (rows - start).to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        tl.store(place, total.to(output_ptr.dtype.element_ty), mask=inside[:, None] & kept[None, :])
