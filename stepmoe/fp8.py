"""Block-scaled FP8 weights as they are published: float8_e4m3 numbers and a scale for each block.

A weight (..., R, C) comes with weight_scale_inv (..., ceil(R / 128), ceil(C / 128)): each 128 x 128
block of the last two dims, smaller at the edges, is to be multiplied by its entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128

#: What the model's ledger says of weights that were published in FP8.
DEQUANTISED = (
    "FP8 weights were multiplied out to {dtype} while reading: stepmoe computes with them in "
    "{dtype}, no FP8 kernel runs"
)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales that belong to a weight of this shape."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def scale_slices(slices: tuple[slice, ...]) -> tuple[slice, ...]:
    """The scales of every block that a slice of the weight touches, if only at its edge."""
    blocks = (slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in slices[-2:])
    return (*slices[:-2], *blocks)


def dequantise(weight: Tensor, scale: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """Multiply a slice of a weight by its scales: float32, of the slice's shape.

    Args:
        weight: (..., r, c) float8_e4m3fn, what `slices` cut out of the whole weight.
        scale: what `scale_slices(slices)` cut out of the whole scales.
        slices: where in the weight it lies; it may begin and end inside a block.
    """
    rows, columns = (
        torch.arange(part.start, part.stop, device=weight.device) // BLOCK - part.start // BLOCK
        for part in slices[-2:]
    )
    factors = scale.float().index_select(-2, rows).index_select(-1, columns)
    return factors.mul_(weight.float())
