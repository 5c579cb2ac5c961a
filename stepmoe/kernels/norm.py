"""RMSNorm in Gemma's form, x / rms(x) * (1 + weight), alone and with the residual add in front."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version


@gpu_version("stepmoe.kernels.norm_gpu")
def gemma_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim of x (..., D), weight (D,), in float32 or wider; returns x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (1 + weight.to(wide.dtype))).to(x.dtype)


@gpu_version("stepmoe.kernels.norm_gpu")
def add_gemma_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise the sum, all (T, D). Returns (normalised, residual)."""
    residual = x + residual
    return gemma_rms_norm(residual, weight, eps), residual
