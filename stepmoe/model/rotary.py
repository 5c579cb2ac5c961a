"""Rotary position embedding: neox style (rotate halves), partial, with llama3 scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepmoe.config import LayerConfig, RopeScaling


def inverse_frequencies(layer: LayerConfig) -> Tensor:
    """Angle per position of each pair, float64 (rotary_dim / 2,): theta^(-2i / rotary_dim)."""
    # On the CPU by name: models are first built on the meta device.
    pairs = torch.arange(0, layer.rotary_dim, 2, dtype=torch.float64, device="cpu")
    exponent = pairs / layer.rotary_dim
    frequencies = 1.0 / layer.rope_theta**exponent
    return frequencies if layer.rope_scaling is None else _llama3(frequencies, layer.rope_scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch waves longer than original/low by factor, keep those below original/high, else blend.

    Source: the llama3 rope_type of transformers' modeling_rope_utils.
    """
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_position_embeddings
    keep = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def cos_sin(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, rotary_dim / 2) of positions (L,), angles in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[:, None] * frequencies.to(wide)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 x cos.shape[-1] entries of the last dim of x (B, heads, L, head_dim)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
