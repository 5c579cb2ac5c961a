"""Give a model that has shapes only the modules that hold their weights in FP8."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from stepmoe.model.experts import ExpertWeights
from stepmoe.model.fp8 import Fp8ExpertWeights, Fp8Linear, is_quantised
from stepmoe.model.merged import MergedLinear
from stepmoe.parallel import TensorLayout


def hold_in_fp8(model: nn.Module, layouts: Mapping[str, TensorLayout]) -> None:
    """Put an FP8 module in the place of every linear map and stack of experts that is quantised.

    Args:
        layouts: of this rank, by published name; say where slices cut blocks.
    """
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, MergedLinear | ExpertWeights):
            sizes = module.parts
        elif isinstance(module, nn.Linear):
            sizes = {leaf: module.out_features}
        else:
            continue
        names = {part: f"{parent}.{part}.weight" for part in sizes}
        parts = {part: layouts[name].slices for part, name in names.items() if is_quantised(name)}
        plain = {part: size for part, size in sizes.items() if part not in parts}
        if not parts:
            continue
        held = (
            Fp8ExpertWeights(parts)
            if isinstance(module, ExpertWeights)
            else Fp8Linear(parts, plain)
        )
        setattr(model.get_submodule(parent), leaf, held)
