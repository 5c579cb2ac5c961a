"""The experts' matrix products: one matrix an expert, applied to the rows sorted by expert.

Legend: as in permute.py; N output features, F intermediate size of this rank's part of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version
from stepmoe.kernels.permute import RowOrder, permute_rows
from stepmoe.kernels.swiglu import clamped_swiglu


@gpu_version("stepmoe.kernels.grouped_gpu")
def gate_up_swiglu(
    x: Tensor, weight: Tensor, order: RowOrder, start: int, count: int, limit: float | None
) -> Tensor:
    """First half of the experts: x (T, D), weight (E_local, 2F, D) to (count, F).

    Computes the rows start to start + count of `order`; undefined behind the last row.
    """
    rows = permute_rows(x, order, start, count)
    return clamped_swiglu(grouped_linear(rows, weight, order, start), limit)


@gpu_version("stepmoe.kernels.grouped_gpu")
def grouped_linear(rows: Tensor, weight: Tensor, order: RowOrder, start: int) -> Tensor:
    """rows (count, in) times each its expert's weight (E_local, N, in), transposed: (count, N).

    The rows are those from start on of `order`; undefined behind the last. torch's grouped_mm
    wherever it exists; float64, the oracle's dtype, has none and takes a loop.
    """
    ends = order.ends_within(start, len(rows))
    if rows.dtype is not torch.float64:
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    outputs = rows.new_zeros(len(rows), weight.shape[1])
    begin = 0
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        outputs[begin:end] = rows[begin:end] @ matrix.T
        begin = end
    return outputs
