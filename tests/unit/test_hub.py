"""Checkpoints by name: what is in the cache is used, what is not says what to do.

The hub is a stand-in with huggingface_hub's function and errors: no test asks the network.
"""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stepmoe as sm
from stepmoe.hub import locate

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
NAME = "someone/step-tiny"


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(EntryNotFoundError, FileNotFoundError):
    pass


class RepositoryNotFoundError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one model: `remote` is what it has, `cache` what is here, `asked` each request."""
    state = types.SimpleNamespace(
        remote=tmp_path / "remote", cache=tmp_path / "cache", asked=[], online=True
    )
    state.remote.mkdir()
    state.cache.mkdir()

    def hf_hub_download(name, file, local_files_only=False):
        if (state.cache / file).exists():
            return str(state.cache / file)
        if local_files_only:
            raise LocalEntryNotFoundError(file)
        state.asked.append(file)
        if not state.online:
            raise LocalEntryNotFoundError(file)
        if name != NAME:
            raise RepositoryNotFoundError(name)
        if not (state.remote / file).exists():
            raise EntryNotFoundError(file)
        return shutil.copy(state.remote / file, state.cache / file)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    module.errors = types.ModuleType("huggingface_hub.errors")
    for error in (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError):
        setattr(module.errors, error.__name__, error)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", module.errors)
    return state


def offer_in_files(remote):
    """Each layer in a file of its own."""
    shutil.copy(TINY / "config.json", remote)
    tensors = load_file(TINY / "model.safetensors")
    files = {n: f"layer-{n.split('.')[2]}" if ".layers." in n else "rest" for n in tensors}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, remote / file)
    (remote / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_only_the_files_of_the_layers_are_fetched_and_only_once(hub):
    offer_in_files(hub.remote)
    ids = torch.randint(256, (2, 5))
    expected = sm.Step3p5ForCausalLM.from_pretrained(TINY, layers="1,2")(ids)
    for _ in range(2):
        model = sm.Step3p5ForCausalLM.from_pretrained(NAME, layers="1-2")
        assert torch.equal(model(ids), expected)
        index = "model.safetensors.index.json"
        assert hub.asked == ["config.json", index, "layer-1", "layer-2", "rest"]


def test_one_file_without_an_index(hub):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(TINY / file, hub.remote)
    assert locate(NAME) == hub.cache
    assert (hub.cache / "model.safetensors").exists()


def test_without_network(hub):
    hub.online = False
    with pytest.raises(sm.CheckpointError, match=r"config.json of .* cannot be reached.*hf downl"):
        sm.Step3p5ForCausalLM.from_pretrained(NAME)


def test_a_name_nobody_has(hub):
    with pytest.raises(sm.CheckpointError, match="neither a folder here nor a model"):
        sm.Step3p5ForCausalLM.from_pretrained("someone/else")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(sm.CheckpointError, match=r"no folder here.*pip install 'stepmoe\[hub\]'"):
        sm.Step3p5ForCausalLM.from_pretrained(NAME)


def test_a_folder_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("a/b") == Path("a/b")
    with pytest.raises(sm.CheckpointError, match=r"nowhere does not exist: give the folder"):
        sm.Step3p5ForCausalLM.from_pretrained(tmp_path / "nowhere")
