"""How many tokens each expert gets: what "balanced" is measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM


class RouterLoad:
    """Counts, in every MoE layer of a model, the tokens that its router sends to each expert.

    Every rank routes every token, so each counts the whole load. Counting waits for no device.

    Attributes:
        counts: layer number to (E,) int64, since the last `take`.
    """

    def __init__(self, model: Step3p5ForCausalLM) -> None:
        self.counts: dict[int, Tensor] = {}
        self._experts = model.config.num_experts
        self._hooks = [
            layer.moe.gate.register_forward_hook(self._counter(layer.index))
            for layer in model.model.decoder_layers
            if layer.is_moe
        ]

    def take(self) -> dict[int, Tensor]:
        """The counts so far; counting starts anew."""
        counts, self.counts = self.counts, {}
        return counts

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def _counter(self, layer: int) -> Callable[[Any, Any, tuple[Tensor, Tensor]], None]:
        def count(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            topk_ids = output[0].reshape(-1, 1)
            experts = torch.arange(self._experts, device=topk_ids.device)
            self.counts[layer] = self.counts.get(layer, 0) + (topk_ids == experts).sum(0)

        return count


def load_of(model: Step3p5ForCausalLM, input_ids: Tensor, batch: int = 128) -> dict[int, Tensor]:
    """Layer number to the tokens that each expert gets (E,), of sequences (rows, length)."""
    load = RouterLoad(model)
    try:
        for ids in input_ids.split(batch):
            model(ids)
    finally:
        load.close()
    return load.take()


def imbalance(counts: Tensor) -> float:
    """The busiest expert's load over the mean: 1 is even, E is everything on one expert."""
    return float(counts.max() / counts.float().mean())
