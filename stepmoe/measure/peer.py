"""The peer: the same share of a layer in transformers' Step3p7TextModel, as it runs there."""

from __future__ import annotations

from functools import partial

import torch

from stepmoe.config import Step3p5Config
from stepmoe.measure.flush import Flush
from stepmoe.parallel import ParallelConfig


def peer_seconds(
    config: Step3p5Config, layer: int, parallel: ParallelConfig, batch: int, length: int
) -> float:
    """Seconds that one layer takes there in a prefill: bf16, sdpa, no cache.

    The share of a rank is a smaller model: its heads, its experts at its slice of their size, and
    of every token's experts as many as fall to a rank on average, so that as many rows are computed
    as here. Timed as the difference between a model of two layers and one of a single layer.

    The models run in turn, because transformers' GPU waits for its host, which is faster at one
    time than at another: the difference of two medians, of one model and then of the other, was 15,
    30 and 44 ms for the same layer on three H200s.
    """
    flush = Flush(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(
        batch, length, config.hidden_size, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    two, one = (
        partial(_model(config, layer, parallel, layers), inputs_embeds=x, use_cache=False)
        for layers in (2, 1)
    )
    with torch.no_grad():
        return flush.median_difference(two, one)


def _model(
    config: Step3p5Config, layer: int, parallel: ParallelConfig, layers: int
) -> torch.nn.Module:
    from transformers.models.step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    ours, tp = config.layer(layer), parallel.tp
    heads = ours.num_heads // tp
    theirs = Step3p7TextConfig(
        vocab_size=1024,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // tp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_sliding_attention_heads=heads,
        num_key_value_heads=max(1, ours.num_kv_heads // tp),
        head_dim=ours.head_dim,
        layer_types=[ours.attention_type] * layers,
        mlp_layer_types=["sparse"] * layers,
        sliding_window=config.sliding_window,
        rope_theta=ours.rope_theta,
        partial_rotary_factors=[ours.rotary_dim / ours.head_dim] * layers,
        n_routed_experts=config.num_experts // parallel.ep,
        num_experts_per_tok=config.num_experts_per_tok // parallel.ep,
        moe_intermediate_size=config.moe_intermediate_size // parallel.moe_tp,
        share_expert_dim=config.share_expert_dim // tp,
        moe_router_scaling_factor=config.router_scaling_factor,
        max_position_embeddings=config.max_position_embeddings,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Step3p7TextModel(theirs)
    return model.to(torch.bfloat16).eval()


def peer_version() -> str:
    """Of transformers."""
    import transformers

    version: str = transformers.__version__
    return version
