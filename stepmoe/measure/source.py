"""Where a measured model's weights come from: a folder in the published layout, or a seed."""

from __future__ import annotations

from pathlib import Path

import torch

from stepmoe.causal_lm import Step3p5ForCausalLM, Variant
from stepmoe.config import Step3p5Config
from stepmoe.parallel import ParallelConfig

Source = str | Path | Step3p5Config  # a folder, or a shape that gets random weights


def config_of(source: Source) -> Step3p5Config:
    """The shape of a source's model."""
    return source if isinstance(source, Step3p5Config) else Step3p5Config.from_pretrained(source)


def load(
    source: Source,
    variant: Variant,
    parallel: ParallelConfig,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Step3p5ForCausalLM:
    """This rank's share of the model.

    Raises:
        ConfigError, CheckpointError: as `Step3p5ForCausalLM`.
    """
    if isinstance(source, Step3p5Config):
        return Step3p5ForCausalLM.from_config(source, variant, parallel, dtype, device)
    return Step3p5ForCausalLM.from_pretrained(source, variant, parallel, dtype, device)
