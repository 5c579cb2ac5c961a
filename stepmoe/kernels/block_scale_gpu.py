"""block_scale.py as a Triton kernel: activations are read once and written in FP8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.block_scale import BLOCK, FP8, LARGEST, TINIEST_SCALE, ScaledRows

_ROWS = 32  # of one program


def quantise_rows(
    x: Tensor, offset: int, blocks: int, num_rows: Tensor | None = None
) -> ScaledRows:
    """See block_scale.quantise_rows; arithmetic in float32."""
    rows, size = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    padded = triton.cdiv(rows, 4) * 4
    numbers = torch.empty(padded, blocks * BLOCK, dtype=FP8, device=x.device)
    scale = torch.empty(blocks, padded, dtype=torch.float32, device=x.device)
    if rows:
        _quantise[(triton.cdiv(padded, _ROWS), blocks)](
            x,
            numbers,
            scale,
            num_rows,
            rows,
            padded,
            x.stride(0),
            offset,
            size,
            LARGEST=LARGEST,
            TINIEST=TINIEST_SCALE,
            ROWS=_ROWS,
            BLOCK=BLOCK,
            COUNTED=num_rows is not None,
        )
    return ScaledRows(numbers, scale.t())


@triton.jit
def _quantise(
    x_ptr,
    numbers_ptr,
    scale_ptr,
    num_rows_ptr,
    rows,
    padded,
    stride,
    offset,
    size,
    LARGEST: tl.constexpr,
    TINIEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One program: one block of columns of ROWS rows."""
    first = tl.program_id(0) * ROWS
    end = padded
    if COUNTED:
        end = tl.minimum(padded, tl.load(num_rows_ptr))
    if first < end:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column = place - offset
        inside = (row < rows)[:, None] & ((column >= 0) & (column < size))[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=1), LARGEST), TINIEST)
        # Rounded as torch rounds a division, so that the reference is met bit for bit.
        numbers = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, BLOCK)))
        numbers = numbers.to(numbers_ptr.dtype.element_ty)
        width = tl.num_programs(1) * BLOCK
        kept = row < padded
        tl.store(numbers_ptr + row[:, None] * width + place[None, :], numbers, mask=kept[:, None])
        tl.store(scale_ptr + tl.program_id(1) * padded + row, scale, mask=kept)
