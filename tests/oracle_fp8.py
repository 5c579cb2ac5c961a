"""FP8 as the judge sees it: loops over rows and blocks, in float64, nothing of stepmoe's.

`Weight` takes a tensor's place in oracle.forward: x @ weight.T then quantises x on the way.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 weight, scales), block by block: the largest entry of a block becomes 448."""
    size = (*weight.shape[:-2], *(-(-n // 128) for n in weight.shape[-2:]))
    scales, stored = torch.empty(size), torch.empty(weight.shape, dtype=FP8)
    for row, column in itertools.product(range(size[-2]), range(size[-1])):
        at = (
            ...,
            slice(row * 128, row * 128 + 128),
            slice(column * 128, column * 128 + 128),
        )
        scale = weight[at].abs().amax((-2, -1)) / 448
        scales[..., row, column] = scale
        stored[at] = (weight[at] / scale[..., None, None]).to(FP8)
    return stored, scales


def multiplied_out(stored: Tensor, scales: Tensor) -> Tensor:
    """The numbers that a published FP8 weight stands for, in float64."""
    exact = stored.double()
    for row, column in itertools.product(range(scales.shape[-2]), range(scales.shape[-1])):
        block = exact[..., row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
        block *= scales[..., row, column, None, None].double()
    return exact


def quantised_activations(x: Tensor, edges: list[int]) -> Tensor:
    """What FP8 numbers and scales stand for in place of x (R, C), float64.

    Divided in x's own dtype: to divide otherwise may decide a tie the other way.

    Args:
        edges: where blocks begin and end.
    """
    result = torch.empty(x.shape, dtype=torch.float64)
    for row, (start, stop) in itertools.product(range(len(x)), itertools.pairwise(edges)):
        block = x[row, start:stop]
        scale = block.abs().max().float() / 448
        numbers = (block / scale).to(FP8).double()
        result[row, start:stop] = numbers * scale.double() if scale else 0
    return result


class Weight:
    """Numbers (..., N, C) in float64, by which quantised activations are multiplied.

    Args:
        ways: ranks that share the columns; each quantises its own part of the activations.
    """

    def __init__(self, numbers: Tensor, ways: int = 1) -> None:
        self.numbers, self.ways = numbers, ways

    def double(self) -> Weight:
        return self

    def __getitem__(self, expert: int) -> Weight:
        return Weight(self.numbers[expert], self.ways)

    @property
    def T(self) -> Weight:
        return self

    def __rmatmul__(self, x: Tensor) -> Tensor:
        size = self.numbers.shape[-1]
        cuts = range(0, size + 1, size // self.ways)
        edges = sorted({*range(0, size, 128), *cuts})
        rows = quantised_activations(x.reshape(-1, size), edges)
        return (rows @ self.numbers.T).view(*x.shape[:-1], -1)


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    recipe_a: object,
    scale_b: Tensor,
    recipe_b: object,
    output_dtype: torch.dtype,
) -> Tensor:
    """torch's function of this name as aten/src/ATen/native/cuda/ScaledBlas.cpp documents it.

    Refuses what that refuses, and reads the scales where cuBLAS reads them.
    """
    kinds = torch.nn.functional.ScalingType
    (rows, inner), columns = mat_a.shape, mat_b.shape[1]
    blocks, padded = -(-inner // 128), -(-inner // 512) * 4
    assert mat_a.dtype == mat_b.dtype == FP8
    assert mat_a.is_contiguous()
    assert mat_b.t().is_contiguous()
    assert rows % 4 == inner % 16 == columns % 16 == 0
    assert scale_a.data_ptr() % 16 == scale_b.data_ptr() % 16 == 0
    assert recipe_a == kinds.BlockWise1x128
    assert scale_a.shape == (rows, blocks)
    assert scale_a.stride(0) == 1
    assert blocks == 1 or scale_a.stride(1) == rows
    if recipe_b == kinds.BlockWise1x128:
        assert scale_b.shape == (columns, blocks)
        assert scale_b.stride(0) == 1
        assert blocks == 1 or scale_b.stride(1) == columns
    else:
        assert recipe_b == kinds.BlockWise128x128
        assert scale_b.shape == (padded, -(-columns // 128))
        assert scale_b.stride(0) == 1
        assert scale_b.shape[1] == 1 or scale_b.stride(1) == padded
        scale_b = scale_b.t().repeat_interleave(128, 0)[:columns]
    total = torch.zeros(rows, columns, dtype=torch.float64)
    for block in range(blocks):
        at = slice(block * 128, block * 128 + 128)
        product = mat_a[:, at].double() @ mat_b[at].double()
        total += product * scale_a[:, block, None].double() * scale_b[:, block].double()
    return total.to(output_dtype)
