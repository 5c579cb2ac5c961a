"""Tokens to rows sorted by expert, and back: what surrounds the experts' grouped products.

Legend: T tokens, K experts a token, E_local experts of this rank, D hidden size. A choice is one of
the T x K pairs of a token and an expert, numbered t K + k; those this rank computes are its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version


@dataclass(frozen=True)
class RowOrder:
    """Which choice stands in which row, all of it on the device.

    Attributes:
        positions: (T, K) int32, the row of a choice; -1 where another rank holds the expert.
        choices: (T K,) int32, the choice in a row: sorted by expert, within an expert by token.
            Behind the last row stand numbers below T K without a meaning.
        ends: (E_local,) int32, expert e has the rows from ends[e - 1] up to ends[e].
    """

    positions: Tensor
    choices: Tensor
    ends: Tensor

    def ends_within(self, start: int, count: int) -> Tensor:
        """`ends` as seen by a pass over the rows start to start + count."""
        ends = self.ends - start if start else self.ends  # the first pass: a launch less
        return ends.clamp(0, count)


@gpu_version("stepmoe.kernels.sort_by_expert_gpu")
def sort_by_expert(topk_ids: Tensor, first_expert: int, num_local: int) -> RowOrder:
    """Order the choices topk_ids (T, K) of the experts first_expert to first_expert + num_local."""
    local = topk_ids.flatten() - first_expert
    is_local = (local >= 0) & (local < num_local)
    keys, choices = torch.where(is_local, local, num_local).sort(stable=True)
    ends = torch.searchsorted(keys, torch.arange(1, num_local + 1, device=keys.device))
    rows = torch.arange(len(choices), dtype=torch.int32, device=keys.device)
    positions = torch.empty_like(rows).index_copy_(0, choices, rows).masked_fill_(~is_local, -1)
    return RowOrder(positions.view(topk_ids.shape), choices.int(), ends.int())


@gpu_version("stepmoe.kernels.permute_gpu")
def permute_rows(x: Tensor, order: RowOrder, start: int, count: int) -> Tensor:
    """The inputs of the rows start to start + count, copies of tokens: (T, D) to (count, D).

    What stands behind the last row is undefined.
    """
    top_k = order.positions.shape[1]
    return x[order.choices[start : start + count] // top_k]


@gpu_version("stepmoe.kernels.permute_gpu")
def unpermute_rows(
    rows: Tensor, order: RowOrder, weights: Tensor, start: int, onto: Tensor | None
) -> Tensor:
    """Every token's weighted sum of its rows, in float32 or wider and in the order of its choices.

    Args:
        rows: (count, D), the outputs of the rows start to start + count.
        weights: (T, K).
        onto: (T, D) of the same dtype: the result is `onto + sums`, to the last bit, and may take
            over its memory. None for nothing.

    Returns:
        (T, D) in the dtype of rows.
    """
    index = order.positions - start
    in_range = (index >= 0) & (index < rows.shape[0])
    index = index.clamp(0, rows.shape[0] - 1)
    wide = torch.promote_types(rows.dtype, weights.dtype)
    total = rows.new_zeros(len(index), rows.shape[1], dtype=wide)
    for k in range(index.shape[1]):
        row = rows[index[:, k]].to(wide).masked_fill(~in_range[:, k, None], 0)
        total = total + row * weights[:, k, None]
    sums = total.to(rows.dtype)
    return sums if onto is None else onto + sums
