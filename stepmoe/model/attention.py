"""Grouped-query attention with q/k norm, rotary and a gate for each head: one rank's heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepmoe.config import LayerConfig
from stepmoe.model.kv_cache import LayerCache
from stepmoe.model.merged import MergedLinear
from stepmoe.model.norm import GemmaRMSNorm
from stepmoe.model.rotary import cos_sin, inverse_frequencies, rotate


class Attention(nn.Module):
    """H_local query heads over G_local key-value heads.

    With the heads cut over ranks the output is a partial sum over them; a rank that holds all heads
    (data-parallel attention) computes the complete output of its own sequences.

    Args:
        layer: head counts, rotary settings, window.
        hidden_size: D.
        eps: of q_norm and k_norm.
        tp_size: ranks that share the heads.
    """

    def __init__(self, layer: LayerConfig, hidden_size: int, eps: float, tp_size: int) -> None:
        super().__init__()
        self.num_heads = layer.num_heads // tp_size
        self.num_kv_heads = max(1, layer.num_kv_heads // tp_size)
        self.head_dim = layer.head_dim
        self.window = layer.sliding_window
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkvg_proj = MergedLinear(hidden_size, parts | {"g_proj": self.num_heads})
        self.o_proj = nn.Linear(query_size, hidden_size, bias=False)
        self.q_norm = GemmaRMSNorm(self.head_dim, eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, eps)
        self._frequencies = inverse_frequencies(layer)  # not a parameter: follows from the config

    def forward(
        self, hidden_states: Tensor, batch: int, start: int, cache: LayerCache | None
    ) -> Tensor:
        """(T, D) to (T, D); T = batch x length rows, sequence after sequence.

        Args:
            start: position of the first of the `length` tokens of every sequence.
            cache: holds the keys and values of the `start` tokens before; None if start is 0.
        """
        length = hidden_states.shape[0] // batch
        positions = torch.arange(start, start + length, device=hidden_states.device)
        frequencies = self._frequencies.to(hidden_states.device)
        cos, sin = cos_sin(positions, frequencies, hidden_states.dtype)

        projected = self.qkvg_proj(hidden_states).split(list(self.qkvg_proj.parts.values()), -1)
        query, key, value = (self._heads(part, batch) for part in projected[:3])
        gate = torch.sigmoid(projected[3])  # (T, H_local)
        query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)

        output = self._attend(query, key, value)
        output = output.transpose(1, 2).reshape(-1, self.num_heads, self.head_dim) * gate[..., None]
        result: Tensor = self.o_proj(output.flatten(1))
        return result

    def _heads(self, x: Tensor, batch: int) -> Tensor:
        """(T, heads x head_dim) to (B, heads, L, head_dim)."""
        return x.view(batch, -1, x.shape[1] // self.head_dim, self.head_dim).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of the last L of S positions: query (B, H, L, d), rest (B, G, S, d)."""
        length, seen = query.shape[2], key.shape[2]
        mask = None
        is_causal = length == seen and (self.window is None or seen <= self.window)
        if not is_causal:
            rows = torch.arange(seen - length, seen, device=query.device)[:, None]
            distance = rows - torch.arange(seen, device=query.device)
            mask = (distance >= 0) & (distance < (self.window or seen))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=True
        )
