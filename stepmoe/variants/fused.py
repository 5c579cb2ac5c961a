"""All-reduce, residual add and norm become one operation; the MoE sum waits for the next norm.

A layer returns its MLP output as a partial sum. The next layer's first norm completes it; the last
layer has no next norm in the stack, so the stack flushes it with a plain all-reduce.
"""

from __future__ import annotations

from stepmoe.comm.ledger import note
from stepmoe.comm.placement import Placed
from stepmoe.variants.base import Step
from stepmoe.variants.deferred import DeferredLayer

WHY_NOT_UNDER_DP = (
    "fused: attention='dp' shards the residual, so no all-reduce stands directly before a norm; "
    "the deferred path runs instead (sglang, too, does not fuse under DP attention)"
)


class FusedLayer(DeferredLayer):
    """Between layers: hidden_states partial (complete before the first), residual complete."""

    def forward(
        self, hidden_states: Placed, residual: Placed | None, step: Step
    ) -> tuple[Placed, Placed]:
        if self.attention_dp:
            note(WHY_NOT_UNDER_DP)
            return super().forward(hidden_states, residual, step)

        if residual is None:  # the embedding: nothing is pending
            hidden_states, residual = self.add_norm(self.input_layernorm, hidden_states, residual)
        else:
            norm = self.input_layernorm
            hidden_states, residual = self.comm.all_reduce_add_rms_norm(
                hidden_states, residual, norm.weight, norm.eps, "input_layernorm"
            )
        attn_partial = self.attention(hidden_states, step)

        norm = self.post_attention_layernorm
        hidden_states, residual = self.comm.all_reduce_add_rms_norm(
            attn_partial, residual, norm.weight, norm.eps, "post_attention_layernorm"
        )
        if self.is_moe:
            shared_partial = self.shared_expert(hidden_states, step)
            # shared_partial + routed, both still partial: added up where the experts' rows are
            return self.routed_experts(hidden_states, onto=shared_partial), residual
        return self.dense_mlp(hidden_states, step), residual
