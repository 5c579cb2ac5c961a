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
    _swiglu[(triton.cdiv(rows * size, ENTRIES),)](
        gate_up,
        output,
        num_rows,
        rows,
        limit or 0.0,
        SIZE=size,
        WIDTH=min(8, size & -size),
        ENTRIES=ENTRIES,
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
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CLAMPS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One program: ENTRIES of the output, row after row, whatever the size of a row: what it reads
    and writes lies in one piece of memory each, as memory likes it.

    They are counted in groups of WIDTH, a power of two that divides SIZE: a thread reads one whole.
    """
    if COUNTED:
        rows = tl.minimum(rows, tl.load(num_rows_ptr))
    in_row: tl.constexpr = SIZE // WIDTH
    first = tl.program_id(0).to(tl.int64) * (ENTRIES // WIDTH)
    group = (first % in_row).to(tl.int32) + tl.arange(0, ENTRIES // WIDTH)[:, None]
    row = first // in_row + group // in_row
    column = group % in_row * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = row < rows
    gate_ptr = gate_up_ptr + row * 2 * SIZE + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + SIZE, mask=inside, other=0.0).to(tl.float32)
    result = swiglu_entry(gate, up, limit, CLAMPS).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + row * SIZE + column, result, mask=inside)
