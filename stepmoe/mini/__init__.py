"""A small trained Step3p5 model, the word problems it answers, and how it was trained.

Every part of the published architecture at a few million parameters, so that a laptop can ask what
a change of communication does to the accuracy of a model that really answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepmoe.config import AttentionType, RopeScaling, Step3p5Config
from stepmoe.mini.tokenizer import EOS, VOCABULARY

__all__ = ["config", "path", "training_log"]


def path() -> Path:
    """The folder of the trained weights: for `Step3p5ForCausalLM.from_pretrained`."""
    return Path(__file__).with_name("weights")


def training_log() -> dict[str, Any]:
    """How the shipped weights were trained: settings, machine, curves, score, load of the experts.

    Written by `python -m stepmoe.mini.train`; drawn by `stepmoe.charts.training`.
    """
    log: dict[str, Any] = json.loads((path() / "training.json").read_text("utf-8"))
    return log


def config() -> Step3p5Config:
    """The shape of the mini model: 4.9 million parameters, 6 layers, 16 experts.

    It can be cut tp = 1, 2, 4 or 8 ways with ep up to tp.
    """
    full: AttentionType = "full_attention"
    sliding: AttentionType = "sliding_attention"
    layer_types = (full, sliding, sliding, sliding, full, sliding)
    is_full = [kind == full for kind in layer_types]
    return Step3p5Config(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        vocab_size=len(VOCABULARY),
        head_dim=32,
        num_attention_heads=8,
        num_attention_heads_sliding=16,
        num_key_value_heads=4,
        layer_types=layer_types,
        sliding_window=64,
        rope_theta=tuple(1e5 if at_full else 1e4 for at_full in is_full),
        partial_rotary_factors=tuple(0.5 if at_full else 1.0 for at_full in is_full),
        rope_scaling=RopeScaling(2.0, 128, 1.0, 32.0),
        rope_scaling_layer_types=(full,),
        moe_layers=tuple(range(1, 6)),
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        share_expert_dim=64,
        router_scaling_factor=3.0,
        norm_topk_prob=True,
        swiglu_limits=(None, None, None, None, 7.0, 7.0),
        swiglu_limits_shared=(None, None, None, None, 16.0, 16.0),
        max_position_embeddings=512,
        eos_token_ids=(EOS,),
        torch_dtype="bfloat16",
    )
