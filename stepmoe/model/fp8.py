"""Linear maps and experts whose weights stay in FP8 blocks, in place of the plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepmoe.kernels.block_scale import BLOCK, FP8, BlockScaled, quantise_rows
from stepmoe.kernels.fp8_grouped import gate_up_swiglu, grouped_linear
from stepmoe.kernels.fp8_linear import fp8_linear
from stepmoe.kernels.permute import RowOrder
from stepmoe.kernels.swiglu import clamped_swiglu

Slices = tuple[slice, ...]  # of a published tensor: the part that this rank holds

#: Modules whose weights are in FP8, by their last name: all large ones of a layer. Router, norms,
#: the gate of attention's heads, embedding and head stay in the model's dtype.
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_quantised(name: str) -> bool:
    """Whether the published tensor of this name ("...q_proj.weight") is held in FP8."""
    return name.split(".")[-2] in QUANTISED


class Fp8Weights(nn.Module):
    """Published weights of the same input features, one below the other.

    Args:
        parts: which slice of its published tensor each part is, in the order in which their outputs
            stand side by side. All have the same columns, and if they are stacks the same experts.
        multiple: rows of zeros behind the last part fill the weight up to a multiple of this.
    """

    def __init__(self, parts: Mapping[str, Slices], multiple: int = 1) -> None:
        super().__init__()
        *stack, _, columns = next(iter(parts.values()))
        rows = {name: slices[-2] for name, slices in parts.items()}
        edges = [edge for part in rows.values() for edge in (part.start, part.stop)]
        self.grain = 1 if any(edge % BLOCK for edge in edges) else BLOCK
        self.rows = {name: _size(part) for name, part in rows.items()}
        self.offset, self.columns = columns.start % BLOCK, _size(columns)
        blocks = -(-(self.offset + self.columns) // BLOCK)
        lead = [_size(part) for part in stack]
        height = -(-sum(self.rows.values()) // multiple) * multiple
        self.weight = nn.Parameter(
            torch.empty(*lead, height, blocks * BLOCK, dtype=FP8), requires_grad=False
        )
        # In the memory layout of kernels/fp8_linear.py: blocks of a row padded to a multiple of 4,
        # or, with a scale for each row, the rows side by side.
        kept = (height // BLOCK, -(-blocks // 4) * 4) if self.grain == BLOCK else (blocks, height)
        self.weight_scale = nn.Parameter(torch.empty(*lead, *kept), requires_grad=False)

    @property
    def blocks(self) -> BlockScaled:
        """All parts as one weight."""
        scale = self.weight_scale if self.grain == BLOCK else self.weight_scale.mT
        return BlockScaled(self.weight.detach(), scale.detach(), self.offset, self.columns)

    def part_views(self) -> Iterator[tuple[str, BlockScaled | Tensor]]:
        """Every part by name, as a view that shares the memory."""
        first, whole = 0, self.blocks
        for name, size in self.rows.items():
            yield name, whole.narrow(first, size)
            first += size


class Fp8Linear(Fp8Weights):
    """MergedLinear and nn.Linear without bias, in FP8: (..., columns) to (..., sum of the parts).

    Args:
        plain: output features of parts that stand behind the others and stay in the model's dtype.
    """

    def __init__(self, parts: Mapping[str, Slices], plain: Mapping[str, int]) -> None:
        super().__init__(parts, multiple=16)  # of N, as kernels/fp8_linear.py says
        self.plain_rows = dict(plain)
        # Up to a multiple of 8, as MergedLinear does and for the same reason.
        height = -(-sum(plain.values()) // 8) * 8
        self.plain = nn.Parameter(torch.empty(height, self.columns)) if plain else None

    def forward(self, x: Tensor) -> Tensor:
        """Activations in the model's dtype, which are quantised on the way, and results in it."""
        output = fp8_linear(x, self.blocks)[..., : sum(self.rows.values())]
        if self.plain is None:
            return output
        others = F.linear(x, self.plain)[..., : sum(self.plain_rows.values())]
        return torch.cat((output, others), dim=-1)

    def swiglu(self, x: Tensor, limit: float | None) -> Tensor:
        """As MergedLinear.swiglu."""
        return clamped_swiglu(self(x), limit)

    def part_views(self) -> Iterator[tuple[str, BlockScaled | Tensor]]:
        """As of every Fp8Weights, and the plain parts."""
        yield from super().part_views()
        if self.plain is not None:
            sizes = list(self.plain_rows.values())
            used = self.plain.detach()[: sum(sizes)]
            yield from zip(self.plain_rows, used.split(sizes), strict=True)


class Fp8ExpertWeights(Fp8Weights):
    """ExpertWeights in FP8."""

    def first_half(
        self, x: Tensor, order: RowOrder, limit: float | None
    ) -> Callable[[int, int], Tensor]:
        """As ExpertWeights.first_half; the tokens are quantised once for all passes."""
        weight = self.blocks
        quantised = quantise_rows(x, weight.offset, weight.num_blocks)
        return lambda start, count: gate_up_swiglu(x, quantised, weight, order, start, count, limit)

    def second_half(self, rows: Tensor, order: RowOrder, start: int) -> Tensor:
        """As ExpertWeights.second_half."""
        return grouped_linear(rows, self.blocks, order, start)


def _size(part: slice) -> int:
    size: int = part.stop - part.start
    return size
