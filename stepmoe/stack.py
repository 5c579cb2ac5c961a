"""DecoderStack: embedding, the decoder layers of one variant, final norm."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from stepmoe.comm.communicator import Communicator
from stepmoe.config import Step3p5Config
from stepmoe.model.norm import GemmaRMSNorm
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import DecoderLayer


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

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers, as what they are: nn.ModuleList forgets the type."""
        return cast(list[DecoderLayer], list(self.layers))
