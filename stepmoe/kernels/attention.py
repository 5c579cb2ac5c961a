"""Grouped-query attention with a gate for each head: many new tokens, or one for each sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stepmoe.kernels.dispatch import gpu_version


@gpu_version("stepmoe.kernels.attention_gpu")
def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, gate: Tensor, window: int | None
) -> Tensor:
    """Causal attention of the last L of S positions, each head's output times sigmoid(gate).

    Args:
        query: (B, H, L, d).
        keys, values: (B, G, S, d), oldest first; each serves H / G neighbouring query heads.
        gate: (B L, H), before the sigmoid.
        window: newest positions that a query sees, its own included; None for all.

    Returns:
        (B L, H d), sequence after sequence.
    """
    length, seen = query.shape[2], keys.shape[2]
    mask = None
    is_causal = length == seen and (window is None or seen <= window)
    if not is_causal:
        rows = torch.arange(seen - length, seen, device=query.device)[:, None]
        distance = rows - torch.arange(seen, device=query.device)
        mask = (distance >= 0) & (distance < (window or seen))
    output = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=True
    )
    return _gated(output, gate)


@gpu_version("stepmoe.kernels.decode_gpu")
def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, gate: Tensor, position: Tensor
) -> Tensor:
    """Attention of one new token a sequence over the slots of a cache, which hold that token too.

    Args:
        query: (B, H, 1, d).
        keys, values: (B, G, S, d), position p in slot p modulo S: once all are taken, they hold the
            newest S positions, and the query sees all of them.
        gate: (B, H), before the sigmoid.
        position: int64 of one entry, on the device: that of the new token.

    Returns:
        (B, H d).
    """
    taken = min(int(position) + 1, keys.shape[2])
    # The heads of a group stand where a sequence's tokens usually do: keys are read once for all.
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
    output = F.scaled_dot_product_attention(grouped, keys[:, :, :taken], values[:, :, :taken])
    return _gated(output.reshape(query.shape), gate)


def _gated(output: Tensor, gate: Tensor) -> Tensor:
    """(B, H, L, d) and (B L, H) to (B L, H d)."""
    by_token = output.transpose(1, 2).reshape(*gate.shape, -1)
    return (by_token * torch.sigmoid(gate)[..., None]).flatten(1)
