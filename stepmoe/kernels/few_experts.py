"""The routed experts of a decode step's few tokens: choice by choice, without sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version
from stepmoe.kernels.linear import linear, linear_swiglu


@gpu_version("stepmoe.kernels.few_experts_gpu")
def few_gate_up(
    x: Tensor, weight: Tensor, topk_ids: Tensor, first_expert: int, limit: float | None
) -> Tensor:
    """Gate, up and SwiGLU of every choice: tokens (T, D) to rows (T, K, F).

    The rows of experts that are not here are undefined.

    Args:
        weight: (E_local, 2F, D), gate above up, of experts first_expert, first_expert + 1, ...
        topk_ids: (T, K) int64.
        limit: of SwiGLU, None for no clamp.
    """
    rows = x.new_zeros(*topk_ids.shape, weight.shape[1] // 2)
    for token, place, expert in _here(topk_ids, first_expert, len(weight)):
        rows[token, place] = linear_swiglu(x[token : token + 1], weight[expert], limit)[0]
    return rows


@gpu_version("stepmoe.kernels.few_experts_gpu")
def few_down(
    rows: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    first_expert: int,
    onto: Tensor | None,
) -> Tensor:
    """Down, and the weighted sum of a token's choices: rows (T, K, F) to (T, D).

    Args:
        weight: (E_local, D, F).
        topk_weights: (T, K).
        onto: (T, D), the result is `onto` + the sum, and may take over its memory.
    """
    sums = topk_weights.new_zeros(len(rows), weight.shape[1])
    for token, place, expert in _here(topk_ids, first_expert, len(weight)):
        outer = linear(rows[token, place : place + 1], weight[expert])[0]
        sums[token] = sums[token] + outer * topk_weights[token, place]
    return sums.to(rows.dtype) if onto is None else onto + sums.to(rows.dtype)


def _here(topk_ids: Tensor, first_expert: int, num_local: int) -> list[list[int]]:
    """Token, place among its choices and local expert of every choice that is here."""
    local = topk_ids - first_expert
    is_here = (local >= 0) & (local < num_local)
    found: list[list[int]] = torch.cat((is_here.nonzero(), local[is_here][:, None]), 1).tolist()
    return found
