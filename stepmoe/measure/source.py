"""Where a measured model's weights come from: a folder in the published layout, or a seed."""

from __future__ import annotations

from pathlib import Path

import torch

from stepmoe.causal_lm import Step3p5ForCausalLM, Variant
from stepmoe.config import Step3p5Config
from stepmoe.fp8 import Quantization
from stepmoe.parallel import ParallelConfig

Source = str | Path | Step3p5Config  # a folder, or a shape that gets random weights


def config_of(source: Source, layers: tuple[int, ...] | None = None) -> Step3p5Config:
    """The shape of a source's model, or of a shallower one of these layers."""
    config = source if isinstance(source, Step3p5Config) else Step3p5Config.from_pretrained(source)
    return config if layers is None else config.with_layers(*layers)


def load(
    source: Source,
    variant: Variant,
    parallel: ParallelConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    on_device: bool = False,
    quantization: Quantization = None,
) -> Step3p5ForCausalLM:
    """This rank's share of the model.

    Args:
        layers: only these; seed and on_device: for random weights.
        quantization: None, or "fp8" for weights that stay in FP8.

    Raises:
        ConfigError, CheckpointError: as `Step3p5ForCausalLM`.
    """
    if isinstance(source, Step3p5Config):
        config = config_of(source, layers)
        return Step3p5ForCausalLM.from_config(
            config, variant, parallel, dtype, device, seed, on_device, quantization
        )
    return Step3p5ForCausalLM.from_pretrained(
        source, variant, parallel, dtype, device, layers, quantization
    )
