"""grouped.py with the experts' weights in FP8: on Hopper a Triton kernel, else the reference.

What exists does not fit. torch's scaled_grouped_mm knows on Hopper one scale a row, not 128 x 128
blocks (in a trial on an H100 it took 2.1 to 2.4 times as long as bf16's grouped_mm:
notebooks/results/h100_tuning.md). FlashInfer 0.6.13's grouped products of
such blocks are for Blackwell; its cutlass_fused_moe has them for Hopper, but as one operation with
routing weights and sum, another clamp of SwiGLU, and to be compiled first. A loop of scaled_mm over
the experts has to wait for their counts of rows on the host.

The Triton kernel was right on an H200 (tests/cuda/test_fp8.py: against the reference). There it was
slower than bf16's with 16384 tokens (549 + 436 us, bf16 541 + 321, quantising not counted) and
faster with 64, as it reads half the bytes (94 + 50, bf16 173 + 84; notebooks/results/
h200_tuning.md).

The reference multiplies the weights out and calls what bf16 calls: a copy of the layer's experts,
twice as large, is written and read for every pass.

Legend: as in grouped.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.kernels import grouped
from stepmoe.kernels.block_scale import BlockScaled, ScaledRows, quantise_rows
from stepmoe.kernels.dispatch import has_triton
from stepmoe.kernels.fp8_linear import REFERENCE, has_fp8_products, product_dtype
from stepmoe.kernels.permute import RowOrder

# Few rows are tiles of 16, and Hopper multiplies FP8 in tiles of 64 rows: there Triton turns
# the numbers into float16, exactly, and multiplies at its speed.
GROUPED = "Triton kernel (1 x 128 by 128 x 128 blocks; FP8 tensor cores, few rows in float16)"


def gate_up_swiglu(
    x: Tensor,
    quantised: ScaledRows,
    weight: BlockScaled,
    order: RowOrder,
    start: int,
    count: int,
    limit: float | None,
) -> Tensor:
    """First half of the experts: x (T, D), weight (E_local, 2F, D) to (count, F).

    Args:
        quantised: x by `quantise_rows`, which all passes over the rows share.
    """
    if _takes_kernel(x):
        from stepmoe.kernels import fp8_grouped_gpu

        return fp8_grouped_gpu.gate_up_swiglu(x, quantised, weight, order, start, count, limit)
    plain = _multiplied_out(quantised, weight, x)
    weights = weight.multiplied_out(plain.dtype)
    return grouped.gate_up_swiglu(plain, weights, order, start, count, limit).to(x.dtype)


def grouped_linear(rows: Tensor, weight: BlockScaled, order: RowOrder, start: int) -> Tensor:
    """rows (count, in) times each its expert's weight (E_local, N, in), transposed: (count, N)."""
    num_rows = order.ends[-1:] - start
    quantised = quantise_rows(rows, weight.offset, weight.num_blocks, num_rows)
    if _takes_kernel(rows):
        from stepmoe.kernels import fp8_grouped_gpu

        return fp8_grouped_gpu.grouped_linear(rows, quantised, weight, order, start)
    plain = _multiplied_out(quantised, weight, rows)
    weights = weight.multiplied_out(plain.dtype)
    return grouped.grouped_linear(plain, weights, order, start).to(rows.dtype)


def grouped_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies the experts' activations of this dtype on this device, in words."""
    if has_fp8_products(device) and has_triton() and dtype is not torch.float64:
        return GROUPED
    return REFERENCE.format(dtype=str(product_dtype(device, dtype)).removeprefix("torch."))


def _takes_kernel(x: Tensor) -> bool:
    return grouped_kernel(x.device, x.dtype) == GROUPED


def _multiplied_out(quantised: ScaledRows, weight: BlockScaled, like: Tensor) -> Tensor:
    dtype = product_dtype(like.device, like.dtype)
    return quantised.multiplied_out(len(like), weight.offset, weight.columns, dtype)
