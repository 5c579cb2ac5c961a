"""swiglu.py as a Triton kernel: gate and up are read once, nothing in between is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES, WARPS = 2048, 4  # of one program


def clamped_swiglu(gate_up: Tensor, limit: float | None, num_rows: Tensor | None = None) -> Tensor:
    """See swiglu.clamped_swiglu; arithmetic in float32."""
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return output
    # The widest power of two that divides the size: then no column needs a mask.
    block = max(16, min(512, size & -size))
    blocks = triton.cdiv(size, block)
    block_rows = ENTRIES // block
    _swiglu[(blocks * triton.cdiv(rows, block_rows),)](
        gate_up,
        output,
        num_rows,
        rows,
        limit or 0.0,
        SIZE=size,
        BLOCKS=blocks,
        ROWS=block_rows,
        BLOCK=block,
        CLAMPS=limit is not None,
        COUNTED=num_rows is not None,
        num_warps=WARPS,
    )
    return output


@triton.jit
def swiglu_entry(gate, up, limit, CLAMPS: tl.constexpr):
    """silu(gate) * up of float32 blocks, both clamped."""
    activated = gate / (1.0 + tl.exp(-gate))
    if CLAMPS:
        activated = tl.minimum(activated, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return activated * up


@triton.jit
def _swiglu(
    gate_up_ptr,
    output_ptr,
    num_rows_ptr,
    rows,
    limit,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLAMPS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One program: ROWS x BLOCK entries of the output. The programs that share a row stand side by
    side: together they read whole rows, and memory likes to be read in one piece."""
    if COUNTED:
        rows = tl.minimum(rows, tl.load(num_rows_ptr))
    row = (tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    if SIZE % BLOCK != 0:
        inside &= column < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + column, mask=inside, other=0.0)
    result = swiglu_entry(gate, up.to(tl.float32), limit, CLAMPS)
    tl.store(output_ptr + row * SIZE + column, result.to(output_ptr.dtype.element_ty), mask=inside)
