"""Keys and values of the tokens seen so far; sliding layers keep only their window."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.config import Step3p5Config


class LayerCache:
    """One layer's keys and values, (B, G_local, S, head_dim) each.

    Args:
        window: how many tokens to keep; None keeps all.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns the keys and values the new queries may look at, oldest first."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        # The new queries still need what falls out of the window behind the last of them.
        start = 0 if self.window is None else max(0, keys.shape[2] - self.window)
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        if start:  # a view would keep the dropped tokens alive
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return keys, values


class KVCache:
    """The cache of every layer of one rank, and the number of tokens seen by all of them."""

    def __init__(self, config: Step3p5Config) -> None:
        self.layers = [LayerCache(layer.sliding_window) for layer in config.layers]
        self.config = config
        self.length = 0
        self.batch_size: int | None = None
