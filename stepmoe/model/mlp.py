"""The SwiGLU MLP that the dense layers and the shared expert have in common."""

from __future__ import annotations

from torch import Tensor, nn

from stepmoe.model.merged import Linear, MergedLinear


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
        self.down_proj = Linear(size_local, hidden_size)
        self.limit = limit

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) complete to (T, D) partial."""
        result: Tensor = self.down_proj(self.gate_up_proj.swiglu(hidden_states, self.limit))
        return result
