"""What a command refuses because of where it runs: too little memory, no place to write, no weights
where they should be, a package that is missing, torchrun where it starts its own ranks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from stepmoe.checkpoint import Checkpoint
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.filling import weight_bytes
from stepmoe.fp8 import Quantization
from stepmoe.launch.rank import torchrun_ranks
from stepmoe.measure.source import config_of
from stepmoe.parallel import ParallelConfig, tensor_layouts


def check_alone() -> None:
    """Raise ConfigError under torchrun, for a command that is one process or starts its own."""
    if (there := torchrun_ranks()) is not None:
        raise ConfigError(
            f"torchrun started {there} ranks, and this command starts what it needs: leave "
            "torchrun out"
        )


def check_packages(*names: str) -> None:
    """Raise ConfigError where a package that the library itself does not need is missing."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)}: not installed; pip install 'stepmoe[notebooks]'")


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
            f"the weights take {needed / 2**30:,.0f} GiB with tp={parallel.tp} and {form}; {what} "
            f"has {there / 2**30:,.0f}. Choose fewer layers, another tp or another dtype"
        )


def check_weights(folder: str | Path, layers: Sequence[int] | None = None) -> None:
    """Raise CheckpointError, naming the tensor and the file, where a model of these decoder layers
    cannot be read from a folder. Reads headers only."""
    config = config_of(folder, None if layers is None else tuple(layers))
    wanted = tensor_layouts(config, ParallelConfig(), 0)
    Checkpoint(folder, layers).expect(wanted, config.num_hidden_layers)


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
