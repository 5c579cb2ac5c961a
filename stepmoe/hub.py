"""A checkpoint by its name on the Hugging Face Hub: what is in the local cache, else downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepmoe.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def locate(path: str | Path, layers: Sequence[int] | None = None) -> Path:
    """A checkpoint's folder: `path` itself if it is one, or what the hub has under that name.

    Nothing is asked of the network for files that are in the hub's cache.

    Args:
        path: a folder, or a name such as "stepfun-ai/Step-3.5-Flash".
        layers: only the files that hold these decoder layers are fetched; None means all.

    Raises:
        CheckpointError: a file, or nothing; or a hub name, and huggingface_hub is not installed,
            the network is not there, or the hub has no such model.
    """
    if Path(path).is_file():
        raise CheckpointError(
            f"{path} is a file: give the folder that holds config.json and the safetensors files"
        )
    if Path(path).exists():
        return Path(path)
    if not _NAME.fullmatch(str(path)):
        raise CheckpointError(
            f"{path} does not exist: give the folder of a downloaded checkpoint, or its name on "
            "the Hugging Face Hub, such as stepfun-ai/Step-3.5-Flash"
        )
    get = _downloader(str(path))
    folder = get("config.json").parent
    try:
        weight_map = read_weight_map(get(INDEX))
    except FileNotFoundError:
        get(SINGLE)
        return folder
    for file in sorted(set(files_of(weight_map, layers).values())):
        get(file)
    return folder


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file, from the index of a checkpoint in several files.

    Raises:
        CheckpointError: the index is not what its name says.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("it must name a file for every tensor")
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # no UTF-8, no JSON, ...
        raise CheckpointError(
            f"{index} has no usable weight_map ({error}): download it again"
        ) from error
    return dict(weight_map)


def files_of(weight_map: dict[str, str], layers: Sequence[int] | None) -> dict[str, str]:
    """The part of an index that a model of these layers needs: tensor name to file."""
    if layers is None:
        return weight_map

    def is_wanted(name: str) -> bool:
        layer = _LAYER.match(name)
        return layer is None or int(layer[1]) in layers

    return {name: file for name, file in weight_map.items() if is_wanted(name)}


def _downloader(name: str) -> Callable[[str], Path]:
    """A function from a file's name to its path in the cache; FileNotFoundError: no such file."""
    try:
        hub: Any = __import__("huggingface_hub")
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"{name} is no folder here. To look for it on the Hugging Face Hub: pip install "
            "'stepmoe[hub]'; or give the folder of a downloaded checkpoint"
        ) from error

    def get(file: str) -> Path:
        try:
            return Path(hub.hf_hub_download(name, file, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            pass
        try:
            return Path(hub.hf_hub_download(name, file))
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{name} is neither a folder here nor a model of the Hugging Face Hub that you may "
                "read: check the spelling, or log in with `hf auth login`"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{file} of {name} is not in the cache and the Hugging Face Hub cannot be reached: "
                f"on a machine with network run `hf download {name}`, then give that folder"
            ) from error
        except errors.EntryNotFoundError as error:
            raise FileNotFoundError(f"{name} has no {file}") from error

    return get
