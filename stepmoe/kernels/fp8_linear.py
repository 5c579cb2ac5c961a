"""x times a weight in FP8 blocks, transposed: on Hopper by cuBLAS through torch's scaled_mm.

What cuBLAS wants for a product (M, K) by (N, K) transposed, L = K / 128 and L4 = L rounded up to a
multiple of 4 (docs.nvidia.com/cuda/cublas, "128-element 1D and 128x128 2D Block Scaling For FP8
Data Types"; torch checks the same in aten/src/ATen/native/cuda/ScaledBlas.cpp since
github.com/pytorch/pytorch/pull/166752):

| operand | scales | shape handed to torch | strides |
|---|---|---|---|
| (M, K), a scale for each row and 128 columns | BlockWise1x128 | (M, L) | (1, M) |
| (N, K), the same | BlockWise1x128 | (N, L) | (1, N) |
| (N, K), a scale for each 128 x 128 block | BlockWise128x128 | (L4, N / 128) | (1, L4) |

M a multiple of 4, K and N of 16, scales 16-byte aligned; compute capability 9, cuBLAS 12.9. The
scales of 128 x 128 blocks are thus stored as published, a row of blocks after the other, each row
padded to L4, and handed over transposed. Where N = K, a multiple of 512, scales laid out the other
way have the shape and strides that are asked for as well, and are taken without a word: in a trial
of torch's call on an H100 (8192 x 8192, normal numbers) the product was then off by 9.6 %. As this
module makes it the call was right on an H200 (tests/cuda/test_fp8.py: against the product of the
quantised numbers in float64); without a GPU tests/oracle_fp8.py stands in for it.

Quantising included, of a rank's share at tp=8: with 16384 tokens attention's and the dense layers'
maps took 0.7 to 0.9 of bf16's time on an H200, the shared expert's 1.3 to 1.7 of it; with 64 tokens
all took longer (notebooks/results/h200_tuning.md).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from stepmoe.kernels.block_scale import BLOCK, BlockScaled, ScaledRows, quantise_rows

SCALED_MM = "torch scaled_mm (cuBLAS FP8, 1 x 128 by 128 x 128 blocks)"
REFERENCE = "reference: quantised alike, multiplied out, product in {dtype}"


def fp8_linear(x: Tensor, weight: BlockScaled) -> Tensor:
    """x (..., columns) quantised by row and 128 columns, times weight (N, columns): (..., N).

    The result has x's dtype; sums are in float32 or wider. `linear_kernel` says what computes it.
    """
    rows = x.flatten(0, -2)
    quantised = quantise_rows(rows, weight.offset, weight.num_blocks)
    if has_fp8_products(x.device) and x.dtype is not torch.float64:
        output = _scaled_mm(quantised, weight, x.dtype)[: len(rows)]
    else:
        dtype = product_dtype(x.device, x.dtype)
        plain = quantised.multiplied_out(len(rows), weight.offset, weight.columns, dtype)
        output = F.linear(plain, weight.multiplied_out(dtype)).to(x.dtype)
    return output.unflatten(0, x.shape[:-1])


def _scaled_mm(x: ScaledRows, weight: BlockScaled, dtype: torch.dtype) -> Tensor:
    by_row, by_block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    is_by_block = weight.grain == BLOCK
    return F.scaled_mm(
        x.numbers,
        weight.weight.t(),
        x.scale,
        by_row,
        weight.scale.t() if is_by_block else weight.scale,
        by_block if is_by_block else by_row,
        output_dtype=dtype,
    )


def linear_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies activations of this dtype on this device, in words."""
    if has_fp8_products(device) and dtype is not torch.float64:
        return SCALED_MM
    return REFERENCE.format(dtype=str(product_dtype(device, dtype)).removeprefix("torch."))


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of the reference's product: float32 or wider, but on a GPU the activations' own, for speed.

    A product of two float8 numbers is exact in float32, so that alone the order of the sum differs.
    """
    return dtype if device.type == "cuda" else torch.promote_types(dtype, torch.float32)


@functools.cache
def has_fp8_products(device: torch.device) -> bool:
    """Whether this device multiplies FP8 blocks: Hopper, with a cuBLAS that knows them."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)
