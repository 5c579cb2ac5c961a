"""What goes to the ranks: refused before anything starts, and no more bytes than needed."""

import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ipyparallel.cluster.cluster import Cluster

import stepmoe as sm
from stepmoe.launch import arguments, cluster


def test_any_kind_of_integer_counts_ranks() -> None:
    for n in (2, np.int64(2), torch.tensor(2)):
        count = arguments.checked(n, "cpu", "local", {})
        assert count == 2
        assert type(count) is int


def test_options_that_go_nowhere_are_refused() -> None:
    """`controler_ip` was accepted, and the ranks stayed on the loopback interface."""
    with pytest.raises(sm.ConfigError, match=r"'controler_ip' is not known.*controller_ip"):
        arguments.checked(2, "cpu", "local", {"controler_ip": "*"})
    with pytest.raises(sm.ConfigError, match="'n' is not known"):  # Ranks says that
        arguments.checked(2, "cpu", "local", {"n": 3})
    arguments.checked(2, "cpu", "local", dict.fromkeys(arguments.OPTIONS))


def test_a_module_that_no_import_finds_travels_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose name an import finds elsewhere: here, the standard library's `this`."""
    for name in ("loaded_by_hand", "this"):
        file = tmp_path / f"{name}.py"
        file.write_text("def helper(x):\n    return x + 1\ndef use(x):\n    return 2 * helper(x)\n")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        payload = arguments.packed(module.use, (), {})
        monkeypatch.delitem(sys.modules, name)
        use, _, _ = pickle.loads(payload)
        assert use(3) == 8


def test_several_ranks_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """It made a world of one, silently."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(sm.ConfigError, match="WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT not"):
        sm.init_distributed("cpu")


def test_ipyparallel_knows_the_options() -> None:
    aliases = {"controller"}  # a parameter of Cluster.__init__
    assert set(arguments.OPTIONS) - aliases <= set(Cluster.class_trait_names())


def test_arguments_of_the_controller_are_added_to_ours(tmp_path: Any) -> None:
    """They replaced ours, and the caller's list grew with every use."""
    options: dict[str, Any] = {"controller_args": ["--debug"], "controller_ip": "*"}
    given = cluster._settings(tmp_path, True, options)["controller_args"]
    assert {"--nodb", "--debug", "--IPController.enable_curve=True"} <= set(given)
    assert options["controller_args"] == ["--debug"]


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole[3],
        lambda whole: whole[:, 5:7],
        lambda whole: whole.t()[:2],
        lambda whole: whole[:0],
        lambda whole: torch.nn.Parameter(whole)[1],
        lambda whole: torch.nn.Parameter(whole[1]),
        lambda whole: {"nested": [whole[2:3]]}["nested"][0],
    ],
)
def test_of_a_view_only_what_it_shows_is_sent(view: Any) -> None:
    tensor = view(torch.randn(1000, 250))
    payload = arguments.packed(print, (tensor,), {})
    assert len(payload) < tensor.numel() * 4 + 2000, "1 MB for a few numbers"
    _, (arrived,), _ = pickle.loads(payload)
    assert torch.equal(arrived, tensor)
    assert type(arrived) is type(tensor)
    assert arrived.requires_grad == tensor.requires_grad


def test_a_whole_tensor_keeps_its_strides() -> None:
    """A transposed one shows all its memory, an expanded one more: neither is copied out."""
    for tensor in (torch.randn(30, 20).t(), torch.randn(1, 20).expand(500, 20)):
        payload = arguments.packed(print, (tensor,), {})
        _, (arrived,), _ = pickle.loads(payload)
        assert torch.equal(arrived, tensor)
        assert arrived.stride() == tensor.stride()
        assert len(payload) < 600 * 4 + 2000
