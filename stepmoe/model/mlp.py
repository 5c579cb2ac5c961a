"""The SwiGLU MLP that the dense layers and the shared expert have in common."""

from __future__ import annotations

from torch import Tensor, nn

from stepmoe.kernels.swiglu import clamped_swiglu
from stepmoe.model.merged import MergedLinear


class GatedMLP(nn.Module):
    """This rank's slice of a SwiGLU MLP; its output is a partial sum over the ranks.

    Args:
        hidden_size: D.
        size_local: F_local, this rank's part of the intermediate size.
        limit: SwiGLU clamp, None for none.
    """

    def __init__(self, hidden_size: int, size_local: int, limit: float | None) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(
            hidden_size, {"gate_proj": size_local, "up_proj": size_local}
        )
        self.down_proj = nn.Linear(size_local, hidden_size, bias=False)
        self.limit = limit

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) complete to (T, D) partial."""
        gate_up = self.gate_up_proj(hidden_states)
        result: Tensor = self.down_proj(clamped_swiglu(gate_up, self.limit))
        return result
