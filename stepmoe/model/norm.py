"""The norm of every Step3p5 layer: Gemma's 1 + weight, in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepmoe.kernels.norm import gemma_rms_norm


class GemmaRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last dim, which has `size` entries."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D)."""
        return gemma_rms_norm(x, self.weight, self.eps)
