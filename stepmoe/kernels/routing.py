"""The router: float32 logits, and the choice of K experts a token with their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version


@gpu_version("stepmoe.kernels.routing_gpu")
def compute_logits(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """hidden_states (T, D) times weight (E, D), in float32 or wider: (T, E)."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.to(wide) @ weight.to(wide).T


@gpu_version("stepmoe.kernels.routing_gpu")
def choose_experts(
    logits: Tensor, bias: Tensor, top_k: int, normalises: bool, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """logits (T, E), bias (E,) to topk_ids (T, K) int64 and topk_weights (T, K) in logits' dtype.

    The bias takes part in the choice only; the chosen scores are normalised to sum 1, if asked,
    then scaled. The highest biased score comes first.
    """
    scores = logits.sigmoid()
    topk_ids = (scores + bias.to(scores.dtype)).topk(top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if normalises:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    return topk_ids, topk_weights * scaling_factor
