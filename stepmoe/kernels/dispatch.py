"""Where it is decided whether an operation runs as a GPU kernel or as its plain torch reference.

Each operation of this package is a plain torch function, readable and good for any device and
dtype. Decorated with `gpu_version`, a call whose tensors are all on a CUDA device in float32,
bfloat16 or float16 goes to the function of the same name in the module beside it. The reference
keeps float64 (the oracle's dtype) and calls that autograd watches (the kernels have no backward).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OPERATION = "operation "
_annotates = False

WHY_REFERENCE = (
    "kernels: Triton is not installed, so norms, SwiGLU, router and experts run as plain torch "
    "operations on the GPU: pip install 'stepmoe[cuda]'"
)


def gpu_version(module: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Mark a reference whose GPU version has the same name and signature in `module`."""

    def decorate(reference: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(reference)
        def dispatched(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            run = reference
            if takes_kernel(*args, *kwargs.values()):
                run = getattr(importlib.import_module(module), reference.__name__)
            if not _annotates:
                return run(*args, **kwargs)
            with torch.profiler.record_function(OPERATION + reference.__name__):
                return run(*args, **kwargs)

        return dispatched

    return decorate


@contextmanager
def annotated() -> Iterator[None]:
    """Let torch.profiler, where it runs, see every operation by the name OPERATION + its own."""
    global _annotates
    _annotates = True
    try:
        yield
    finally:
        _annotates = False


def takes_kernel(*args: Any) -> bool:
    """Whether a call with these arguments goes to a GPU kernel."""
    tensors = list(_tensors(args))
    if not tensors or not all(map(on_gpu, tensors)) or not has_triton():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(t.dtype in _DTYPES for t in tensors if t.is_floating_point())


def on_gpu(tensor: Tensor) -> bool:
    """Where kernels run. Tests put Triton's interpreter here, for which any tensor will do."""
    return tensor.is_cuda


@functools.cache
def has_triton() -> bool:
    """Whether the kernels can be compiled here; `WHY_REFERENCE` says what runs if not."""
    return importlib.util.find_spec("triton") is not None


def _tensors(args: tuple[Any, ...]) -> Any:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(tuple(vars(value).values()))
