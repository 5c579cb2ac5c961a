"""Router and routed experts: one rank's experts, or its slice of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stepmoe.config import LayerConfig, Step3p5Config
from stepmoe.kernels import dispatch
from stepmoe.kernels.dispatch import takes_kernel
from stepmoe.kernels.few_experts import few_down, few_gate_up
from stepmoe.kernels.grouped import gate_up_swiglu, grouped_linear
from stepmoe.kernels.permute import RowOrder, sort_by_expert, unpermute_rows
from stepmoe.model.merged import empty_parameter
from stepmoe.model.router import Router
from stepmoe.parallel import ParallelConfig

TILE = 128  # rows
FEWEST_CHOICES = 32  # 4 tokens: up to here every choice reads its own weights
FEW_CHOICES = 4096  # their rows take 32 MiB at hidden size 4096 in bfloat16


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
        self.gate_up_proj = ExpertWeights(
            experts_local, config.hidden_size, {"gate_proj": size_local, "up_proj": size_local}
        )
        self.down_proj = ExpertWeights(experts_local, size_local, {"down_proj": config.hidden_size})
        self.first_expert = rank // parallel.moe_tp * experts_local
        self.ep = parallel.ep
        self.limit = layer.swiglu_limit

    def forward(self, hidden_states: Tensor, onto: Tensor | None = None) -> Tensor:
        """(T, D) complete to (T, D) partial; `onto` as in apply_experts."""
        topk_ids, topk_weights = self.gate(hidden_states, self.router_bias)
        return self.apply_experts(hidden_states, topk_ids, topk_weights, onto)

    def apply_experts(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        onto: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of the local experts: (T, D), (T, K) int64, (T, K) to (T, D) partial.

        Rows are sorted by expert so that each expert is one block of a grouped matrix product.

        Args:
            onto: (T, D), the result is `onto + routed`, and may take over its memory.
        """
        if self._takes_few_experts(hidden_states, topk_ids):
            up, down, first = self.gate_up_proj.weight, self.down_proj.weight, self.first_expert
            rows = few_gate_up(hidden_states, up, topk_ids, first, self.limit)
            return few_down(rows, down, topk_ids, topk_weights, first, onto)
        order = sort_by_expert(topk_ids, self.first_expert, len(self.down_proj.weight))
        starts = passes(order, self.ep)
        first_half = self.gate_up_proj.first_half(hidden_states, order, self.limit)
        for start in starts:
            onto = unpermute_rows(
                # Named nowhere: each half's rows are gone before the next step needs memory.
                self.down_proj.second_half(first_half(start, starts.step), order, start),
                order,
                topk_weights,
                start,
                onto,
            )
        return hidden_states.new_zeros(hidden_states.shape) if onto is None else onto

    def _takes_few_experts(self, hidden_states: Tensor, topk_ids: Tensor) -> bool:
        """Few tokens on a GPU, in 16 bits: two kernels in place of four.

        In float32 nothing is rounded between the sum over choices and its addition to `onto`, and
        the compiler may fuse the two: not `onto + routed` to the last bit.
        """
        weights = self.gate_up_proj.weight, self.down_proj.weight
        return (
            0 < topk_ids.numel() <= FEWEST_CHOICES
            and hidden_states.dtype in (torch.bfloat16, torch.float16)
            and isinstance(self.gate_up_proj, ExpertWeights)
            and takes_kernel(hidden_states, topk_ids, *weights)
        )


def passes(order: RowOrder, ep: int) -> range:
    """First row of every pass over this rank's rows; the step is how many a pass has room for.

    On a GPU the host does not wait to learn how many rows there are. The first pass has room for a
    third more than the average; the later ones, up to all choices of all tokens, find no row and
    end at once unless the routing is badly out of balance. So memory is bounded, and however the
    tokens are spread, none is dropped. Where all choices are few, one pass has room for them.
    A third: with ep=4 that makes 3 passes, where an eighth would make 4, of six launches each.
    Rooms are whole tiles, so that no pass needs kernels compiled for odd numbers of its own.
    """
    if not dispatch.on_gpu(order.ends):
        num_rows = int(order.ends[-1])
        return range(0, num_rows, max(1, num_rows))
    num_choices = order.positions.numel()
    if ep == 1 or num_choices <= FEW_CHOICES:
        return range(0, num_choices, max(1, num_choices))
    return range(0, num_choices, -(-4 * num_choices // (3 * ep * TILE)) * TILE)


class ExpertWeights(nn.Module):
    """One matrix an expert: weight (E_local, out, in).

    Args:
        parts: the published tensors it holds and the output features of each, as in MergedLinear.
    """

    def __init__(self, num_experts: int, in_features: int, parts: Mapping[str, int]) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.weight = empty_parameter(num_experts, sum(parts.values()), in_features)

    def first_half(
        self, x: Tensor, order: RowOrder, limit: float | None
    ) -> Callable[[int, int], Tensor]:
        """What computes a pass over the rows of `order`: gate, up and SwiGLU of tokens x (T, D).

        Called with a pass's first row and number of rows it gives (rows, F).
        """
        return lambda start, count: gate_up_swiglu(x, self.weight, order, start, count, limit)

    def second_half(self, rows: Tensor, order: RowOrder, start: int) -> Tensor:
        """Down: (rows, F) from `start` on to (rows, D)."""
        return grouped_linear(rows, self.weight, order, start)
