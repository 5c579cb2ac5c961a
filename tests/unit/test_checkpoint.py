"""The published safetensors layout: one file or many, and every way it can be broken."""

import json
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import stepmoe as sm
from stepmoe.checkpoint import Checkpoint
from stepmoe.layers import layer_numbers
from stepmoe.parallel import tensor_layouts

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
UP = "model.layers.1.moe.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny checkpoint that a test may break."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def rewrite(folder, **changes):
    """Replace tensors by name; None removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors")


def split_in_two(folder):
    """The layout of large checkpoints: shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: tensors[n] for n in tensors if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files, weight_map


def test_an_index_of_shards_gives_the_same_model(folder):
    ids = torch.randint(256, (2, 7))
    single = sm.Step3p5ForCausalLM.from_pretrained(folder)(ids)
    split_in_two(folder)
    assert torch.equal(sm.Step3p5ForCausalLM.from_pretrained(folder)(ids), single)


def test_each_rank_reads_its_slice(folder):
    full = load_file(folder / "model.safetensors")
    config = sm.Step3p5Config.from_pretrained(folder)
    checkpoint = Checkpoint(folder)
    for rank in range(4):
        for name, layout in tensor_layouts(config, sm.ParallelConfig(4, 2), rank).items():
            part = torch.full(layout.local_shape, torch.nan)
            checkpoint.copy_into(part, name, layout)
            assert torch.equal(part, full[name][layout.slices])


def test_a_tensor_in_many_pieces_is_whole(folder, monkeypatch):
    monkeypatch.setattr("stepmoe.checkpoint._PIECE", 100)  # less than a row of some tensors
    test_each_rank_reads_its_slice(folder)


def test_some_layers_and_only_their_files(folder):
    config = sm.Step3p5Config.from_pretrained(folder)
    full = load_file(folder / "model.safetensors")
    kept = full | {f"model.layers.{new}.{name}": tensor
            for new, old in enumerate((2, 3))
            for name, tensor in own(full, old).items()}  # fmt: skip
    whole = config.with_layers(2, 3)
    kept = {name: kept[name] for name in tensor_layouts(whole, sm.ParallelConfig(), 0)}
    ids = torch.randint(256, (2, 7))
    expected = oracle.forward(whole, kept, ids)["logits"]
    files = {name: f"layer{name.split('.')[2]}" if ".layers." in name else "rest" for name in full}
    (folder / "model.safetensors").unlink()
    for file in ("layer2", "layer3", "rest"):  # the others were not downloaded
        save_file({n: full[n] for n in full if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(sm.CheckpointError, match="layer0 is missing"):
        sm.Step3p5ForCausalLM.from_pretrained(folder)
    model = sm.Step3p5ForCausalLM.from_pretrained(folder, layers="2-3", dtype=torch.float64)
    # float64, the same numbers: rounding, with room.
    torch.testing.assert_close(model(ids), expected, atol=1e-9, rtol=1e-9)


def own(tensors, layer):
    prefix = f"model.layers.{layer}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize("layers", ["", "3-1", "a", "1,1", "1-2,2", [], [1.5], "-1"])
def test_a_choice_of_layers_that_is_none(folder, layers):
    with pytest.raises(sm.ConfigError, match="layers"):
        sm.Step3p5ForCausalLM.from_pretrained(folder, layers=layers)


def test_choices_of_layers():
    assert layer_numbers("0,3-5") == (0, 3, 4, 5)
    assert layer_numbers([4, 2]) == (4, 2)


def test_prediction_layers_are_ignored(folder):
    ids = torch.randint(256, (2, 7))
    without = sm.Step3p5ForCausalLM.from_pretrained(folder)(ids)
    rewrite(folder, **{"model.layers.4.eh_proj.weight": torch.ones(3, 3)})
    assert torch.equal(sm.Step3p5ForCausalLM.from_pretrained(folder)(ids), without)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"tensor {NORM} is missing"),
        ({"model.layers.2.bias": torch.ones(2)}, r"tensor model.layers.2.bias of .* is surplus"),
        (
            {NORM: torch.ones(63)},
            rf"tensor {NORM} of .*model.safetensors has shape \(63,\).*\(64,\)",
        ),
        ({NORM: torch.ones(64, dtype=torch.int32)}, f"tensor {NORM} of .* is I32"),
        ({f"{UP}_scale_inv": torch.ones(1)}, f"{UP}_scale_inv of .* surplus: {UP} is not FP8"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(sm.CheckpointError, match=message):
        sm.Step3p5ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 5, 3000, 1_900_000])
def test_a_truncated_file_is_named(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(sm.CheckpointError, match=r"model.safetensors is truncated or not"):
        sm.Step3p5ForCausalLM.from_pretrained(folder)


def test_a_missing_shard_and_a_lying_index_are_named(folder):
    files, weight_map = split_in_two(folder)
    index = folder / "model.safetensors.index.json"
    moved = weight_map | {NORM: next(file for file in files if file != weight_map[NORM])}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(sm.CheckpointError, match=NORM):
        Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / files[1]).unlink()
    with pytest.raises(sm.CheckpointError, match=f"{files[1]} is missing"):
        Checkpoint(folder)
    for wrong in (b"[]", b"\xff\xfe{", b'{"weight_map": {"a": 5}}', b'{"weight_map": ["a"]}'):
        index.write_bytes(wrong)
        with pytest.raises(sm.CheckpointError, match="no usable weight_map"):
            Checkpoint(folder)


def test_an_empty_folder(tmp_path):
    with pytest.raises(sm.CheckpointError, match="holds neither"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_single_file_is_no_checkpoint(folder, name):
    """Of the weights it said that they were no JSON, of the config that it held no weights."""
    with pytest.raises(
        sm.CheckpointError, match=f"{name} is a file: give the folder .*config.json"
    ):
        sm.Step3p5ForCausalLM.from_pretrained(folder / name)
