"""The angles of the rotary position embedding: partial, with llama3 scaling.

kernels/qk_norm_rotary.py turns queries and keys by them, neox style (rotate halves).
"""

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
