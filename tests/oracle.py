"""The whole model again, unsharded, in float64, written for plainness: the judge of all else.

It shares no arithmetic with stepmoe: loops over heads, tokens and experts, complex numbers for the
rotary embedding, the three cases of llama3 scaling spelled out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepmoe.config import LayerConfig, Step3p5Config


def forward(
    config: Step3p5Config, weights: dict[str, Tensor], input_ids: Tensor
) -> dict[str, Tensor]:
    """Logits (B, L, V), and by name "L.attn_output", "L.layer_output", ... the states (B, L, D)."""
    weights = {name: weight.double() for name, weight in weights.items()}
    stream = weights["model.embed_tokens.weight"][input_ids]
    states: dict[str, Tensor] = {}
    for layer in config.layers:
        prefix = f"model.layers.{layer.index}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        attn_input = norm(stream, own["input_layernorm.weight"], config.rms_norm_eps)
        attn_output = torch.stack([attention(config, layer, own, x) for x in attn_input])
        stream = stream + attn_output
        mlp_input = norm(stream, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        feed_forward = moe if layer.is_moe else dense
        mlp_output = feed_forward(config, layer, own, mlp_input.flatten(0, 1)).view(stream.shape)
        named = {
            "attn_input": attn_input,
            "attn_output": attn_output,
            "post_attn_residual": stream,
            "mlp_input": mlp_input,
            "mlp_output": mlp_output,
            "layer_output": stream + mlp_output,
        }
        states |= {f"{layer.index}.{name}": value for name, value in named.items()}
        stream = stream + mlp_output
    final = norm(stream, weights["model.norm.weight"], config.rms_norm_eps)
    states["logits"] = final @ weights["lm_head.weight"].T
    return states


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + weight)


def attention(
    config: Step3p5Config, layer: LayerConfig, own: dict[str, Tensor], x: Tensor
) -> Tensor:
    """One sequence x (L, D)."""
    length, size = x.shape[0], layer.head_dim
    query, key, value = (x @ own[f"self_attn.{n}_proj.weight"].T for n in "qkv")
    gates = 1 / (1 + torch.exp(-(x @ own["self_attn.g_proj.weight"].T)))
    angles = rotary_angles(layer, length)
    position = torch.arange(length)
    visible = position[:, None] >= position
    if layer.sliding_window:
        visible &= position[:, None] - position < layer.sliding_window
    heads = []
    for h in range(layer.num_heads):
        g = h * layer.num_kv_heads // layer.num_heads
        q = norm(
            query[:, h * size : (h + 1) * size], own["self_attn.q_norm.weight"], config.rms_norm_eps
        )
        k = norm(
            key[:, g * size : (g + 1) * size], own["self_attn.k_norm.weight"], config.rms_norm_eps
        )
        scores = turn(q, angles) @ turn(k, angles).T / math.sqrt(size)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        heads.append(weights @ value[:, g * size : (g + 1) * size] * gates[:, h, None])
    return torch.cat(heads, -1) @ own["self_attn.o_proj.weight"].T


def rotary_angles(layer: LayerConfig, length: int) -> Tensor:
    """(L, rotary_dim / 2)."""
    frequencies = []
    for i in range(layer.rotary_dim // 2):
        frequency = layer.rope_theta ** (-2 * i / layer.rotary_dim)
        scaling = layer.rope_scaling
        if scaling:
            wavelength = 2 * math.pi / frequency
            longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
            shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
            if wavelength > longest:
                frequency /= scaling.factor
            elif wavelength > shortest:
                smooth = (
                    scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor
                ) / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return torch.arange(length).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate entry i together with entry i + half, as a complex number."""
    half = angles.shape[1]
    pairs = torch.complex(x[:, :half], x[:, half : 2 * half]) * torch.exp(1j * angles)
    return torch.cat((pairs.real, pairs.imag, x[:, 2 * half :]), -1)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    a, b = x @ gate.T, x @ up.T
    a = a / (1 + torch.exp(-a))
    if limit:
        a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return (a * b) @ down.T


def dense(config: Step3p5Config, layer: LayerConfig, own: dict[str, Tensor], x: Tensor) -> Tensor:
    parts = (own[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return swiglu(x, *parts, layer.swiglu_limit_shared)


def moe(config: Step3p5Config, layer: LayerConfig, own: dict[str, Tensor], x: Tensor) -> Tensor:
    """x (T, D)."""
    shared = (own[f"share_expert.{n}_proj.weight"] for n in ("gate", "up", "down"))
    output = swiglu(x, *shared, layer.swiglu_limit_shared)
    for t, token in enumerate(x):
        scores = 1 / (1 + torch.exp(-(own["moe.gate.weight"] @ token)))
        chosen = sorted(
            range(config.num_experts),
            key=lambda e: -float((scores[e] + own["moe.router_bias"][e]).detach()),
        )[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        for e in chosen:
            parts = (own[f"moe.{n}_proj.weight"][e] for n in ("gate", "up", "down"))
            weight = scores[e] / total * config.router_scaling_factor
            output[t] += weight * swiglu(token, *parts, layer.swiglu_limit)
    return output
