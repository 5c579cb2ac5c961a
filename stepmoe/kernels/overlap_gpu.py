"""Kernels that start while the one before still runs (CUDA: programmatic dependent launch).

A decode step is many short kernels in a row. Without overlap each starts when the last program of
the one before has ended and its results are written. With it, a kernel's programs take what room
there is beforehand, read what no kernel writes (weights), and then wait. Works within a CUDA graph
as well; needs compute capability 9 (Hopper).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def overlap(x: Tensor) -> dict[str, bool]:
    """Options of the launch of a kernel that has the argument OVERLAPS and calls `wait`."""
    overlaps = is_hopper_or_newer(x)
    return {"OVERLAPS": overlaps, "launch_pdl": overlaps}


def is_hopper_or_newer(x: Tensor) -> bool:
    """Whether x is on a GPU whose hardware lets kernels overlap, and copies tiles by descriptor."""
    return x.is_cuda and _capability(x.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """First in a program: once all of them got here, the next kernel's may start, and wait."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAPS: tl.constexpr):
    """Goes on when all kernels before have ended and what they wrote is there.

    Every program calls this, before it reads or writes anything that another kernel writes.
    """
    if OVERLAPS:
        gdc_wait()
