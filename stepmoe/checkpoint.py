"""Read the published safetensors layout, bf16 or FP8, one file or an index of shards, by slices.

What is read is copied at once to where it stays: memory holds a piece of one tensor beside that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepmoe import fp8
from stepmoe.errors import CheckpointError
from stepmoe.hub import INDEX, SINGLE, files_of, read_weight_map
from stepmoe.kernels.block_scale import BlockScaled
from stepmoe.parallel import TensorLayout

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DTYPES = ("BF16", "F16", "F32", "F64")  # safetensors' names
_FP8 = "F8_E4M3"
_PIECE = 2**24  # numbers that are read at once: 64 MiB in float32


class Checkpoint:
    """The tensors of a checkpoint folder, by name. Reads headers at once, data on demand.

    Args:
        path: a folder with model.safetensors or model.safetensors.index.json, or one file.
        layers: the decoder layers to use; tensor names then count them from 0, in this order. Files
            that hold none of their tensors need not be there. None means all.

    Raises:
        CheckpointError: nothing to read there, or a file is missing, truncated or not safetensors.
    """

    def __init__(self, path: str | Path, layers: Sequence[int] | None = None) -> None:
        self.path, self.layers = Path(path), layers
        self._handles: dict[Path, Any] = {}
        located = self._locate()
        self._stored = dict(self._renamed(located))
        self._file_of = {name: located[stored] for name, stored in self._stored.items()}

    def _renamed(self, located: dict[str, Path]) -> Iterator[tuple[str, str]]:
        """The name of every tensor in a model of the chosen layers, and in the file."""
        for stored in located:
            layer = _LAYER.match(stored)
            if layer is None or self.layers is None:
                yield stored, stored
                continue
            for new, old in enumerate(self.layers):
                if int(layer[1]) == old:
                    yield f"model.layers.{new}.{stored[layer.end() :]}", stored

    def _locate(self) -> dict[str, Path]:
        """Which file holds which tensor."""
        if self.path.is_file() and self.path.suffix == ".safetensors":
            return dict.fromkeys(self._open(self.path).keys(), self.path)
        index = self.path / INDEX
        if index.is_file():
            return self._from_index(index)
        single = self.path / SINGLE
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        raise CheckpointError(
            f"{self.path} holds neither model.safetensors nor model.safetensors.index.json: "
            "give the folder of a downloaded checkpoint"
        )

    def _from_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_weight_map(index)
        every = {name: self.path / file for name, file in weight_map.items()}
        located = {name: every[name] for name in files_of(weight_map, self.layers)}
        for file in sorted(set(located.values())):
            present = set(self._open(file).keys())
            named = {name for name, where in every.items() if where == file}
            for name in sorted(named - present):
                raise CheckpointError(
                    f"tensor {name}: {index.name} places it in {file}, which lacks it"
                )
            for name in sorted(present - named):
                raise CheckpointError(f"tensor {name} of {file} is not in {index.name}")
        return located

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing: download it again")
            try:
                self._handles[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file ({error}): download it again"
                ) from error
        return self._handles[file]

    def expect(self, layouts: dict[str, TensorLayout], num_layers: int) -> None:
        """Check names and shapes against what a model of num_layers layers needs.

        Tensors of layers num_layers and up are ignored: they are multi-token-prediction layers.

        Raises:
            CheckpointError: names the first missing, surplus or misshapen tensor and its file.
        """
        for name in sorted(layouts.keys() - self._file_of.keys()):
            raise CheckpointError(f"tensor {name} is missing from {self.path}")
        for name in sorted(self._file_of.keys() - layouts.keys()):
            layer = _LAYER.match(name)
            if layer and int(layer[1]) >= num_layers:
                continue
            weight = name.removesuffix(fp8.SCALE)
            if weight in layouts and weight != name and self._kind(weight) == _FP8:
                continue
            why = (
                f"{weight} is not FP8"
                if weight in layouts
                else "a model of this config.json has no such tensor"
            )
            raise CheckpointError(f"tensor {name} of {self._file_of[name]} is surplus: {why}")
        for name, layout in layouts.items():
            self._expect_tensor(name, layout.shape)

    def _expect_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        kind, where = self._kind(name), f"tensor {name} of {self._file_of[name]}"
        found = tuple(self._slice(name).get_shape())
        if found != shape:
            raise CheckpointError(f"{where} has shape {found}, config.json implies {shape}")
        if kind == _FP8:
            if name + fp8.SCALE not in self._file_of:
                raise CheckpointError(
                    f"{where} is FP8, and its scales, tensor {name + fp8.SCALE}, are missing"
                )
            self._expect_tensor(name + fp8.SCALE, fp8.scale_shape(shape))
        elif kind not in _DTYPES:
            raise CheckpointError(
                f"{where} is {kind}: expected one of {', '.join(_DTYPES)}, or {_FP8} with scales"
            )

    @property
    def is_fp8(self) -> bool:
        """Whether some weights are stored in FP8."""
        return any(self._kind(name) == _FP8 for name in self._file_of)

    def copy_into(self, target: Tensor | BlockScaled, name: str, layout: TensorLayout) -> None:
        """Read this rank's slice of a tensor into `target`, which has its shape; converts dtypes.

        FP8 weights are multiplied by the scales of their blocks in float32, or, where the target
        holds FP8, kept. What is stored otherwise is quantised for such a target.
        """
        if isinstance(target, BlockScaled):
            self._keep_blocks(target, name, layout)
            return
        rows = max(1, _PIECE // max(1, target[0].numel()))
        first, *others = layout.slices
        for start in range(first.start, first.stop, rows):
            stop = min(start + rows, first.stop)
            part = target[start - first.start : stop - first.start]
            part.copy_(self._piece(name, (slice(start, stop), *others), part))

    def _keep_blocks(self, target: BlockScaled, name: str, layout: TensorLayout) -> None:
        device = target.weight.device
        for begin, slices in fp8.pieces(layout.slices, _PIECE):
            if self._kind(name) == _FP8:
                scale = self._read(name + fp8.SCALE, fp8.scale_slices(slices)).to(device)
                fp8.keep(target, begin, self._read(name, slices).to(device), scale, slices)
            else:
                values = self._read(name, fp8.hull(slices, layout.shape)).to(device)
                fp8.quantise_into(target, begin, values, slices)

    def _piece(self, name: str, slices: tuple[slice, ...], like: Tensor) -> Tensor:
        """One slice: as stored, or if that is FP8, multiplied out to float32 on the device."""
        weight = self._read(name, slices)
        if self._kind(name) != _FP8:
            return weight
        scale = self._read(name + fp8.SCALE, fp8.scale_slices(slices))
        return fp8.dequantise(weight.to(like.device), scale.to(like.device), slices)

    def _read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        try:
            tensor: Tensor = self._slice(name)[slices]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"tensor {name} of {self._file_of[name]} cannot be read: {error}"
            ) from error
        return tensor

    def _kind(self, name: str) -> str:
        """The stored dtype, in safetensors' words."""
        kind: str = self._slice(name).get_dtype()
        return kind

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(self._stored[name])
