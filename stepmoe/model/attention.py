"""Grouped-query attention with q/k norm, rotary and a gate for each head: one rank's heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepmoe.config import LayerConfig
from stepmoe.kernels.attention import decode_attention, prefill_attention
from stepmoe.kernels.qk_norm_rotary import qk_norm_rotary
from stepmoe.model.kv_cache import LayerCache
from stepmoe.model.merged import Linear, MergedLinear
from stepmoe.model.norm import GemmaRMSNorm
from stepmoe.model.rotary import inverse_frequencies


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
        self.o_proj = Linear(query_size, hidden_size)
        self.q_norm = GemmaRMSNorm(self.head_dim, eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, eps)
        # Not parameters: they follow from the config. float64, and as last used.
        self._frequencies = self._placed_frequencies = inverse_frequencies(layer)
        self._placed_zero = torch.zeros(1, dtype=torch.int64, device="cpu")

    def forward(
        self, hidden_states: Tensor, batch: int, start: int, cache: LayerCache | None
    ) -> Tensor:
        """(T, D) to (T, D); T = batch x length rows, sequence after sequence.

        Args:
            start: position of the first of the `length` tokens of every sequence.
            cache: holds the keys and values of the `start` tokens before; None if start is 0.
        """
        length = hidden_states.shape[0] // batch
        projected = self.qkvg_proj(hidden_states)
        gate = projected[:, -self.num_heads :]  # (T, H_local), before the sigmoid
        into = None
        if cache is not None:
            shape = (batch, self.num_kv_heads, self.head_dim)
            slots = cache.reserve(projected, shape, start + length)
            if length == 1 or self.window is None:
                into = slots
        query, keys, values = qk_norm_rotary(
            projected,
            batch,
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            self._frequencies_for(projected),
            self._placed_zero if cache is None else cache.position,
            self.num_heads,
            self.num_kv_heads,
            into,
        )
        if cache is not None and length == 1:
            output = decode_attention(query, keys, values, gate, cache.position)
        else:
            if into is not None:
                keys, values = (kept[:, :, : start + length] for kept in into)
            elif cache is not None:
                keys, values = cache.append(keys, values, start)
            output = prefill_attention(query, keys, values, gate, self.window)
        result: Tensor = self.o_proj(output)
        return result

    def _frequencies_for(self, x: Tensor) -> Tensor:
        """The rotary frequencies on x's device, in float32 or wider; moved there once, and with
        them the position of the first token, so that no pass launches a kernel to make a zero."""
        wide = torch.promote_types(x.dtype, torch.float32)
        placed = self._placed_frequencies
        if (placed.device, placed.dtype) != (x.device, wide):
            self._placed_frequencies = placed = self._frequencies.to(x.device, wide)
            self._placed_zero = self._placed_zero.to(x.device)
        return placed
