"""Block-scaled FP8 weights as they are published: float8_e4m3 numbers and a scale for each block.

A weight (..., R, C) comes with weight_scale_inv (..., ceil(R / 128), ceil(C / 128)): each 128 x 128
block of the last two dims, smaller at the edges, is to be multiplied by its entry. Slices of it are
multiplied out, or kept as they are in a model that computes in FP8 and given back to be written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from stepmoe.errors import CheckpointError
from stepmoe.kernels.block_scale import BLOCK, BlockScaled, quantise_blocks
from stepmoe.kernels.fp8_grouped import grouped_kernel
from stepmoe.kernels.fp8_linear import linear_kernel

Quantization = Literal["fp8"] | None

SCALE = "_scale_inv"  # what a published FP8 weight's name is followed by in that of its scales

#: What the model's ledger says of weights that were published in FP8.
DEQUANTISED = (
    "FP8 weights were multiplied out to {dtype} while reading: stepmoe computes with them in "
    "{dtype}, no FP8 kernel runs; quantization='fp8' keeps them"
)


def fp8_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes with FP8 weights there: {"linear": ..., "experts": ...}, in words."""
    return {"linear": linear_kernel(device, dtype), "experts": grouped_kernel(device, dtype)}


def remark_on_fp8(device: torch.device, dtype: torch.dtype) -> str:
    """The same for the model's ledger."""
    kernels = fp8_kernels(device, dtype)
    return (
        "weights of attention, MLPs and experts are held in FP8 (float8_e4m3, 128 x 128 blocks); "
        f"linear maps: {kernels['linear']}; experts: {kernels['experts']}"
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


def pieces(slices: tuple[slice, ...], most: int) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Cut a slice along its first dim into pieces of about `most` numbers, between blocks.

    Yields:
        Where the piece begins in the slice, and where it lies in the whole weight. A piece of a
        matrix has at least one row of blocks, one of a stack at least one matrix.
    """
    first, *others = slices
    step = max(1, most // math.prod(part.stop - part.start for part in others))
    if len(slices) == 2:
        step = -(-step // BLOCK) * BLOCK
    edges = [first.start, *range(first.start // step * step + step, first.stop, step), first.stop]
    for start, stop in pairwise(edges):
        yield start - first.start, (slice(start, stop), *others)


def keep(
    target: BlockScaled, begin: int, numbers: Tensor, scale: Tensor, slices: tuple[slice, ...]
) -> None:
    """Write a piece into a weight that stays in FP8, numbers and scales as they are.

    Args:
        begin, slices: as from `pieces`.
        numbers: (..., r, c) float8_e4m3fn; scale: what `scale_slices(slices)` cut out of the whole.
    """
    here, used = slice(begin, begin + len(numbers)), slice(target.offset, None)
    target.weight[here][..., used][..., : target.columns] = numbers
    rows = torch.arange(slices[-2].start, slices[-2].stop, target.grain, device=scale.device)
    spread = scale.float().index_select(-2, rows // BLOCK - slices[-2].start // BLOCK)
    if len(slices) == 2:
        here = slice(begin // target.grain, begin // target.grain + len(rows))
    target.scale[here][..., : target.num_blocks] = spread


def kept_numbers(held: BlockScaled) -> Tensor:
    """(..., r, c) float8_e4m3fn: the numbers that `keep` wrote into a weight, a view of it."""
    return held.weight.narrow(-1, held.offset, held.columns)


def kept_scales(held: BlockScaled, slices: tuple[slice, ...], name: str) -> Tensor:
    """The scales that `keep` wrote into a weight: what `scale_slices(slices)` cuts out of all.

    Args:
        slices: where the weight lies in the published one, whose name is for the error.

    Raises:
        CheckpointError: the rows of a block have several scales.
    """
    rows = torch.arange(slices[-2].start, slices[-2].stop, held.grain, device=held.scale.device)
    blocks = rows // BLOCK - slices[-2].start // BLOCK
    scale = held.scale[..., : held.num_blocks]
    by_block = scale.index_select(-2, torch.searchsorted(blocks, blocks.unique()))
    expect_same_scales(by_block.index_select(-2, blocks), scale, name)
    return by_block


def expect_same_scales(known: Tensor, scale: Tensor, name: str) -> None:
    """Raise CheckpointError unless they are equal, wherever `known` is not NaN."""
    if bool(((known != scale) & ~known.isnan()).any()):
        raise CheckpointError(
            f"tensor {name} is held in FP8 with several scales in one block of {BLOCK} x {BLOCK}, "
            "where the published layout has one: its weights were changed after they were read. "
            "Change and save a model made without quantization instead; "
            "from_pretrained(..., quantization='fp8') quantises what it reads"
        )


def hull(slices: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A slice of a weight of this shape, widened to the blocks that it touches."""
    return (
        *slices[:-2],
        *(
            slice(part.start // BLOCK * BLOCK, min(-(-part.stop // BLOCK) * BLOCK, size))
            for part, size in zip(slices[-2:], shape[-2:], strict=True)
        ),
    )


def quantise_into(
    target: BlockScaled, begin: int, values: Tensor, slices: tuple[slice, ...]
) -> None:
    """Quantise what is not in FP8 yet, by the blocks of the whole weight, and write a piece of it.

    Args:
        begin, slices: as from `pieces`.
        values: what `hull(slices, ...)` cut out of the whole weight.
    """
    numbers, scale = quantise_blocks(values)
    rows, columns = (
        slice(part.start % BLOCK, part.start % BLOCK + part.stop - part.start)
        for part in slices[-2:]
    )
    keep(target, begin, numbers[..., rows, columns], scale, slices)
