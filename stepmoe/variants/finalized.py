"""An extra beside the four variants: the experts' weighted sum, too, waits for the next norm.

Pass the class where a variant's name goes. Between layers flows what `fused` leaves pending, with
the experts' rows not yet added up. The next boundary completes all of it in one kernel of
FlashInfer, where that runs (stepmoe/comm/fusion/finalize.py); else it adds the rows up and goes on
as in `fused`, bit for bit. The ledger says which, and why.
"""

from __future__ import annotations

from stepmoe.comm.fusion import FINALIZE_MAX_TOKENS, Rows, Unsummed
from stepmoe.comm.placement import PARTIAL, Placed
from stepmoe.kernels.permute import sort_by_expert
from stepmoe.variants.fused import FusedLayer


class FinalizedLayer(FusedLayer):
    """As FusedLayer, but an MoE layer's output is `Unsummed` up to FINALIZE_MAX_TOKENS.

    Attention's collective stands between two such sums, as the kernel needs it.
    """

    def routed_experts(self, hidden_states: Placed, onto: Placed | None = None) -> Placed:
        x = hidden_states.replicated("experts").tensor
        if onto is None or self.attention_dp or len(x) > FINALIZE_MAX_TOKENS:
            return super().routed_experts(hidden_states, onto)
        shared = onto.addable(self.comm.partial(x, "experts_output", self.index))
        moe = self.moe

        def leave_unsummed() -> Placed:
            topk_ids, weights = moe.gate(x, moe.router_bias)
            order = sort_by_expert(topk_ids, moe.first_expert, len(moe.down_proj.weight))
            first_half = moe.gate_up_proj.first_half(x, order, moe.limit)
            # One pass over room for every choice: they are few.
            outputs = moe.down_proj.second_half(first_half(0, topk_ids.numel()), order, 0)
            rows = Rows(outputs, order, weights)
            return Unsummed(shared.take_over(), PARTIAL, shared.group, len(x), "", rows=rows)

        return self._local("experts", leave_unsummed, f"{onto.name} + experts_output")
