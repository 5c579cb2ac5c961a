"""Write a model in the published layout: one safetensors file and its config.json."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.errors import CheckpointError
from stepmoe.model.merged import published_views
from stepmoe.published_config import publish


def save_pretrained(model: Step3p5ForCausalLM, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which `from_pretrained` reads.

    Weights keep the dtype they have in the model. The folder is made if it does not exist; files of
    these names in it are overwritten.

    Raises:
        CheckpointError: the model is one rank's share of several, so that no process has it whole.
    """
    if model.parallel.tp > 1:
        raise CheckpointError(
            f"this model is one rank's share of tp={model.parallel.tp}: save it where it was made "
            "with ParallelConfig(tp=1)"
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    published = publish(model.config.replace(torch_dtype=dtype))
    (path / "config.json").write_text(json.dumps(published, indent=1) + "\n", encoding="utf-8")
    # A view of a merged weight shares its memory with the others, which safetensors refuses.
    tensors = {
        name: view.cpu().contiguous().clone() for name, view in published_views(model).items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
