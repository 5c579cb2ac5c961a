"""Random model shapes for property tests: uneven sizes, every architectural switch."""

from __future__ import annotations

from hypothesis import strategies as st

from stepmoe.config import RopeScaling, Step3p5Config

TYPES = ("full_attention", "sliding_attention")


@st.composite
def configs(draw: st.DrawFn, tp: int = 1) -> Step3p5Config:
    """A shape whose heads, experts and sizes `tp` ranks can share, with any ep that divides tp."""
    num_layers = draw(st.integers(1, 4))
    layers = range(num_layers)
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * tp  # a multiple of both
    head_dim = draw(st.sampled_from([4, 12, 16]))
    num_experts = tp * draw(st.integers(1, 5))
    limit = st.sampled_from([None, 0.1, 0.7])
    per_layer = {"min_size": num_layers, "max_size": num_layers}
    scaling = RopeScaling(
        factor=draw(st.sampled_from([1.5, 2.0, 8.0])),
        original_max_position_embeddings=draw(st.sampled_from([8, 64])),
        low_freq_factor=1.0,
        high_freq_factor=draw(st.sampled_from([4.0, 32.0])),
    )
    return Step3p5Config(
        hidden_size=draw(st.sampled_from([20, 32, 60])),
        intermediate_size=4 * tp * draw(st.integers(1, 5)),
        num_hidden_layers=num_layers,
        vocab_size=draw(st.integers(7, 80)),
        head_dim=head_dim,
        num_attention_heads=heads * draw(st.integers(1, 2)),
        num_attention_heads_sliding=heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        layer_types=tuple(draw(st.lists(st.sampled_from(TYPES), **per_layer))),
        sliding_window=draw(st.integers(1, 9)),
        rope_theta=tuple(draw(st.lists(st.sampled_from([1e2, 1e4, 5e6]), **per_layer))),
        partial_rotary_factors=tuple(draw(st.lists(st.sampled_from([0.5, 1.0]), **per_layer))),
        rope_scaling=scaling,
        rope_scaling_layer_types=tuple(draw(st.sets(st.sampled_from(TYPES)))),
        moe_layers=tuple(sorted(draw(st.sets(st.sampled_from(layers))))),
        num_experts=num_experts,
        num_experts_per_tok=draw(st.integers(1, min(4, num_experts))),
        moe_intermediate_size=4 * tp * draw(st.integers(1, 3)),
        share_expert_dim=tp * draw(st.integers(1, 7)),
        router_scaling_factor=draw(st.sampled_from([1.0, 3.0])),
        norm_topk_prob=draw(st.booleans()),
        swiglu_limits=tuple(draw(st.lists(limit, **per_layer))),
        swiglu_limits_shared=tuple(draw(st.lists(limit, **per_layer))),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        max_position_embeddings=512,
        torch_dtype="float64",
    )
