"""The operations of one MoE layer on one rank, each with the least time that it can take.

Finer than roofline.py, which keeps everything between two matrix products on the chip: here every
operation that runs as a kernel of its own reads its inputs and writes its outputs once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepmoe.config import Step3p5Config
from stepmoe.parallel import ParallelConfig
from stepmoe.roofline import SubLayer, seen


@dataclass(frozen=True)
class Work:
    """One step of one layer, as one rank has it.

    Attributes:
        layer: whose attention type and heads.
        batch, length: sequences and the new tokens of each.
        context: positions that a sequence's last token sees, itself included.
        rows: choices of this rank's experts, over all tokens.
        experts: how many of this rank's experts were chosen at all.
        tokens_here: tokens that chose at least one of them.
        adds_shared: whether the rows are added to the shared expert's partial sum, as in every
            variant but three_all_reduces.
    """

    config: Step3p5Config
    layer: int
    parallel: ParallelConfig
    batch: int
    length: int
    context: int
    rows: float
    experts: float
    tokens_here: float
    dtype: torch.dtype = torch.bfloat16
    adds_shared: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.length


#: What the profiler calls each operation: the names of dispatched functions and of modules, the
#: outer before the inner where one calls the other.
RANGES: dict[str, tuple[str, ...]] = {
    "add + norm": ("add_gemma_rms_norm",),
    "q, k, v, gate projection": ("qkvg_proj/linear",),
    "q/k norm, rotary": ("qk_norm_rotary",),
    "attention": ("prefill_attention", "decode_attention"),
    "o_proj": ("o_proj/linear",),
    "router logits": ("compute_logits",),
    "choice of experts": ("choose_experts",),
    "shared expert: gate, up": ("linear_swiglu",),
    "shared expert: SwiGLU": ("linear_swiglu/clamped_swiglu",),
    "shared expert: down": ("down_proj/linear",),
    "sort by expert": ("sort_by_expert",),
    "permute": ("gate_up_swiglu/permute_rows",),
    "experts: gate, up": ("gate_up_swiglu", "gate_up_swiglu/grouped_linear", "few_gate_up"),
    "experts: SwiGLU": ("gate_up_swiglu/clamped_swiglu",),
    "experts: down": ("grouped_linear", "few_down"),
    "un-permute": ("unpermute_rows",),
}


def operations(work: Work) -> list[SubLayer]:
    """The operations of RANGES, in its order."""
    return [*_attention(work), *_router(work), *_shared_expert(work), *_experts(work)]


def unavoidable_bytes(work: Work) -> float:
    """Activations that exist together when the experts' rows are summed: fewest bytes.

    The residual, the shared expert's partial sum, the outputs of this rank's rows, and the result.
    """
    return (3 * work.tokens + work.rows) * work.config.hidden_size * work.dtype.itemsize


def _attention(work: Work) -> list[SubLayer]:
    config, size, tokens = work.config, work.dtype.itemsize, work.tokens
    layer, hidden = config.layer(work.layer), config.hidden_size
    heads = layer.num_heads // work.parallel.attention_tp
    kv_heads = max(1, layer.num_kv_heads // work.parallel.attention_tp)
    query, keys = heads * layer.head_dim, kv_heads * layer.head_dim
    is_cached = work.context > work.length
    pairs = work.batch * seen(work.length, work.context, layer.sliding_window)
    read = min(work.context, (layer.sliding_window or work.context) + work.length - 1)
    rotated = query + keys + (keys if is_cached else 0)  # a cache takes the values as well
    return [
        # Two in a layer: two tensors in, two out, each.
        SubLayer("add + norm", 20 * tokens * hidden, 0, 8 * tokens * hidden * size),
        _product("q, k, v, gate projection", tokens, hidden, query + 2 * keys + heads, size=size),
        SubLayer("q/k norm, rotary", 10 * tokens * rotated, 0, 2 * tokens * rotated * size),
        SubLayer(
            "attention",
            4 * pairs * query,
            work.batch * read * 2 * keys * size,
            tokens * (2 * query + heads) * size,
        ),
        _product("o_proj", tokens, query, hidden, size=size),
    ]


def _router(work: Work) -> list[SubLayer]:
    config, tokens, size = work.config, work.tokens, work.dtype.itemsize
    experts, choices = config.num_experts, tokens * config.num_experts_per_tok
    weight = experts * config.hidden_size
    return [
        SubLayer(  # float32 out
            "router logits",
            2 * tokens * weight,
            weight * size,
            tokens * (config.hidden_size * size + 4 * experts),
        ),
        # Out: an int64 and a float32 for each choice.
        SubLayer("choice of experts", 8 * tokens * experts, 0, 4 * tokens * experts + 12 * choices),
    ]


def _shared_expert(work: Work) -> list[SubLayer]:
    hidden, tokens, size = work.config.hidden_size, work.tokens, work.dtype.itemsize
    inner = work.config.share_expert_dim // work.parallel.tp
    return [
        _product("shared expert: gate, up", tokens, hidden, 2 * inner, size=size),
        SubLayer("shared expert: SwiGLU", 6 * tokens * inner, 0, 3 * tokens * inner * size),
        _product("shared expert: down", tokens, inner, hidden, size=size),
    ]


def _experts(work: Work) -> list[SubLayer]:
    config, size, rows = work.config, work.dtype.itemsize, work.rows
    hidden, tokens = config.hidden_size, work.tokens
    inner = config.moe_intermediate_size // work.parallel.moe_tp
    choices = tokens * config.num_experts_per_tok
    return [
        SubLayer("sort by expert", 0, 0, choices * (8 + 4 + 4)),  # in: ids; out: rows, choices
        SubLayer("permute", 0, 0, (work.tokens_here + rows) * hidden * size),
        _product("experts: gate, up", rows, hidden, 2 * inner, work.experts, size),
        SubLayer("experts: SwiGLU", 6 * rows * inner, 0, 3 * rows * inner * size),
        _product("experts: down", rows, inner, hidden, work.experts, size),
        # In: rows, their positions and weights, and where it is added to, the shared expert's sum.
        SubLayer(
            "un-permute",
            2 * rows * hidden,
            0,
            (rows + (2 if work.adds_shared else 1) * tokens) * hidden * size + 8 * choices,
        ),
    ]


def _product(
    name: str, rows: float, inner: int, outer: int, matrices: float = 1, size: int = 2
) -> SubLayer:
    """rows x inner times (matrices of) inner x outer."""
    return SubLayer(
        name,
        2 * rows * inner * outer,
        matrices * inner * outer * size,
        rows * (inner + outer) * size,
    )
