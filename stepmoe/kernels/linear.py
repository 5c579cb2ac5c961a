"""Products of tokens with a weight, of which a decode step has few tokens and many."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version
from stepmoe.kernels.swiglu import clamped_swiglu


@gpu_version("stepmoe.kernels.linear_gpu")
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K) times weight (N, K), transposed: (T, N)."""
    return F.linear(x, weight)


@gpu_version("stepmoe.kernels.linear_gpu")
def linear_swiglu(x: Tensor, weight: Tensor, limit: float | None) -> Tensor:
    """Gate and up in one weight (2F, K), gate above up, and their clamped SwiGLU: (T, K) to (T, F).

    Args:
        limit: None for no clamp.
    """
    return clamped_swiglu(F.linear(x, weight), limit)
