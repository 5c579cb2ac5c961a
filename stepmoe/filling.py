"""Give a model that has shapes only its weights, tensor by published tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stepmoe.config import Step3p5Config
from stepmoe.fp8 import Quantization
from stepmoe.kernels.block_scale import FP8, BlockScaled
from stepmoe.launch.progress_bar import progress
from stepmoe.model.fp8 import is_quantised
from stepmoe.model.merged import weight_views
from stepmoe.parallel import ParallelConfig, TensorLayout, tensor_layouts

# Writes this rank's slice of a published tensor into the part of the model that it is given.
Write = Callable[[Tensor | BlockScaled, str, TensorLayout], object]

_WORTH_A_BAR = 2**28  # bytes of one rank; fewer are read or drawn at once


def weight_bytes(
    config: Step3p5Config,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    quantization: Quantization = None,
) -> int:
    """What the weights of one rank take, without the scales of FP8 blocks."""
    return sum(
        math.prod(layout.local_shape)
        * (1 if quantization and is_quantised(name) else dtype.itemsize)
        for name, layout in tensor_layouts(config, parallel, 0).items()
    )


def fill_weights(
    model: nn.Module,
    layouts: Mapping[str, TensorLayout],
    write: Write,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Reserve memory of `dtype` on `device` for every parameter, and write every tensor into it.

    FP8 weights and their scales keep the dtype that they have.
    """
    state = {
        name: torch.zeros(parameter.shape, dtype=_kept(name, parameter, dtype), device=device)
        for name, parameter in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    views = list(weight_views(model).items())
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    # A copy in memory of its own: a file's offsets give every tensor another alignment, and with it
    # another order of summation in the matrix product.
    for name, view in progress(views, desc="weights") if size > _WORTH_A_BAR else views:
        write(view, name, layouts[name])


def _kept(name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    if parameter.dtype == FP8 or name.endswith("weight_scale"):
        return parameter.dtype
    # The router's bias only steers a choice between float32 scores.
    return torch.promote_types(dtype, torch.float32) if name.endswith("router_bias") else dtype
