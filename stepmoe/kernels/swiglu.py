"""Clamped SwiGLU on the output of a merged gate and up projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version


@gpu_version("stepmoe.kernels.swiglu_gpu")
def clamped_swiglu(gate_up: Tensor, limit: float | None, num_rows: Tensor | None = None) -> Tensor:
    """silu(gate).clamp(max=limit) * up.clamp(-limit, limit): (R, 2F), gate left of up, to (R, F).

    Args:
        limit: None for no clamp.
        num_rows: int32 of one entry: rows from here on hold nothing and may be left undefined.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    if limit is not None:
        activated, up = activated.clamp(max=limit), up.clamp(-limit, limit)
    return activated * up
