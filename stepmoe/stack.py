"""DecoderStack: embedding, the decoder layers of one variant, final norm, one after the other."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from stepmoe.capture import Capture
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.placement import Placed
from stepmoe.config import Step3p5Config
from stepmoe.model.kv_cache import KVCache
from stepmoe.model.norm import GemmaRMSNorm
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import DecoderLayer, Step, expect_boundary


class DecoderStack(nn.Module):
    """Embedding, decoder layers and final norm; the names are the checkpoint's `model.` prefix."""

    def __init__(
        self,
        config: Step3p5Config,
        parallel: ParallelConfig,
        layer: type[DecoderLayer],
        comm: Communicator,
    ) -> None:
        super().__init__()
        # With a weight given nothing is initialised, which would import torch's compiler.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(
            layer(config, parallel, index, comm) for index in range(config.num_hidden_layers)
        )
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._comm, self._attention = comm, parallel.attention
        self._keeps_own_tokens = parallel.attention == "dp" or layer.shards_residual

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers, as what they are: nn.ModuleList forgets the type."""
        return cast(list[DecoderLayer], list(self.layers))

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, capture: Capture | None = None
    ) -> Tensor:
        """What the head takes of input_ids (batch, length): (batch, length, D), on every rank.

        Args:
            cache: of the tokens before; it grows by these.
            capture: records named intermediate values.

        Raises:
            PlacementError: the variant sums wrongly, or leaves a sum pending.
        """
        batch, length = input_ids.shape
        if capture is not None:
            capture.begin(batch, length, len(self.layers))
        step = self._step(batch, length, cache, capture)
        hidden_states = self._embed(input_ids, step)
        residual: Placed | None = None
        for layer in self.decoder_layers:
            hidden_states, residual = layer(hidden_states, residual, step)
            expect_boundary(layer, hidden_states, residual)
            if capture is not None and capture.wants(layer.index):
                capture.record_layer(self._comm, layer.index, hidden_states, residual)
        if cache is not None:
            cache.advance(length)

        last = self.decoder_layers[-1]
        hidden_states, _ = last.add_norm(self.norm, last.flush(hidden_states), residual)
        hidden_states.name, hidden_states.layer = "final_norm", None
        if hidden_states.is_sharded:
            hidden_states = self._comm.all_gather(hidden_states, "lm_head")
        return hidden_states.replicated("lm_head").tensor.view(batch, length, -1)

    def _step(
        self, batch: int, length: int, cache: KVCache | None, capture: Capture | None
    ) -> Step:
        """What the layers need to know of this pass."""
        tp, index = self._comm.group.size, self._comm.group.index
        if self._attention == "dp":
            rows_per_rank = -(-batch // tp)
            own = min(max(batch - index * rows_per_rank, 0), rows_per_rank)
            tokens_per_rank = rows_per_rank * length
        else:
            own, tokens_per_rank = batch, -(-batch * length // tp)
        start = 0 if cache is None else cache.length
        return Step(own, length, start, tokens_per_rank, cache, capture)

    def _embed(self, input_ids: Tensor, step: Step) -> Placed:
        """Embedding of all tokens, or of this rank's own where the variant keeps tokens sharded."""
        whole = self._comm.replicated(self.embed_tokens(input_ids.flatten()), "embed_tokens")
        if self._keeps_own_tokens:
            return self._comm.keep_own_tokens(whole, step.tokens_per_rank)
        return whole
