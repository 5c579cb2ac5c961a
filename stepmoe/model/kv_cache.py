"""Keys and values of the tokens seen so far, in slots that stay where they are.

Position p of a layer lies in slot p modulo its slots. A full layer has a slot for every position, a
sliding one for those of its window only: a new token takes the slot of the one that it pushes out.
So a decode step writes one slot and moves nothing.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError


class LayerCache:
    """One layer's keys and values, (B, G_local, slots, head_dim) each; None before the first token.

    Args:
        window: of a sliding layer; None for a full one.
        position: int64 of one entry: tokens seen so far, shared by all layers of a cache.
        capacity: positions to reserve slots for at first.
    """

    def __init__(self, window: int | None, position: Tensor, capacity: int) -> None:
        self.window, self.position, self.capacity = window, position, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def reserve(
        self, like: Tensor, shape: tuple[int, int, int], total: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values with slots for positions 0 to total - 1, or for a window of them.

        Args:
            like: gives dtype and device; shape: (B, G_local, head_dim) of the first call.

        Raises:
            ConfigError: `like` has another dtype than the first call's.
        """
        batch, num_kv_heads, head_dim = shape
        if self.keys is None or self.values is None:
            self.keys, self.values = (
                like.new_zeros(
                    batch, num_kv_heads, self._slots(max(total, self.capacity)), head_dim
                )
                for _ in range(2)
            )
        elif self.keys.dtype is not like.dtype:
            raise ConfigError(
                f"the cache holds {self.keys.dtype}, the model computes in {like.dtype}: use the "
                "new_cache() of that model, made for its dtype"
            )
        elif (there := self.keys.shape[2]) < self._slots(total):
            # Twice as many, so that a sequence of n tokens is moved log n times. A window's slots
            # only grow before it is full, while position p lies in slot p.
            more = self._slots(max(total, 2 * there)) - there
            self.keys, self.values = (
                torch.cat((kept, kept.new_zeros(batch, num_kv_heads, more, head_dim)), dim=2)
                for kept in (self.keys, self.values)
            )
        return self.keys, self.values

    def _slots(self, positions: int) -> int:
        return positions if self.window is None else min(positions, self.window)

    def append(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Add several new tokens of a sliding layer, for which slots are reserved.

        Args:
            keys, values: (B, G_local, L, head_dim), of positions start to start + L - 1.

        Returns:
            What the new queries may look at, oldest first: it is more than the slots can hold,
            because the first new query still sees what the last one pushes out.
        """
        assert self.keys is not None
        assert self.values is not None
        assert self.window is not None
        slots, total = self.keys.shape[2], start + keys.shape[2]
        everywhere = torch.arange(max(0, start - self.window + 1), total, device=keys.device)
        before = everywhere[: -keys.shape[2]] % slots
        kept = everywhere[-min(slots, keys.shape[2]) :]
        if len(before):
            keys = torch.cat((self.keys.index_select(2, before), keys), dim=2)
            values = torch.cat((self.values.index_select(2, before), values), dim=2)
        self.keys.index_copy_(2, kept % slots, keys[:, :, -len(kept) :])
        self.values.index_copy_(2, kept % slots, values[:, :, -len(kept) :])
        return keys, values

    def copy(self, rows: Tensor | None, position: Tensor) -> LayerCache:
        """The same of some sequences, rows (B_new,) int64, in memory of its own; None: of all."""
        copied = copy.copy(self)
        copied.position = position
        if self.keys is not None and self.values is not None:
            copied.keys, copied.values = (
                kept.clone() if rows is None else kept.index_select(0, rows)
                for kept in (self.keys, self.values)
            )
        return copied


class KVCache:
    """The cache of every layer of one rank. Make it with `Step3p5ForCausalLM.new_cache`.

    Attributes:
        length: tokens seen by all layers, as the host knows it.
        position: the same on the device, int64 of one entry: a replayed CUDA graph reads it there.
        batch_size: sequences of the model's calls; under attention="dp" a rank holds some of them.
    """

    def __init__(
        self, config: Step3p5Config, device: torch.device, capacity: int, holds_all: bool
    ) -> None:
        self.config, self.holds_all = config, holds_all
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers = [
            LayerCache(layer.sliding_window, self.position, capacity) for layer in config.layers
        ]
        self.length = 0
        self.batch_size: int | None = None

    def advance(self, length: int) -> None:
        """Count `length` new tokens, which every layer has written."""
        self.length += length
        self.position += length

    def clear(self) -> None:
        """Forget all tokens. The slots stay reserved, for as many sequences as before: a CUDA graph
        knows where they are. Another batch size needs a new cache."""
        self.length = 0
        self.position.zero_()

    def move_to(self, length: int) -> None:
        """Let it hold `length` tokens, whatever is in its slots."""
        self.clear()
        self.advance(length)

    def copy(self, rows: Tensor | None = None) -> KVCache:
        """A cache of the same tokens in memory of its own, which may go on differently.

        Args:
            rows: (batch,) int64: keep only these sequences, in this order. None keeps all.

        Raises:
            ConfigError: rows under attention="dp", where another batch is dealt to other ranks.
        """
        if rows is not None and not self.holds_all:
            raise ConfigError(
                "rows of a cache cannot be chosen under attention='dp': the ranks share the "
                "sequences, and a smaller batch would be dealt out anew"
            )
        copied = copy.copy(self)
        copied.position = self.position.clone()
        if rows is not None:
            rows = rows.to(self.position.device)
            copied.batch_size = len(rows)
        copied.layers = [layer.copy(rows, copied.position) for layer in self.layers]
        return copied

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values on this rank, reserved slots included."""
        kept = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)
