"""What is written in the published layout is read back as the same model."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file

import stepmoe as sm
from stepmoe.checkpoint_writer import save_pretrained
from stepmoe.mini import config as mini_config
from stepmoe.parallel import tensor_layouts
from stepmoe.published_config import publish

PRESETS = [sm.Step3p5Config.tiny(), sm.Step3p5Config.flash(), mini_config()]
UNUSUAL = {
    "rope_scaling": None,
    "rope_scaling_layer_types": (),
    "norm_topk_prob": False,
    "router_scaling_factor": 1.5,
    "bos_token_id": 3,
    "eos_token_ids": (1, 2),
    "moe_layers": (),
    "torch_dtype": "float16",
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize("config", [*PRESETS, sm.Step3p5Config.tiny().replace(**UNUSUAL)])
def test_a_published_config_reads_back(config):
    assert sm.Step3p5Config.from_dict(json.loads(json.dumps(publish(config)))) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_model_reads_back(tmp_path, dtype):
    config = sm.Step3p5Config.tiny()
    model = sm.Step3p5ForCausalLM.from_config(config, dtype=dtype, seed=torch.seed() % 1000)
    save_pretrained(model, tmp_path / "new" / "folder")
    again = sm.Step3p5ForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert again.lm_head.weight.dtype == dtype
    assert again.config == config.replace(torch_dtype=str(dtype).removeprefix("torch."))
    ids = torch.randint(config.vocab_size, (2, 7))
    assert torch.equal(again(ids), model(ids))  # the same weights, bit for bit


def test_the_names_and_shapes_are_the_published_ones(tmp_path):
    config = sm.Step3p5Config.tiny()
    save_pretrained(sm.Step3p5ForCausalLM.from_config(config), tmp_path)
    found = {n: tuple(t.shape) for n, t in load_file(tmp_path / "model.safetensors").items()}
    layouts = tensor_layouts(config, sm.ParallelConfig(), 0)
    assert found == {name: layout.shape for name, layout in layouts.items()}


def test_a_model_in_several_files_and_another_in_its_place(tmp_path, monkeypatch):
    config = sm.Step3p5Config.tiny()
    first, second = (sm.Step3p5ForCausalLM.from_config(config, seed=seed) for seed in (1, 2))
    ids = torch.randint(config.vocab_size, (2, 7))
    with monkeypatch.context() as patched:
        patched.setattr("stepmoe.checkpoint_writer._FILE_BYTES", 150_000)
        save_pretrained(first, tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert torch.equal(sm.Step3p5ForCausalLM.from_pretrained(tmp_path)(ids), first(ids))
    save_pretrained(second, tmp_path)
    assert torch.equal(sm.Step3p5ForCausalLM.from_pretrained(tmp_path)(ids), second(ids))
    # Other engines read every safetensors file of a folder that has no index.
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("file_bytes", [150_000, 10**9])
def test_a_folder_of_links_is_overwritten_and_not_what_they_lead_to(
    tmp_path, monkeypatch, file_bytes
):
    """As the hub's cache is: a folder of links to files that other folders share."""
    config, (blobs, folder) = sm.Step3p5Config.tiny(), (tmp_path / "blobs", tmp_path / "folder")
    monkeypatch.setattr("stepmoe.checkpoint_writer._FILE_BYTES", file_bytes)
    save_pretrained(sm.Step3p5ForCausalLM.from_config(config, seed=1), blobs)
    before = {file: file.read_bytes() for file in blobs.iterdir()}
    folder.mkdir()
    for file in before:
        (folder / file.name).symlink_to(file)
    other = config.replace(rms_norm_eps=1e-3)
    save_pretrained(sm.Step3p5ForCausalLM.from_config(other, seed=2), folder)
    assert {file: file.read_bytes() for file in blobs.iterdir()} == before
    assert sm.Step3p5Config.from_pretrained(folder).rms_norm_eps == 1e-3


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("")
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny())
    with pytest.raises(sm.CheckpointError, match="x is a file: give a folder"):
        save_pretrained(model, tmp_path / "x")


def test_a_folder_without_room_is_named_and_what_is_left_cannot_be_read(tmp_path):
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny())
    save_pretrained(model, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # in place of a full disk
    try:
        with pytest.raises(sm.CheckpointError, match=f"{tmp_path} cannot be written .*too large"):
            save_pretrained(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(sm.CheckpointError, match="holds neither"):
        sm.Step3p5ForCausalLM.from_pretrained(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "x").write_text("")
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny())
    with pytest.raises(sm.CheckpointError, match=r"x/y cannot be written .*give a folder"):
        save_pretrained(model, tmp_path / "x" / "y")


def test_a_share_of_a_model_is_not_written(tmp_path):
    share = sm.Step3p5ForCausalLM.from_config(
        sm.Step3p5Config.tiny(), parallel=sm.ParallelConfig(2, simulate_rank=1)
    )
    with pytest.raises(sm.CheckpointError, match="one rank's share of tp=2"):
        save_pretrained(share, tmp_path)
    assert not list(tmp_path.iterdir())
