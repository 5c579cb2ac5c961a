"""Write a model in the published layout: config.json and safetensors, one file or an index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stepmoe.assembly import Assembly
from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.handover import meet_all
from stepmoe.errors import CheckpointError
from stepmoe.hub import INDEX, SINGLE
from stepmoe.kernels.block_scale import FP8
from stepmoe.published_config import publish, publish_fp8

_FILE_BYTES = 5_000_000_000  # of one file, unless a single tensor takes more


def save_pretrained(model: Step3p5ForCausalLM, folder: str | Path) -> None:
    """Write config.json and safetensors, which `from_pretrained` reads on any layout of ranks.

    Weights keep the dtype they have in the model; those in FP8 keep numbers and scales, to the last
    bit. The folder is made if it does not exist. A model in it is overwritten, and until the new
    one is complete there is none that could be read; a model that is refused leaves it as it was.

    Every rank calls this together, and none returns before the files are there. The first one
    writes: it needs memory for one file, 5 GB, or one tensor. The others send it their slices, in
    a torch.distributed job that carries CPU tensors, as `Ranks` and `init_distributed` make it.

    Raises:
        CheckpointError: `folder` is a file, or cannot be written to its end; the model is a
            simulated rank, whose peers do not exist; or FP8 weights were changed, so that a block
            has several scales.
    """
    path, parallel, group = Path(folder), model.parallel, model.groups["tp"]
    if parallel.simulate_rank is not None:
        raise CheckpointError(
            f"this model is one rank's share of tp={parallel.tp}, simulated alone: save it from "
            f"{parallel.tp} ranks, or where it was made with ParallelConfig(tp=1)"
        )
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file: give a folder to write the model to")
    assembly = Assembly(model)
    meet_all()  # another rank may still be reading what is in the folder
    if group.ranks[0] == 0:  # with more ranks than tp, the others hold the same model again
        if group.index == 0:
            assembly.collect_scales()  # refuses, while the folder is still what it was
            try:
                _write(path, _published_config(model, assembly), assembly)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} cannot be written ({error}): a model that was in it may be gone; give "
                    "a folder that you may write to, with room for the model"
                ) from error
        else:
            assembly.hand_over()
    meet_all()


def _write(path: Path, config: dict[str, Any], assembly: Assembly) -> None:
    path.mkdir(parents=True, exist_ok=True)
    _clear(path)
    _write_json(path / "config.json", config)
    files = list(_files(assembly))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= assembly.whole(name)
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        _write_json(path / INDEX, {"metadata": {}, "weight_map": weight_map})


def _clear(path: Path) -> None:
    """Take away the model in a folder, index first: no half of it could then be read.

    Other programs read every safetensors file that they find. And config.json may be a link into
    the hub's cache, or to another folder's: what is written must not go through it.
    """
    for name in (INDEX, SINGLE, "config.json"):
        (path / name).unlink(missing_ok=True)
    for file in path.glob("model-[0-9]*.safetensors"):
        file.unlink()


def _published_config(model: Step3p5ForCausalLM, assembly: Assembly) -> dict[str, Any]:
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    published = publish(model.config.replace(torch_dtype=dtype))
    if model.quantization is not None:
        published["quantization_config"] = publish_fp8(
            name
            for name, shape in assembly.shapes.items()
            if len(shape) == 2 and assembly.dtype(name) is not FP8 and "embed_tokens" not in name
        )
    return published


def _files(assembly: Assembly) -> Iterator[list[str]]:
    """The names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, shape in assembly.shapes.items():
        more = math.prod(shape) * assembly.dtype(name).itemsize
        if names and size + more > _FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
