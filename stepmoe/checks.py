"""What a model refuses before it computes anything, naming the value and the way out."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.model.kv_cache import KVCache
from stepmoe.parallel import ParallelConfig


def check_alignment(config: Step3p5Config, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """grouped_mm needs rows of a multiple of 16 bytes (torch 2.11 to 2.13, CPU and CUDA)."""
    if dtype is torch.float64 or not config.moe_layers:
        return
    size_local = config.moe_intermediate_size // parallel.moe_tp
    sizes = {"hidden_size": config.hidden_size, "moe_intermediate_size / (tp/ep)": size_local}
    for name, size in sizes.items():
        if size * dtype.itemsize % 16:
            raise ConfigError(
                f"{name} = {size} in {dtype} makes rows of {size * dtype.itemsize} bytes; the "
                "grouped matrix product of the experts needs a multiple of 16: choose another ep, "
                "or float64"
            )


def check_input(config: Step3p5Config, input_ids: Tensor, cache: KVCache | None) -> None:
    """Shape, dtype, vocabulary, length and, with a cache, the batch it was filled with."""
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"input_ids must be a (batch, length) int64 tensor, got {input_ids.dtype} "
            f"of shape {tuple(input_ids.shape)}"
        )
    batch, length = input_ids.shape
    if batch == 0 or length == 0:
        raise ConfigError(f"input_ids of shape {batch} x {length} hold no token")
    if not input_ids.is_cuda:  # on the device the check would wait for it
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise ConfigError(
                f"input_ids hold {low if low < 0 else high}, outside the vocabulary of "
                f"{config.vocab_size}"
            )
    start = 0 if cache is None else cache.length
    if start + length > config.max_position_embeddings:
        raise ConfigError(
            f"{start} cached + {length} new tokens exceed max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    if cache is not None:
        if cache.batch_size not in (None, batch):
            raise ConfigError(
                f"the cache holds {cache.batch_size} sequences, input_ids {batch}: "
                "use one cache for one batch"
            )
        cache.batch_size = batch
