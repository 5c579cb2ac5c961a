"""stepmoe: learn, check and measure how a tensor-parallel MoE layer's communication is made cheap.

import stepmoe as sm
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stepmoe import measure
    from stepmoe.capture import Capture
    from stepmoe.causal_lm import Step3p5ForCausalLM
    from stepmoe.comm.ledger import Ledger
    from stepmoe.config import Step3p5Config
    from stepmoe.errors import (
        CheckpointError,
        ConfigError,
        PlacementError,
        RankError,
        RankTimeout,
    )
    from stepmoe.launch import Ranks, init_distributed, progress
    from stepmoe.parallel import ParallelConfig
    from stepmoe.variants import VARIANTS

# Imported on first use: a new rank needs none of the model, and importing torch.distributed's
# tensor classes in every rank would cost a third of the start.
_HOME = {
    "Capture": "stepmoe.capture",
    "CheckpointError": "stepmoe.errors",
    "ConfigError": "stepmoe.errors",
    "Ledger": "stepmoe.comm.ledger",
    "ParallelConfig": "stepmoe.parallel",
    "PlacementError": "stepmoe.errors",
    "RankError": "stepmoe.errors",
    "RankTimeout": "stepmoe.errors",
    "Ranks": "stepmoe.launch",
    "Step3p5Config": "stepmoe.config",
    "Step3p5ForCausalLM": "stepmoe.causal_lm",
    "VARIANTS": "stepmoe.variants",
    "init_distributed": "stepmoe.launch",
    "measure": "stepmoe.measure",
    "progress": "stepmoe.launch",
}

__all__ = [
    "VARIANTS",
    "Capture",
    "CheckpointError",
    "ConfigError",
    "Ledger",
    "ParallelConfig",
    "PlacementError",
    "RankError",
    "RankTimeout",
    "Ranks",
    "Step3p5Config",
    "Step3p5ForCausalLM",
    "__version__",
    "init_distributed",
    "measure",
    "progress",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stepmoe' has no attribute {name!r}")
    home = importlib.import_module(_HOME[name])
    value = home if _HOME[name] == f"stepmoe.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
