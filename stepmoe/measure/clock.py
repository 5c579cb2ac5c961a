"""How long one run takes: between CUDA events on a GPU, by the host's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call of `run`, which has ended on `device` when this returns.

    On a GPU, what the current stream did between two events: launching is included where the GPU
    has to wait for it.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
