"""Router and routed experts: one rank's experts, or its slice of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepmoe.config import LayerConfig, Step3p5Config
from stepmoe.model.merged import empty_parameter
from stepmoe.model.mlp import clamped_swiglu
from stepmoe.model.router import Router
from stepmoe.parallel import ParallelConfig


class RoutedExperts(nn.Module):
    """The router, and this rank's part of the experts; its output is a partial sum over all ranks.

    Every rank routes every token (the router is replicated) and computes what its own experts, or
    its slice of their intermediate size, contribute; the other experts contribute zeros here.
    """

    def __init__(
        self, config: Step3p5Config, layer: LayerConfig, parallel: ParallelConfig, rank: int
    ) -> None:
        super().__init__()
        experts_local = config.num_experts // parallel.ep
        size_local = config.moe_intermediate_size // parallel.moe_tp
        self.gate = Router(config)
        self.router_bias = empty_parameter(config.num_experts)
        self.gate_up_proj = GroupedLinear(
            experts_local, config.hidden_size, {"gate_proj": size_local, "up_proj": size_local}
        )
        self.down_proj = GroupedLinear(experts_local, size_local, {"down_proj": config.hidden_size})
        self.first_expert = rank // parallel.moe_tp * experts_local
        self.limit = layer.swiglu_limit

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) complete to (T, D) partial."""
        topk_ids, topk_weights = self.gate(hidden_states, self.router_bias)
        return self.apply_experts(hidden_states, topk_ids, topk_weights)

    def apply_experts(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """Weighted sum of the local experts: (T, D), (T, K) int64, (T, K) to (T, D) partial.

        Rows are sorted by expert so that each expert is one block of a grouped matrix product; rows
        of experts that other ranks hold are sorted behind the last block, which leaves them
        unwritten, and are then set to zero. Nothing here waits for the device.
        """
        num_tokens, top_k = topk_ids.shape
        experts_local = self.gate_up_proj.weight.shape[0]
        local_ids = topk_ids.flatten() - self.first_expert
        is_local = (local_ids >= 0) & (local_ids < experts_local)
        sorted_ids, order = torch.where(is_local, local_ids, experts_local).sort(stable=True)
        ends = torch.arange(1, experts_local + 1, device=sorted_ids.device)
        offsets = torch.searchsorted(sorted_ids, ends).to(torch.int32)

        rows = hidden_states[order // top_k]
        gate, up = self.gate_up_proj(rows, offsets).chunk(2, dim=-1)
        outputs = self.down_proj(clamped_swiglu(gate, up, self.limit), offsets)

        by_token = torch.empty_like(outputs).index_copy_(0, order, outputs)
        by_token = by_token.masked_fill_(~is_local[:, None], 0).view(num_tokens, top_k, -1)
        weighted = by_token.to(topk_weights.dtype) * topk_weights[..., None]
        return weighted.sum(dim=1).to(hidden_states.dtype)


class GroupedLinear(nn.Module):
    """One matrix an expert, weight (E_local, out, in), applied to rows sorted by expert.

    Args:
        parts: the published tensors it holds and the output features of each, as in MergedLinear.
    """

    def __init__(self, num_experts: int, in_features: int, parts: Mapping[str, int]) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.weight = empty_parameter(num_experts, sum(parts.values()), in_features)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Apply expert e to rows offsets[e-1]:offsets[e] of (R, in); offsets (E_local,) int32.

        Rows behind the last offset are left undefined. torch's grouped_mm wherever it exists;
        float64, the oracle's dtype, has none and takes a loop.
        """
        if rows.dtype is not torch.float64:
            return F.grouped_mm(rows, self.weight.transpose(-2, -1), offs=offsets)
        outputs = rows.new_zeros(rows.shape[0], self.weight.shape[1])
        start = 0
        for weight, end in zip(self.weight, offsets.tolist(), strict=True):
            outputs[start:end] = rows[start:end] @ weight.T
            start = end
        return outputs
