"""Numbers in FP8 with a scale for each block, and the plain arithmetic of them.

A weight is published as float8_e4m3 numbers (sign, 4 bits of exponent, 3 of mantissa; largest 448)
and a float32 scale for each 128 x 128 block, at the edges smaller, by which its numbers are to be
multiplied. Activations get a scale for each token and 128 columns as they come.

A rank's slice may begin inside a block. Its numbers and scales stay the published ones, whatever
the slice: columns of zeros are put before and behind it until it ends where blocks end, and if rows
are cut inside a block, every row gets its block's scale. So slicing adds no error. (Cut otherwise,
sglang refuses the shared expert of Step-3.5-Flash at tp=4, where it has 320 of 1280 rows:
github.com/sgl-project/sglang/issues/26107. To quantise a slice anew would round its numbers twice.)
Activations are quantised by the rank that has them: where a block of columns is cut, each part gets
a scale of its own, so that tp=1 and tp=8 differ there by a rounding of FP8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version

BLOCK = 128
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn
TINIEST_SCALE = 1e-30  # of a block of zeros, which has no scale of its own


@dataclass(frozen=True)
class BlockScaled:
    """A weight, or a stack of them: what F.linear and grouped_linear take, in FP8.

    Legend: N output features, `columns` input features, L blocks of 128 columns that they touch.

    Attributes:
        weight: (..., N, 128 L) float8_e4m3fn, zeros outside the columns that it has.
        scale: (..., N / grain, at least L) float32; what stands behind column L is padding. The
            memory layout is the one that cuBLAS needs, see fp8_linear.py.
        offset: columns of zeros before the first.
        columns: input features.
    """

    weight: Tensor
    scale: Tensor
    offset: int
    columns: int

    @property
    def num_blocks(self) -> int:
        """L."""
        return self.weight.shape[-1] // BLOCK

    @property
    def grain(self) -> int:
        """Rows that share a scale: 128, or 1 where the slice cuts blocks."""
        return self.weight.shape[-2] // self.scale.shape[-2]

    def narrow(self, first_row: int, rows: int) -> BlockScaled:
        """Some of its rows, in the same memory; first_row and rows are multiples of `grain`."""
        return BlockScaled(
            self.weight.narrow(-2, first_row, rows),
            self.scale.narrow(-2, first_row // self.grain, rows // self.grain),
            self.offset,
            self.columns,
        )

    def multiplied_out(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for: (..., N, columns), each rounded to dtype once."""
        wide = torch.promote_types(dtype, torch.float32)
        scale = self.scale[..., : self.num_blocks].to(wide).repeat_interleave(self.grain, -2)
        numbers = self.weight.to(wide).unflatten(-1, (self.num_blocks, BLOCK)) * scale[..., None]
        return numbers.flatten(-2).narrow(-1, self.offset, self.columns).to(dtype)


@dataclass(frozen=True)
class ScaledRows:
    """Activations with a scale for each row and block of 128 columns.

    Attributes:
        numbers: (R', 128 L) float8_e4m3fn; R' is R rounded up to a multiple of 4, as cuBLAS needs.
        scale: (R', L) float32, its columns contiguous: strides (1, R').
    """

    numbers: Tensor
    scale: Tensor

    def multiplied_out(self, rows: int, offset: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(rows, columns) of dtype, without the zeros and rows that were put around them."""
        wide = torch.promote_types(dtype, torch.float32)
        blocks = self.numbers.to(wide).unflatten(-1, (-1, BLOCK)) * self.scale.to(wide)[..., None]
        return blocks.flatten(-2)[:rows, offset : offset + columns].to(dtype)


@gpu_version("stepmoe.kernels.block_scale_gpu")
def quantise_rows(
    x: Tensor, offset: int, blocks: int, num_rows: Tensor | None = None
) -> ScaledRows:
    """Activations x (R, C) in FP8: the largest of every 128 columns of a row becomes 448.

    Args:
        offset: columns of zeros to put before the first, so that blocks end where the weight's do.
        blocks: L, blocks of a row with zeros before and behind.
        num_rows: int32 of one entry: rows from here on hold nothing and may be left undefined.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = x.new_zeros(-(-len(x) // 4) * 4, blocks * BLOCK, dtype=wide)
    padded[: len(x), offset : offset + x.shape[1]] = x
    by_block = padded.view(len(padded), blocks, BLOCK)
    scale = _scale(by_block.abs().amax(-1).float())
    numbers = (by_block / scale[..., None]).to(FP8)
    return ScaledRows(numbers.view(padded.shape), scale.t().contiguous().t())


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (..., N, C) in FP8, as published: (float8_e4m3fn, scales of its 128 x 128 blocks).

    The largest of a block becomes 448. Scales are float32 (..., ceil(N / 128), ceil(C / 128)).
    """
    rows, columns = (-(-size // BLOCK) * BLOCK for size in weight.shape[-2:])
    padded = weight.new_zeros(*weight.shape[:-2], rows, columns, dtype=torch.float32)
    padded[..., : weight.shape[-2], : weight.shape[-1]] = weight
    by_block = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = _scale(by_block.abs().amax((-3, -1)))
    numbers = (by_block / scale[..., None, :, None]).to(FP8)
    whole = numbers.flatten(-4, -3).flatten(-2)
    return whole[..., : weight.shape[-2], : weight.shape[-1]], scale


def _scale(largest: Tensor) -> Tensor:
    """The scales with which the largest numbers of the blocks, float32, become 448."""
    # By a tensor, because CUDA divides by a number as it multiplies by the number's inverse, which
    # is rounded: every other scale would be another than on a CPU, by its last bit.
    return (largest / torch.full_like(largest, LARGEST)).clamp(min=TINIEST_SCALE)
