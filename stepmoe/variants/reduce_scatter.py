"""An all-reduce is a reduce-scatter and an all-gather; the norm fits between the two halves.

Each rank keeps T / tp tokens of the residual and normalises only those. The bytes are those of two
all-reduces. With attention="dp" the tokens a rank keeps are its own sequences, attention needs
neither half, and a layer needs one all_gather and one reduce_scatter.
"""

from __future__ import annotations

from stepmoe.comm.placement import Placed
from stepmoe.variants.base import DecoderLayer, Step


class ReduceScatterLayer(DecoderLayer):
    """Between layers: hidden_states and residual hold each rank's own tokens."""

    shards_residual = True

    def forward(
        self, hidden_states: Placed, residual: Placed | None, step: Step
    ) -> tuple[Placed, Placed]:
        hidden_states, residual = self.add_norm(self.input_layernorm, hidden_states, residual)
        if self.attention_dp:
            attn_output = self.attention(hidden_states, step)
        else:
            hidden_states = self.comm.all_gather(hidden_states, "attn_input")
            attn_partial = self.attention(hidden_states, step)
            attn_output = self.comm.reduce_scatter(attn_partial, step.tokens_per_rank, "o_proj")

        hidden_states, residual = self.add_norm(
            self.post_attention_layernorm, attn_output, residual
        )
        hidden_states = self.comm.all_gather(hidden_states, "mlp_input")
        if self.is_moe:
            shared_partial = self.shared_expert(hidden_states, step)
            # shared_partial + routed, both still partial: added up where the experts' rows are
            mlp_partial = self.routed_experts(hidden_states, onto=shared_partial)
        else:
            mlp_partial = self.dense_mlp(hidden_states, step)
        return self.comm.reduce_scatter(mlp_partial, step.tokens_per_rank, "mlp_output"), residual
