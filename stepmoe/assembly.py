"""The tensors of a model put together, one by one, from the slices that its ranks hold."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe import fp8
from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.handover import receive, send_to_first
from stepmoe.kernels.block_scale import FP8, BlockScaled
from stepmoe.model.merged import weight_views
from stepmoe.parallel import TensorLayout, tensor_layouts


class Assembly:
    """Published tensors of a model, whole, in the first rank of its group.

    That one calls `whole` for every name of `shapes` in order; each other rank calls `hand_over`
    meanwhile.

    Attributes:
        views: this rank's slices by published name.
        shapes: of the whole tensors, without scales.
    """

    def __init__(self, model: Step3p5ForCausalLM) -> None:
        config, parallel = model.config, model.parallel
        self.views, self._group = weight_views(model), model.groups["tp"]
        self._layouts = [tensor_layouts(config, parallel, rank) for rank in range(parallel.tp)]
        self.shapes = {name: layout.shape for name, layout in self._layouts[0].items()}

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is held."""
        view = self.views[name]
        return view.weight.dtype if isinstance(view, BlockScaled) else view.dtype

    def hand_over(self) -> None:
        """Send the first rank what it needs of this one."""
        for name in self.shapes:
            if self._group.index in self._holders(name):
                for part in self._own(name):
                    send_to_first(part, self._group)

    def whole(self, name: str) -> dict[str, Tensor]:
        """A tensor on the CPU, in memory of its own, and after one in FP8 its scales, by name.

        Raises:
            CheckpointError: a block has several scales.
        """
        shape, dtype = self.shapes[name], self.dtype(name)
        tensors = {name: torch.empty(shape, dtype=dtype)}
        if dtype is FP8:
            tensors[name + fp8.SCALE] = torch.full(
                fp8.scale_shape(shape), torch.nan, dtype=torch.float32
            )
        for rank, layout in self._holders(name).items():
            places = (layout.slices, fp8.scale_slices(layout.slices))[: len(tensors)]
            targets = [whole[at] for whole, at in zip(tensors.values(), places, strict=True)]
            if rank == self._group.index:
                parts = self._own(name)
            else:
                parts = [receive(part.shape, part.dtype, rank, self._group) for part in targets]
            if dtype is FP8:
                fp8.expect_same_scales(targets[1], parts[1], name)
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part)
        return tensors

    def _holders(self, name: str) -> dict[int, TensorLayout]:
        """The ranks whose slices make up a tensor: of those that hold the same one, the lowest."""
        first: dict[TensorLayout, int] = {}
        for rank, layouts in enumerate(self._layouts):
            first.setdefault(layouts[name], rank)
        return {rank: layout for layout, rank in first.items()}

    def _own(self, name: str) -> list[Tensor]:
        """What this rank holds of a tensor, on the CPU: its numbers, and in FP8 their scales."""
        view = self.views[name]
        if isinstance(view, Tensor):
            return [view.cpu()]
        slices = self._layouts[self._group.index][name].slices
        return [part.cpu() for part in fp8.as_published(view, slices, name)]
