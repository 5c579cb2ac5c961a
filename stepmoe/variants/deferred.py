"""Sums are linear: add shared and routed partial sums first, reduce once.

A MoE layer needs two all-reduces. It cannot be one: the norm after attention is not linear, so the
attention sum must be complete before it.
"""

from __future__ import annotations

from stepmoe.comm.placement import Placed
from stepmoe.variants.base import DecoderLayer, Step


class DeferredLayer(DecoderLayer):
    """Between layers: hidden_states and residual complete (under attention="dp": own tokens)."""

    def forward(
        self, hidden_states: Placed, residual: Placed | None, step: Step
    ) -> tuple[Placed, Placed]:
        hidden_states, residual = self.add_norm(self.input_layernorm, hidden_states, residual)
        attn_output = self.attention(hidden_states, step)
        if not self.attention_dp:
            attn_output = self.comm.all_reduce(attn_output, "post_attention_layernorm")

        hidden_states, residual = self.add_norm(
            self.post_attention_layernorm, attn_output, residual
        )
        if self.attention_dp:
            hidden_states = self.comm.all_gather(hidden_states, "mlp_input")
        if self.is_moe:
            shared_partial = self.shared_expert(hidden_states, step)
            # shared_partial + routed, both still partial: added up where the experts' rows are
            mlp_partial = self.routed_experts(hidden_states, onto=shared_partial)
        else:
            mlp_partial = self.dense_mlp(hidden_states, step)
        mlp_output = self.comm.all_reduce(mlp_partial, "mlp_output")
        if self.attention_dp:
            mlp_output = self.comm.keep_own_tokens(mlp_output, step.tokens_per_rank)
        return mlp_output, residual
