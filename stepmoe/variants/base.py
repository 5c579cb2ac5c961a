"""What all variants share: the weights of a decoder layer, and its sub-layers with placements.

Nothing in this file communicates, except for `flush`, which ends the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from stepmoe.capture import Capture
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.ledger import Entry, record
from stepmoe.comm.placement import Placed
from stepmoe.config import Step3p5Config
from stepmoe.errors import PlacementError
from stepmoe.kernels.dispatch import takes_kernel
from stepmoe.kernels.norm import add_gemma_rms_norm
from stepmoe.model.attention import Attention
from stepmoe.model.experts import RoutedExperts
from stepmoe.model.kv_cache import KVCache
from stepmoe.model.mlp import GatedMLP
from stepmoe.model.norm import GemmaRMSNorm
from stepmoe.parallel import ParallelConfig


@dataclass(frozen=True)
class Step:
    """One forward pass, as every layer sees it.

    Attributes:
        batch: sequences that this rank's attention works on (its own under attention="dp").
        length: new tokens of each sequence.
        start: position of the first of them.
        tokens_per_rank: rows each rank holds where tokens are sharded, padding included.
        cache: keys and values of the tokens before `start`; None for a plain prefill.
        capture: receives intermediate values; None records nothing and sends nothing.
    """

    batch: int
    length: int
    start: int
    tokens_per_rank: int
    cache: KVCache | None = None
    capture: Capture | None = None


def expect_boundary(layer: DecoderLayer, hidden_states: object, residual: object) -> None:
    """Raise PlacementError unless a layer returned what the next one takes."""
    for name, value in (("hidden_states", hidden_states), ("residual", residual)):
        if not isinstance(value, Placed):
            raise PlacementError(
                f"layer {layer.index}, {name}: {type(layer).__name__}.forward returned "
                f"{type(value).__name__}, not a Placed: return (hidden_states, residual)"
            )


class DecoderLayer(nn.Module):
    """One decoder layer's share of the weights. A variant adds `forward`.

    forward(hidden_states, residual, step) takes and returns what flows between layers: the output
    of the last sub-layer, not yet added, and the residual stream (None before the first layer).
    """

    shards_residual = False  # whether each rank keeps only its own tokens between sub-layers

    def __init__(
        self, config: Step3p5Config, parallel: ParallelConfig, index: int, comm: Communicator
    ) -> None:
        super().__init__()
        layer = config.layer(index)
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.index, self.is_moe, self.comm = index, layer.is_moe, comm
        self.attention_dp = parallel.attention == "dp"
        self.input_layernorm = GemmaRMSNorm(hidden_size, eps)
        self.post_attention_layernorm = GemmaRMSNorm(hidden_size, eps)
        self.self_attn = Attention(layer, hidden_size, eps, parallel.attention_tp)
        if layer.is_moe:
            size_local = config.share_expert_dim // parallel.tp
            self.moe = RoutedExperts(config, layer, parallel, comm.group.index)
            self.share_expert = GatedMLP(hidden_size, size_local, layer.swiglu_limit_shared)
        else:
            # One list for both, as in vLLM; it is 0 (no clamp) on the published dense layers.
            size_local = config.intermediate_size // parallel.tp
            self.mlp = GatedMLP(hidden_size, size_local, layer.swiglu_limit_shared)

    def forward(
        self, hidden_states: Placed, residual: Placed | None, step: Step
    ) -> tuple[Placed, Placed]:
        raise NotImplementedError("a variant defines forward")

    def flush(self, hidden_states: Placed) -> Placed:
        """Complete the sum that the last layer left pending, if it did."""
        return (
            self.comm.all_reduce(hidden_states, "flush")
            if hidden_states.is_partial
            else hidden_states
        )

    def add_norm(
        self, norm: GemmaRMSNorm, hidden_states: Placed, residual: Placed | None
    ) -> tuple[Placed, Placed]:
        """Add to the residual and normalise, both complete. Returns (normalised, residual).

        Both inputs are taken over: the layer would hold them to its end, and needs only the sum.
        """
        hidden_states.complete("the norm")
        site = next((name for name, own in self.named_children() if own is norm), "final_norm")
        if residual is None:
            total = hidden_states.with_(hidden_states.take_over(), name="residual")
        elif takes_kernel(hidden_states.tensor, residual.tensor, norm.weight):
            return self._add_norm_in_one_kernel(norm, hidden_states, residual, site)
        else:
            total = self._local("add", lambda: hidden_states + residual, "residual", site)
            hidden_states.take_over()
            residual.take_over()
        normed = self._local("norm", lambda: total.with_(norm(total.tensor)), "hidden_states", site)
        return normed, total

    def _add_norm_in_one_kernel(
        self, norm: GemmaRMSNorm, hidden_states: Placed, residual: Placed, site: str
    ) -> tuple[Placed, Placed]:
        """The same on a GPU. The ledger still has two steps; the first takes the time."""
        made: list[Tensor] = []

        def add_and_norm() -> Placed:
            left, right = hidden_states.addable(residual).take_over(), residual.take_over()
            made.extend(add_gemma_rms_norm(left, right, norm.weight, norm.eps))
            return hidden_states.with_(made[1])

        total = self._local("add", add_and_norm, "residual", site, "with the norm in one kernel")
        normed = self._local(
            "norm", lambda: total.with_(made[0]), "hidden_states", site, "in the kernel of the add"
        )
        return normed, total

    def attention(self, hidden_states: Placed, step: Step) -> Placed:
        """Attention up to o_proj: partial over the ranks that share the heads, or, under
        attention="dp", the complete output of this rank's own tokens."""
        if self.attention_dp:
            hidden_states.complete("attention")
        else:
            hidden_states.replicated("attention")
        self._capture(step, "attn_input", hidden_states)
        cache = step.cache.layers[self.index] if step.cache else None
        num_own = step.batch * step.length  # without the padding that evens out the ranks

        def attend() -> Placed:
            x = hidden_states.tensor
            if num_own == x.shape[0]:
                output = self.self_attn(x, step.batch, step.start, cache)
            else:  # padding, or no sequence at all
                output = x.new_zeros(x.shape)
                if step.batch:
                    output[:num_own] = self.self_attn(x[:num_own], step.batch, step.start, cache)
            if self.attention_dp:
                return hidden_states.with_(output)
            return self.comm.partial(output, "", self.index)

        attn_output = self._local("attention", attend, "attn_output")
        self._capture(step, "attn_output", attn_output)
        return attn_output

    def dense_mlp(self, hidden_states: Placed, step: Step) -> Placed:
        """The dense MLP up to down_proj: partial."""
        self._capture(step, "mlp_input", hidden_states)
        return self._partial("mlp", self.mlp, hidden_states)

    def shared_expert(self, hidden_states: Placed, step: Step) -> Placed:
        """The shared expert up to down_proj: partial."""
        self._capture(step, "mlp_input", hidden_states)
        return self._partial("share_expert", self.share_expert, hidden_states)

    def routed_experts(self, hidden_states: Placed, onto: Placed | None = None) -> Placed:
        """Router and the top-k weighted sum of this rank's experts: partial.

        Args:
            onto: another partial sum. The result is then `onto + routed`, to the last bit, and
                takes the place of `onto`: the addition is no step and no tensor of its own.
        """
        if onto is None:
            return self._partial("experts", self.moe, hidden_states)
        routed = self.comm.partial(hidden_states.tensor, "experts_output", self.index)
        addend = onto.addable(routed)

        def add_up(x: Tensor) -> Tensor:
            return self.moe(x, addend.take_over())

        total = self._partial("experts", add_up, hidden_states)
        total.name = f"{onto.name} + {routed.name}"
        return total

    def _partial(self, op: str, module: Callable[[Tensor], Tensor], x: Placed) -> Placed:
        x.replicated(op)
        return self._local(
            op, lambda: self.comm.partial(module(x.tensor), "", self.index), f"{op}_output"
        )

    def _local(
        self,
        op: str,
        compute: Callable[[], Placed],
        name: str,
        site: str = "",
        implementation: str = "",
    ) -> Placed:
        """Compute, name the result, and write the step to an open ledger."""
        layer = None if site == "final_norm" else self.index  # the last layer lends its add_norm
        entry = Entry(
            op=op,
            kind="local",
            layer=layer,
            site=site,
            tensor=name,
            implementation=implementation,
        )
        with record(entry, self.input_layernorm.weight.device):
            result = compute()
            result.name, result.layer = name, self.index
            entry.placement = result.placement.value
        return result

    def _capture(self, step: Step, name: str, value: Placed) -> None:
        if step.capture is not None:
            step.capture.record(self.comm, self.index, name, value)
