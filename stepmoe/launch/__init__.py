"""Persistent ranks behind a notebook, and the same functions under torchrun."""

from stepmoe.launch.progress_bar import progress
from stepmoe.launch.rank import init_distributed, rank_device
from stepmoe.launch.ranks import Ranks

__all__ = ["Ranks", "init_distributed", "progress", "rank_device"]
