"""Roofline: the least time each sub-layer of one rank can take, by its arithmetic and its bytes.

floor = max(operations / rate, bytes / bandwidth) (Williams, Waterman and Patterson, "Roofline: an
insightful visual performance model for multicore architectures", 2009). A multiply and an add are
two operations. Bytes are the fewest: weights, inputs and outputs once each, nothing in between. A
floor is a bound, not a prediction: a real kernel takes longer.

Legend: T tokens of this step, S context (positions a sequence's last token sees, itself included),
D hidden, H query heads, G key-value heads, d head_dim, E experts, K top-k, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from stepmoe.config import LayerConfig, Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig


@dataclass(frozen=True)
class Chip:
    """What one accelerator can do.

    Attributes:
        rate: operations a second in matrix products.
        bandwidth: bytes a second to and from its memory, read plus written.
        source: where the rates come from.
        sustained_rate: that of products which follow each other for longer than a moment. Their
            power then is at its limit, and the GPU lowers its clock. None where nobody measured it.
    """

    name: str
    rate: float
    bandwidth: float
    source: str
    sustained_rate: float | None = None

    @property
    def balance(self) -> float:
        """Operations a byte at which arithmetic and memory take equally long."""
        return self.rate / self.bandwidth

    def sustained(self) -> Chip | None:
        """The same at the rate that it keeps up; None where nobody measured it."""
        rate = self.sustained_rate
        return None if rate is None else replace(self, rate=rate)


_MEASURED = "measured with torch 2.11.0+cu130: bf16 8192^3 matmul; device-to-device copy"
_SHEET = "NVIDIA datasheet: dense bf16, memory bandwidth; never reached in full"
CHIPS = {
    "h100": Chip("H100 80GB HBM3 (measured)", 722e12, 3.02e12, _MEASURED),
    "h100_datasheet": Chip("H100 SXM (datasheet)", 989e12, 3.35e12, _SHEET),
    "h200_datasheet": Chip("H200 SXM (datasheet)", 989e12, 4.8e12, _SHEET),
}


@dataclass(frozen=True)
class SubLayer:
    """One rank's share of one sub-layer in one step.

    Attributes:
        operations: multiplies and adds.
        weight_bytes: weights (or, for attention scores, cached keys and values) that are read.
        activation_bytes: inputs read plus outputs written.
    """

    name: str
    operations: float
    weight_bytes: float
    activation_bytes: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    def floor(self, chip: Chip) -> float:
        """Seconds that it takes at least."""
        return max(self.operations / chip.rate, self.bytes / chip.bandwidth)

    def bound(self, chip: Chip) -> str:
        """ "compute" or "memory": which of the two makes the floor."""
        return "compute" if self.intensity > chip.balance else "memory"


def layer_roofline(
    config: Step3p5Config,
    layer: int,
    parallel: ParallelConfig,
    tokens: int,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    sharded_residual: bool = False,
) -> list[SubLayer]:
    """The sub-layers of one decoder layer, as one rank runs them.

    Tokens are spread evenly over sequences, under attention="dp" sequences over ranks, and routed
    tokens over experts: what a rank has on average.

    Args:
        tokens: new tokens of all sequences together.
        context: positions that a sequence's last token sees, itself included.
        batch: sequences; tokens / batch are new in each.
        dtype: of weights and activations.
        sharded_residual: the norms and adds work on tokens / tp (variant reduce_scatter).

    Raises:
        ConfigError: the shape cannot be cut this way, or the numbers do not fit together.
    """
    parallel.check(config)
    settings = config.layer(layer)
    if batch < 1 or tokens < batch or tokens % batch:
        raise ConfigError(f"{tokens} tokens are no whole number for each of {batch} sequences")
    length = tokens // batch
    if context < length:
        raise ConfigError(
            f"context={context} is shorter than the {length} new tokens of each sequence, which it "
            "includes"
        )
    size = dtype.itemsize
    own = tokens / parallel.tp if parallel.attention == "dp" else float(tokens)
    normed = tokens / parallel.tp if sharded_residual else own
    rows = [
        *_attention(config, settings, parallel, own, length, context, size),
        *(
            _moe(config, parallel, tokens, size)
            if settings.is_moe
            else [_mlp("dense MLP", config, config.intermediate_size // parallel.tp, tokens, size)]
        ),
    ]
    width = normed * config.hidden_size
    # Two of each in a layer. A norm squares, sums, scales by 1/rms and by 1 + weight.
    norms = SubLayer("norms", 8 * width, 2 * config.hidden_size * size, 4 * width * size)
    return [*rows, norms, SubLayer("residual adds", 2 * width, 0.0, 6 * width * size)]


def step_floor(
    config: Step3p5Config,
    parallel: ParallelConfig,
    chip: Chip,
    tokens: int,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Seconds that a step takes at least: all layers, and the head for each sequence's last token.

    Arguments as of `layer_roofline`. The head is whole on every rank.
    """
    hidden, vocabulary, size = config.hidden_size, config.vocab_size, dtype.itemsize
    head = SubLayer(
        "head",
        2 * batch * hidden * vocabulary,
        hidden * vocabulary * size,
        batch * (hidden + vocabulary) * size,
    )
    layers = (
        layer_roofline(config, layer, parallel, tokens, context, batch, dtype)
        for layer in range(config.num_hidden_layers)
    )
    return head.floor(chip) + sum(sub.floor(chip) for layer in layers for sub in layer)


def seen(length: int, context: int, window: int | None) -> int:
    """Keys that `length` new queries see, all together: each its own past, at most `window`."""
    limit = min(window or context, context)
    first = context - length + 1  # what the first new token sees, itself included
    growing = max(0, min(limit, context) - first + 1)  # queries whose view is not cut yet
    growing = min(growing, length)
    return growing * first + growing * (growing - 1) // 2 + (length - growing) * limit


def _attention(
    config: Step3p5Config,
    layer: LayerConfig,
    parallel: ParallelConfig,
    tokens: float,
    length: int,
    context: int,
    size: int,
) -> list[SubLayer]:
    """Projections (q, k, v, gate, o), and scores with the weighted sum of values."""
    hidden, dim = config.hidden_size, layer.head_dim
    heads = layer.num_heads // parallel.attention_tp
    kv_heads = max(1, layer.num_kv_heads // parallel.attention_tp)
    query, keys = heads * dim, kv_heads * dim
    out = query + 2 * keys + heads  # of one token's first four projections
    weights = hidden * (out + query)
    # In: hidden states, attention output; out: queries, keys, values, gates, the result.
    moved = tokens * (hidden + out + query + hidden)
    projections = SubLayer(
        "attention projections", 2 * tokens * weights, weights * size, moved * size
    )
    sequences = tokens / length
    pairs = sequences * seen(length, context, layer.sliding_window)
    # Under a window the first new query's window begins here; older keys are not read.
    read = min(context, (layer.sliding_window or context) + length - 1)
    cached = sequences * read * 2 * keys
    scores = SubLayer(
        "attention scores", 4 * pairs * query, cached * size, 2 * tokens * query * size
    )
    return [projections, scores]


def _mlp(name: str, config: Step3p5Config, size_local: int, tokens: float, size: int) -> SubLayer:
    """Gate, up and down; what lies between them stays on the chip."""
    weights = 3 * config.hidden_size * size_local
    moved = 2 * tokens * config.hidden_size
    return SubLayer(name, 2 * tokens * weights, weights * size, moved * size)


def _moe(config: Step3p5Config, parallel: ParallelConfig, tokens: int, size: int) -> list[SubLayer]:
    """Router, this rank's experts, and its slice of the shared expert."""
    hidden, experts, top_k = config.hidden_size, config.num_experts, config.num_experts_per_tok
    router = SubLayer(
        "router",
        2 * tokens * hidden * experts,
        experts * hidden * size,
        tokens * (hidden * size + top_k * (8 + 4)),  # out: an int64 and a float32 for each choice
    )
    one = 3 * hidden * (config.moe_intermediate_size // parallel.moe_tp)
    # If tokens choose independently and uniformly, this share of the experts is chosen at all.
    touched = experts / parallel.ep * (1 - (1 - top_k / experts) ** tokens)
    routed = SubLayer(
        "routed experts",
        2 * tokens * top_k / parallel.ep * one,
        touched * one * size,
        2 * tokens * hidden * size,
    )
    shared = _mlp("shared expert", config, config.share_expert_dim // parallel.tp, tokens, size)
    return [router, routed, shared]
