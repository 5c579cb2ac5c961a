"""What a command refuses because of this machine: too little memory, no place to write."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.filling import weight_bytes
from stepmoe.fp8 import Quantization
from stepmoe.parallel import ParallelConfig


def check_memory(
    config: Step3p5Config,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    device: str,
    quantization: Quantization = None,
) -> None:
    """Raise ConfigError where the weights alone do not fit: the system would kill the ranks."""
    weights = weight_bytes(config, parallel, dtype, quantization)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", parallel.processes))
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        there = torch.cuda.get_device_properties(0).total_memory
        needed, what = weights * -(-here // gpus), "a GPU"
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed, what = weights * here, "this machine"
    if needed > there:
        form = "FP8 weights" if quantization else dtype
        raise ConfigError(
            f"the weights of --shape take {needed / 2**30:,.0f} GiB with tp={parallel.tp} and "
            f"{form}; {what} has {there / 2**30:,.0f}. Choose another shape, tp or dtype"
        )


def check_writable(file: Path | None) -> None:
    """Raise ConfigError where a result could not be written."""
    if file is None:
        return
    is_new = not file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"cannot write into {file} ({error.strerror}): give another file, in a folder that is "
            "there"
        ) from error
    if is_new:
        file.unlink(missing_ok=True)  # ranks of torchrun try at the same time
