"""From the merged projection to what attention reads: q/k norm, rotary, and the cache write."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version
from stepmoe.kernels.norm import gemma_rms_norm


@gpu_version("stepmoe.kernels.qk_norm_rotary_gpu")
def qk_norm_rotary(
    projected: Tensor,
    batch: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    frequencies: Tensor,
    start: Tensor,
    num_heads: int,
    num_kv_heads: int,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate queries and keys, and put keys and values where they are to be kept.

    Args:
        projected: (B L, at least (H + 2 G) d), sequence after sequence; a row holds the heads of
            the queries, then of the keys, then of the values.
        q_weight, k_weight: (d,) each, of Gemma's norm: the scale is 1 + weight.
        frequencies: (r / 2,), angle per position of the first r entries of a head, in pairs of
            entry i and entry i + r / 2.
        start: int64 of one entry, on the device: position of the first token of every sequence.
        into: keys and values (B, G, S, d) to write to, position p at slot p modulo S; None makes
            new ones of the L tokens.

    Returns:
        query (B, H, L, d); and keys and values, (B, G, L, d) or what `into` gave.
    """
    length, head_dim = projected.shape[0] // batch, q_weight.shape[0]
    positions = start + torch.arange(length, device=projected.device)
    cos, sin = cos_sin(positions, frequencies, projected.dtype)
    every = projected[:, : (num_heads + 2 * num_kv_heads) * head_dim]
    heads = every.view(batch, length, -1, head_dim).transpose(1, 2)
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    query = rotate(gemma_rms_norm(query, q_weight, eps), cos, sin)
    key = rotate(gemma_rms_norm(key, k_weight, eps), cos, sin)
    if into is None:
        return query, key, value
    slots = positions % into[0].shape[2]
    return query, into[0].index_copy_(2, slots, key), into[1].index_copy_(2, slots, value)


def cos_sin(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, r / 2) of positions (L,), angles in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[:, None] * frequencies.to(wide)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 x cos.shape[-1] entries of the last dim of x (B, heads, L, head_dim)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
