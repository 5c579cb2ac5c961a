"""How long the kernels of each operation of a layer ran, out of a profile of whole forward passes.

The host marks layers and operations with named ranges; a kernel belongs to the ranges in which it
was launched, whenever it runs.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.kernels.dispatch import OPERATION, annotated

LAYER = "decoder layer "
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_MODULES = ("qkvg_proj", "o_proj", "down_proj")


def profile_layers(
    model: Step3p5ForCausalLM, run: Callable[[], object], passes: int
) -> dict[str, float]:
    """Seconds of the kernels of each operation in one layer, the mean over layers and passes.

    The first layer is left out: it has no residual to add to. Operations are named by their ranges,
    "outer/inner" where one calls another; "other" is what no range names.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with _marked(model), torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(passes):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    totals: dict[str, float] = defaultdict(float)
    for layer, operation, seconds in kernels_of(trace):
        if layer > 0:
            totals[operation] += seconds
    count = passes * (len(model.model.layers) - 1)
    return {name: seconds / count for name, seconds in totals.items()}


def kernels_of(trace: dict[str, Any]) -> Iterator[tuple[int, str, float]]:
    """Layer, operation and seconds of every kernel of a trace that was launched in a layer."""
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    launches = {
        event["args"]["correlation"]: event
        for event in complete
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    ranges = sorted(
        (event for event in complete if event.get("cat") == "user_annotation"),
        key=lambda event: (event["ts"], -event["dur"]),
    )
    for event in complete:
        if event.get("cat") not in _KERNELS:
            continue
        launch = launches.get(event["args"].get("correlation"))
        if launch is None:
            continue
        names = [
            r["name"]
            for r in ranges
            if r["tid"] == launch["tid"] and r["ts"] <= launch["ts"] < r["ts"] + r["dur"]
        ]
        layers = [name.removeprefix(LAYER) for name in names if name.startswith(LAYER)]
        inside = [name.removeprefix(OPERATION) for name in names if name.startswith(OPERATION)]
        if layers:
            yield int(layers[0]), "/".join(inside) or "other", event["dur"] / 1e6


@contextmanager
def _marked(model: Step3p5ForCausalLM) -> Iterator[None]:
    """Ranges around the layers, their linear maps and every dispatched operation."""
    with ExitStack() as stack:
        stack.enter_context(annotated())
        for layer in model.model.decoder_layers:
            stack.callback(_mark(layer, f"{LAYER}{layer.index}"))
            for path, module in layer.named_modules():
                name = path.rpartition(".")[2]
                if name in _MODULES:
                    stack.callback(_mark(module, OPERATION + name))
        yield


def _mark(module: nn.Module, name: str) -> Callable[[], None]:
    """A range around every forward of the module; returns what takes it off again."""
    open_ranges: list[Any] = []

    def begin(*_: Any) -> None:
        open_ranges.append(torch.profiler.record_function(name))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    before = module.register_forward_pre_hook(begin)
    after = module.register_forward_hook(end)

    def take_off() -> None:
        before.remove()
        after.remove()

    return take_off
