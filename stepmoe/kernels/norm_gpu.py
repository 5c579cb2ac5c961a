"""norm.py as Triton kernels: every row is read once, and the sum never goes back to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait

_ENTRIES = 4096  # of one program: a whole row of the published hidden size


def gemma_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See norm.gemma_rms_norm."""
    rows = x.reshape(-1, x.shape[-1])
    normed = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, normed, None, eps)
    return normed.view(x.shape)


def add_gemma_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See norm.add_gemma_rms_norm."""
    total = torch.empty(
        x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device
    )
    normed = torch.empty_like(total)
    _launch(x.contiguous(), residual.contiguous(), weight, normed, total, eps)
    return normed, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    normed: Tensor,
    total: Tensor | None,
    eps: float,
) -> None:
    num_rows, size = x.shape
    if num_rows == 0:
        return
    block = triton.next_power_of_2(size)
    rows = max(1, _ENTRIES // block)
    _add_norm[(triton.cdiv(num_rows, rows),)](
        x,
        x.stride(0),
        residual,
        weight.contiguous(),
        normed,
        total,
        num_rows,
        eps,
        SIZE=size,
        ROWS=rows,
        BLOCK=block,
        ADDS=residual is not None,
        num_warps=4 if block <= _ENTRIES else 8,
        **overlap(x),
    )


@triton.jit
def _add_norm(
    x_ptr,
    x_stride,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: ROWS rows of SIZE entries. Without ADDS, residual and total do not exist."""
    let_next_start(OVERLAPS)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows) & (column < SIZE)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    wait(OVERLAPS)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        residual = tl.load(residual_ptr + row * SIZE + column, mask=inside, other=0.0)
        # What is normalised is the sum as the next layer will read it, rounded to its dtype.
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * SIZE + column, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
    normed = x * scale * (1.0 + weight)
    tl.store(normed_ptr + row * SIZE + column, normed.to(normed_ptr.dtype.element_ty), mask=inside)
