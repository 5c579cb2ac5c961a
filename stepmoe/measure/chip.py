"""What the GPU at hand can do at best, measured: the two rates that a floor is made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from stepmoe.measure.clock import seconds_of
from stepmoe.roofline import Chip

_SIDE = 8192  # of the matrices: 1.1 TFLOP a product
_COPY = 2**30  # bytes, beyond any cache
_REPEATS = 20


def measure_chip(device: torch.device) -> Chip:
    """Matrix products in bfloat16 and copies within its memory; takes some 0.1 s on a GPU."""
    left, right = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = _median(lambda: left @ right, device)
    source = torch.ones(_COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    return Chip(
        torch.cuda.get_device_name(device),
        2 * _SIDE**3 / product,
        2 * _COPY / copy,  # read and written
        f"measured with torch {torch.__version__}: bf16 {_SIDE}^3 matmul; device-to-device copy",
    )


def _median(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, after three that do not count."""
    times = [seconds_of(run, device) for _ in range(3 + _REPEATS)]
    return statistics.median(times[3:])
