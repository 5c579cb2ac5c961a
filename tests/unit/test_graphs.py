"""Graphs end before the groups whose collectives they hold. With stand-ins; no GPU needed."""

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers "fake")

from stepmoe import command
from stepmoe.comm.graphs import capture, new_graph
from stepmoe.launch import rank

ROOT = Path(__file__).parents[2]


@pytest.fixture
def group():
    """Of two ranks, one of them this process, without a connection."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_graph_that_is_still_alive_ends_before_the_group(group, monkeypatch):
    ended = []

    class Graph:
        def reset(self):
            ended.append(dist.is_initialized())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    kept = new_graph()
    new_graph()  # gone at once
    rank.leave()
    assert ended == [True], "not each that is alive, once, while there is a group"
    assert not dist.is_initialized()
    assert kept


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_takes_its_workspace_from_the_graph_and_leaves_none(fails, monkeypatch):
    happened = []

    @contextmanager
    def graph(made, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", "stream", "thread_local")
        happened.append("begin")
        try:
            yield
        finally:
            happened.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {"reset": lambda self: None}))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    clear = partial(happened.append, "clear")
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    expected = pytest.raises(ValueError, match="no") if fails else nullcontext()
    with expected, capture("pool", "stream"):
        happened.append("captured")
        if fails:
            raise ValueError("no")
    assert happened == ["clear", "begin", "captured", "end", "clear"]


def test_a_graph_ends_with_a_process_that_failed():
    script = """if True:
        import torch
        from stepmoe.comm.graphs import new_graph

        class Graph:
            def reset(self):
                print("ended")

        torch.cuda.CUDAGraph = Graph
        kept = new_graph()
        raise ValueError("no")
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "ended\n"
    assert done.stderr.endswith("ValueError: no\n")


def test_a_rank_of_torchrun_that_fails_does_not_wait_for_the_others(group, monkeypatch):
    """They wait for it in a collective, and NCCL's end waits for that: its error was never said."""

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {"parallel": command.ParallelConfig(2)}
    with pytest.raises(RuntimeError, match="out of memory"):
        command._measure(fail, arguments, "auto")
    assert dist.is_initialized(), "the group was destroyed"
    assert command._measure(lambda **_: "a frame", arguments, "auto") == "a frame"
    assert not dist.is_initialized()
