"""What the GPU at hand can do at best, measured: the rates that a floor is made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from stepmoe.measure.clock import seconds_of
from stepmoe.roofline import Chip

_SIDE = 8192  # of the matrices: 1.1 TFLOP a product
_COPY = 2**30  # bytes, beyond any cache
_REPEATS = 20
# Products for so many seconds, of which the last quarter counts. On an H200 the clock went down
# from 1980 to 1585 MHz within 0.2 s, and to 1425 within 3 s (NVML: power at its limit).
_SUSTAINED = 2.0


def measure_chip(device: torch.device) -> Chip:
    """Matrix products in bfloat16 and copies within its memory; takes some 3 s on a GPU."""
    left, right = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> object:
        return left @ right

    product = _median(multiply, device)
    source = torch.randint(256, (_COPY,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    operations = 2 * _SIDE**3
    return Chip(
        torch.cuda.get_device_name(device),
        operations / product,
        2 * _COPY / copy,  # read and written
        f"measured with torch {torch.__version__}: bf16 {_SIDE}^3 matmul; device-to-device copy",
        operations / _sustained(multiply, product, device),
    )


def _median(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, after three that do not count."""
    times = [seconds_of(run, device) for _ in range(3 + _REPEATS)]
    return statistics.median(times[3:])


def _sustained(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds of one call of many in a row, at the end of _SUSTAINED seconds.

    Args:
        seconds: of one call alone.
    """
    count = max(1, round(_SUSTAINED / 4 / seconds))

    def run_many() -> None:
        for _ in range(count):
            run()

    return [seconds_of(run_many, device) for _ in range(4)][-1] / count
