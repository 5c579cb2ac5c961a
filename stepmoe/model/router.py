"""Sigmoid router: experts are chosen by score + bias and weighted by the unbiased score."""

from __future__ import annotations

from torch import Tensor, nn

from stepmoe.config import Step3p5Config
from stepmoe.kernels.routing import choose_experts, compute_logits
from stepmoe.model.merged import empty_parameter


class Router(nn.Module):
    """Scores every expert for every token, in float32 or wider. Replicated: all ranks agree."""

    def __init__(self, config: Step3p5Config) -> None:
        super().__init__()
        self.weight = empty_parameter(config.num_experts, config.hidden_size)
        self.top_k = config.num_experts_per_tok
        self.scaling_factor = config.router_scaling_factor
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, hidden_states: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states (T, D), bias (E,) to topk_ids (T, K) int64 and topk_weights (T, K) float32.

        The bias takes part in the choice only; the chosen scores are normalised to sum 1, then
        scaled.
        """
        router_logits = compute_logits(hidden_states, self.weight)
        return choose_experts(
            router_logits, bias, self.top_k, self.norm_topk_prob, self.scaling_factor
        )
