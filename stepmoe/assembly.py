"""The tensors of a model put together, one by one, from the slices that its ranks hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

    That one calls `collect_scales`, then `whole` for every name of `shapes` in order; each other
    rank calls `hand_over` meanwhile.

    Attributes:
        views: this rank's slices by published name.
        shapes: of the whole tensors, without scales.
    """

    def __init__(self, model: Step3p5ForCausalLM) -> None:
        config, parallel = model.config, model.parallel
        self.views, self._group = weight_views(model), model.groups["tp"]
        self._layouts = [tensor_layouts(config, parallel, rank) for rank in range(parallel.tp)]
        self.shapes = {name: layout.shape for name, layout in self._layouts[0].items()}
        self._scales: dict[str, Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is held."""
        view = self.views[name]
        return view.weight.dtype if isinstance(view, BlockScaled) else view.dtype

    def hand_over(self) -> None:
        """Send the first rank what it needs of this one.

        Raises:
            CheckpointError: a block has several scales on this rank; no weight was sent.
        """
        in_fp8 = [name for name in self.shapes if self.dtype(name) is FP8]
        for own, names in ((self._own_scales, in_fp8), (self._own, self.shapes)):
            for name in names:
                if self._group.index in self._holders(name):
                    send_to_first(own(name), self._group)

    def collect_scales(self) -> None:
        """Take the scales of all weights in FP8, a 4096th of their bytes, before any is written.

        Raises:
            CheckpointError: a block has several scales.
        """
        for name, shape in self.shapes.items():
            if self.dtype(name) is FP8:
                scales = torch.full(fp8.scale_shape(shape), torch.nan, dtype=torch.float32)
                holders = self._holders(name).items()
                places = {rank: scales[fp8.scale_slices(at.slices)] for rank, at in holders}
                for place, part in self._parts(name, places, self._own_scales):
                    fp8.expect_same_scales(place, part, name)
                    place.copy_(part)
                self._scales[name] = scales

    def whole(self, name: str) -> dict[str, Tensor]:
        """A tensor on the CPU, in memory of its own, and after one in FP8 its scales, by name."""
        whole = torch.empty(self.shapes[name], dtype=self.dtype(name))
        places = {rank: whole[at.slices] for rank, at in self._holders(name).items()}
        for place, part in self._parts(name, places, self._own):
            place.copy_(part)
        tensors = {name: whole}
        if whole.dtype is FP8:
            tensors[name + fp8.SCALE] = self._scales[name]
        return tensors

    def _parts(
        self, name: str, places: dict[int, Tensor], own: Callable[[str], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each place with what belongs there: of this rank its `own`, of the others what they send.

        Args:
            places: in a whole tensor, by the rank whose part is to be written there.
        """
        for rank, place in places.items():
            if rank == self._group.index:
                yield place, own(name)
            else:
                yield place, receive(place.shape, place.dtype, rank, self._group)

    def _holders(self, name: str) -> dict[int, TensorLayout]:
        """The ranks whose slices make up a tensor: of those that hold the same one, the lowest."""
        first: dict[TensorLayout, int] = {}
        for rank, layouts in enumerate(self._layouts):
            first.setdefault(layouts[name], rank)
        return {rank: layout for layout, rank in first.items()}

    def _own(self, name: str) -> Tensor:
        """What this rank holds of a tensor, without scales, on the CPU."""
        view = self.views[name]
        return (view if isinstance(view, Tensor) else fp8.kept_numbers(view)).cpu()

    def _own_scales(self, name: str) -> Tensor:
        """Those of the blocks that its slice touches, on the CPU."""
        view = self.views[name]
        assert isinstance(view, BlockScaled)
        slices = self._layouts[self._group.index][name].slices
        return fp8.kept_scales(view, slices, name).cpu()
