"""Read the published safetensors layout, one file or an index of shards, slice by slice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepmoe.errors import CheckpointError
from stepmoe.parallel import TensorLayout

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Checkpoint:
    """The tensors of a checkpoint folder, by name. Reads headers at once, data on demand.

    Args:
        path: a folder with model.safetensors or model.safetensors.index.json, or one file.

    Raises:
        CheckpointError: nothing to read there, or a file is missing, truncated or not safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handles: dict[Path, Any] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, Path]:
        """Which file holds which tensor."""
        if self.path.is_file() and self.path.suffix == ".safetensors":
            return dict.fromkeys(self._open(self.path).keys(), self.path)
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            return self._from_index(index)
        single = self.path / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        raise CheckpointError(
            f"{self.path} holds neither model.safetensors nor model.safetensors.index.json: "
            "give the folder of a downloaded checkpoint"
        )

    def _from_index(self, index: Path) -> dict[str, Path]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            located = {name: self.path / file for name, file in weight_map.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} has no usable weight_map: {error}") from error
        for file in sorted(set(located.values())):
            present = set(self._open(file).keys())
            named = {name for name, where in located.items() if where == file}
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
            file = self._file_of[name]
            if name.endswith("weight_scale_inv"):
                raise CheckpointError(
                    f"tensor {name} of {file}: FP8 checkpoints are not supported yet, "
                    "use the bf16 one"
                )
            raise CheckpointError(
                f"tensor {name} of {file} is surplus: "
                "a model of this config.json has no such tensor"
            )
        for name, layout in layouts.items():
            file = self._file_of[name]
            shape = tuple(self._open(file).get_slice(name).get_shape())
            if shape != layout.shape:
                raise CheckpointError(
                    f"tensor {name} of {file} has shape {shape}, config.json implies {layout.shape}"
                )

    def read(self, name: str, layout: TensorLayout) -> Tensor:
        """This rank's slice of a tensor, in the stored dtype, on the CPU."""
        file = self._file_of[name]
        try:
            tensor: Tensor = self._open(file).get_slice(name)[layout.slices]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} of {file} cannot be read: {error}") from error
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"tensor {name} of {file} is {tensor.dtype}: expected float32, bfloat16 or float16"
            )
        return tensor


def random_tensor(name: str, layout: TensorLayout, seed: int) -> Tensor:
    """This rank's slice of a random float32 tensor that every rank draws alike.

    Matrices have entries of standard deviation 1 / sqrt(fan-in), so that activations keep their
    scale; norms and router biases are small and never zero.
    """
    generator = torch.Generator().manual_seed(hash_name(f"{seed}:{name}"))
    full = torch.randn(layout.shape, generator=generator)
    return full[layout.slices].mul_(_scale(name, layout))


def random_part(name: str, layout: TensorLayout, seed: int, device: torch.device) -> Tensor:
    """The same for a rank that is simulated alone: its slice only, drawn on the device.

    One seed gives one tensor for each slice (and kind of device), of the same distribution as
    `random_tensor`, but with other values: no whole tensor exists of which it is a part.
    """
    seed = hash_name(f"{seed}:{name}:{layout.slices}")
    generator = torch.Generator(device).manual_seed(seed)
    part = torch.randn(layout.local_shape, generator=generator, device=device)
    return part.mul_(_scale(name, layout))


def _scale(name: str, layout: TensorLayout) -> float:
    if len(layout.shape) == 1:
        return 0.1
    return 1.0 if "embed_tokens" in name else layout.shape[-1] ** -0.5


def hash_name(text: str) -> int:
    """A seed from a text, the same in every process (Python's own hash is not)."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
