"""Step3p5ForCausalLM: a stack of one variant's layers, and the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from stepmoe.capture import Capture
from stepmoe.checkpoint import Checkpoint
from stepmoe.checks import (
    check_config_type,
    check_dtype,
    check_generate,
    check_input,
    check_model,
    check_quantization,
)
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import build_groups, world_size
from stepmoe.comm.ledger import note
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.filling import Write, fill_weights
from stepmoe.fp8 import DEQUANTISED, Quantization, remark_on_fp8
from stepmoe.generation import DecodeGraph, generate
from stepmoe.hub import locate
from stepmoe.kernels.block_scale import BlockScaled
from stepmoe.kernels.dispatch import WHY_REFERENCE, has_triton
from stepmoe.launch.rank import device_of
from stepmoe.layers import layer_numbers
from stepmoe.model.kv_cache import KVCache
from stepmoe.model.quantise import hold_in_fp8
from stepmoe.parallel import ParallelConfig, TensorLayout, tensor_layouts
from stepmoe.random_weights import copy_into, draw_into
from stepmoe.stack import DecoderStack
from stepmoe.variants import DecoderLayer, layer_class

Variant = str | type[DecoderLayer]


class Step3p5ForCausalLM(nn.Module):
    """One rank's share of a Step-3.5 model. Make it with `from_pretrained` or `from_config`.

    Every rank of the group calls the model with the same input_ids and gets the same logits. With
    ParallelConfig(simulate_rank=...) one rank runs alone; its logits are not the model's.

    Calls record no gradients; `stepmoe.mini.trainer.training_logits` does, on one rank.
    """

    def __init__(
        self,
        config: Step3p5Config,
        variant: Variant,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        quantization: Quantization = None,
    ) -> None:
        super().__init__()
        layer = layer_class(variant)
        check_model(config, parallel, dtype)
        self.config, self.parallel, self.layer_class = config, parallel, layer
        self.quantization = check_quantization(quantization)
        self.groups = build_groups(parallel)
        self.comm = Communicator(self.groups["tp"])
        self.remarks: list[str] = []  # for the ledger of every pass
        with torch.device("meta"):
            self.model = DecoderStack(config, parallel, layer, self.comm)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            if quantization is not None:
                hold_in_fp8(self, tensor_layouts(config, parallel, self.comm.group.index))
        self.decode_graph: DecodeGraph | None = None
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        variant: Variant = "deferred",
        parallel: ParallelConfig | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        layers: str | Sequence[int] | None = None,
        quantization: Quantization = None,
    ) -> Step3p5ForCausalLM:
        """Read a published checkpoint; each rank reads only its slice of each tensor.

        Memory holds no more beside the rank's weights than a piece of one tensor. FP8 weights are
        multiplied out to `dtype` while reading, or kept, as `quantization` says; the ledger notes
        which, and what computes with them.

        Args:
            path: folder with config.json and safetensors, one file or an index of shards; or a name
                on the Hugging Face Hub, of which the files needed are downloaded.
            variant: one of sm.VARIANTS, or a DecoderLayer subclass.
            parallel: layout over the ranks; None means tp over all ranks of this job.
            dtype: of weights and activations; None means the checkpoint's own.
            device: "cpu", "cuda", "cuda:1" or a torch.device; None or "auto" means this rank's.
            layers: "3-6" or [3, 4, 5, 6]: a shallower model of these decoder layers, whose logits
                are not the whole model's. None means all.
            quantization: "fp8" holds the weights of attention, MLPs and experts in FP8 blocks, half
                the memory of bf16, and quantises activations as they come. What the checkpoint has
                in FP8 is kept as it is, the rest quantised while reading. None holds all in dtype.

        Raises:
            ConfigError: the layout does not fit the shape or the number of ranks, or this machine
                has no such device.
            CheckpointError: a tensor is missing, surplus, misshapen or truncated, or a name that
                is found neither here nor on the hub.
        """
        chosen = None if layers is None else layer_numbers(layers)
        path = locate(path, chosen)
        config = Step3p5Config.from_pretrained(path)
        if chosen is not None:
            config = config.with_layers(*chosen)
        checkpoint = Checkpoint(path, chosen)
        checkpoint.expect(tensor_layouts(config, ParallelConfig(), 0), config.num_hidden_layers)
        model = cls._filled(
            config, checkpoint.copy_into, variant, parallel, dtype, device, quantization
        )
        if checkpoint.is_fp8 and quantization is None:
            kept = str(model.lm_head.weight.dtype).removeprefix("torch.")
            model.remarks.append(DEQUANTISED.format(dtype=kept))
        return model

    @classmethod
    def from_config(
        cls,
        config: Step3p5Config,
        variant: Variant = "deferred",
        parallel: ParallelConfig | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        on_device: bool = False,
        quantization: Quantization = None,
    ) -> Step3p5ForCausalLM:
        """The same with random weights: one seed gives the same model however it is cut.

        Args:
            variant, parallel, device: as in from_pretrained.
            dtype: of weights and activations; None means `config.torch_dtype`.
            on_device: draw on the rank's device, expert by expert, as the published shape needs:
                same model on every kind of layout, but another one on another kind of device. False
                draws every whole tensor in float32 on the CPU, where a stacked expert tensor of
                Step3p5Config.flash() takes 6 GB. A simulated rank always draws on its device.
            quantization: as in from_pretrained; "fp8" quantises what is drawn.

        Raises:
            ConfigError: what is given is no Step3p5Config, no known variant, dtype or quantization,
                the layout does not fit the shape or the number of ranks, or this machine has no
                such device.
        """

        def write(view: Tensor | BlockScaled, name: str, layout: TensorLayout) -> None:
            alone = parallel is not None and parallel.simulate_rank is not None
            draw = draw_into if on_device or alone else copy_into
            draw(view, name, layout, seed)

        return cls._filled(config, write, variant, parallel, dtype, device, quantization)

    @classmethod
    def _filled(
        cls,
        config: Step3p5Config,
        write: Write,
        variant: Variant,
        parallel: ParallelConfig | None,
        dtype: torch.dtype | None,
        device: str | torch.device | None,
        quantization: Quantization,
    ) -> Step3p5ForCausalLM:
        check_config_type(config)
        dtype = check_dtype(config.torch_dtype if dtype is None else dtype)
        device = device_of(device)
        parallel = parallel or ParallelConfig(tp=world_size())
        model = cls(config, variant, parallel, dtype, quantization)
        layouts = tensor_layouts(config, model.parallel, model.comm.group.index)
        fill_weights(model, layouts, write, dtype, device)
        if device.type == "cuda" and not has_triton():
            model.remarks.append(WHY_REFERENCE)
        if quantization is not None:
            model.remarks.append(remark_on_fp8(device, dtype))
        return model.requires_grad_(False)

    def new_cache(self, capacity: int = 0) -> KVCache:
        """An empty key-value cache, to be passed to every call of one decoding.

        Args:
            capacity: tokens of a sequence that it is to hold without growing on the way; more than
                that make it grow.
        """
        holds_all = self.parallel.attention == "tp" or self.comm.group.size == 1
        return KVCache(self.config, self.lm_head.weight.device, capacity, holds_all)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        capture: Capture | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (batch, length, vocab) of input_ids (batch, length) int64, on every rank the same.

        They are in the model's dtype, on its device.

        Args:
            input_ids: the same on every rank, which is not checked: ranks that pass different ids
                get different, wrong logits. With a cache, only the tokens that are new.
            cache: from new_cache(); remembers the tokens for the next call.
            capture: records named intermediate values.
            last_only: the logits of each sequence's last token alone, (batch, 1, vocab): what it
                takes to go on. The head is spared the other tokens.

        Raises:
            ConfigError: ids of another shape or dtype, outside the vocabulary, or too many; a cache
                of another model or batch.
            PlacementError: the variant sums wrongly, or leaves a sum pending.
        """
        check_input(self.config, input_ids, cache)
        for remark in self.remarks:
            note(remark)
        hidden_states = self.model(input_ids.to(self.lm_head.weight.device), cache, capture)
        logits: Tensor = self.lm_head(hidden_states[:, -1:] if last_only else hidden_states)
        return logits

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int = 16) -> Tensor:
        """Greedy continuation, int64: (batch, length) to (batch, length + at most max_new_tokens).

        Ends early when every sequence has produced an end-of-sequence token; a sequence that ended
        before the others is filled up with its own. On a GPU the steps after the prefill replay
        one CUDA graph, which the model keeps, with its cache, for the next call with this batch
        size; where ranks that share a GPU cannot, an open ledger's notes say so.

        Raises:
            ConfigError: max_new_tokens below 1 (as in transformers), or more than positions allow.
        """
        check_generate(self.config, input_ids, max_new_tokens)
        return generate(self, input_ids.to(self.lm_head.weight.device), max_new_tokens)

    def train(self, mode: bool = True) -> Self:
        """ConfigError: calls record no gradients. `eval()` is how the model is."""
        if mode:
            raise ConfigError(
                "calls of this model record no gradients: train on one rank with "
                "stepmoe.mini.trainer, whose training_logits(model, input_ids) records them"
            )
        return super().train(mode)
