"""The layer's table of operations, the reading of a profile, and what the command refuses."""

import dataclasses
import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import stepmoe as sm
from stepmoe import layer_floor
from stepmoe.__main__ import main, parser
from stepmoe.measure.environment import look_around
from stepmoe.measure.kernel_times import kernels_of
from stepmoe.measure.layer_floor import LayerTime, OperationTime
from stepmoe.measure.layer_record import layer_record, layer_table
from stepmoe.measure.operations import RANGES, Work, operations, unavoidable_bytes
from stepmoe.model.experts import RoutedExperts
from stepmoe.model.mlp import GatedMLP
from stepmoe.roofline import CHIPS, layer_roofline

TINY, FLASH = sm.Step3p5Config.tiny(), sm.Step3p5Config.flash()
H100 = CHIPS["h100"]


def work(**changes):
    made = Work(
        config=FLASH,
        layer=4,
        parallel=sm.ParallelConfig(8, 4),
        batch=2,
        length=8192,
        context=8192,
        rows=32768,
        experts=72,
        tokens_here=15000,
    )
    return dataclasses.replace(made, **changes)


def test_every_operation_has_a_range_and_no_range_two():
    assert [row.name for row in operations(work())] == list(RANGES) == list(RANGES)
    every = [name for names in RANGES.values() for name in names]
    assert len(set(every)) == len(every)


def test_products_as_torch_counts():
    """The linear maps of the experts and the shared expert, counted while they run."""
    config, parallel, tokens = TINY, sm.ParallelConfig(4, 2), 30
    experts = RoutedExperts(config, config.layer(4), parallel, 1).double()
    x = torch.randn(tokens, config.hidden_size, dtype=torch.float64)
    ids = torch.rand(tokens, config.num_experts).topk(config.num_experts_per_tok).indices
    here = (ids >= experts.first_expert) & (ids < experts.first_expert + 8)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight.data)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        experts.apply_experts(x, ids, torch.rand(ids.shape))
        routed = counter.get_total_flops()
        GatedMLP(128, 16, None).double()(x)
        shared = counter.get_total_flops() - routed
    found = {
        row.name: row.operations
        for row in operations(
            work(
                config=config,
                parallel=parallel,
                batch=3,
                length=10,
                context=10,
                rows=int(here.sum()),
                experts=len(ids[here].unique()),
                tokens_here=int(here.any(-1).sum()),
            )
        )
    }
    assert routed == found["experts: gate, up"] + found["experts: down"]
    assert shared == found["shared expert: gate, up"] + found["shared expert: down"]


@pytest.mark.parametrize("layer", [4, 5])
@pytest.mark.parametrize(("batch", "length", "context"), [(2, 8192, 8192), (16, 1, 4096)])
def test_products_and_scores_are_those_of_the_roofline(layer, batch, length, context):
    """A coarser table by another hand: weights and operations agree, the floor is no lower."""
    tokens = batch * length
    experts = 72 * (1 - (1 - 8 / 288) ** tokens)
    fine = work(
        layer=layer, batch=batch, length=length, context=context, rows=tokens * 2, experts=experts
    )
    rows = {row.name: row for row in operations(fine)}
    coarse = {
        row.name: row
        for row in layer_roofline(FLASH, layer, fine.parallel, tokens, context, batch=batch)
    }
    pairs = {
        "attention projections": ("q, k, v, gate projection", "o_proj"),
        "attention scores": ("attention",),
        "router": ("router logits",),
        "routed experts": ("experts: gate, up", "experts: down"),
    }
    for name, parts in pairs.items():
        assert sum(rows[part].operations for part in parts) == pytest.approx(
            coarse[name].operations
        )
        weights = sum(rows[part].weight_bytes for part in parts)
        assert weights == pytest.approx(coarse[name].weight_bytes)
        floor = sum(rows[part].floor(H100) for part in parts)
        assert floor >= coarse[name].floor(H100) * (1 - 1e-9)


def test_bytes_of_the_rows_that_move():
    rows = {row.name: row.bytes for row in operations(work())}
    token = 4096 * 2
    assert rows["add + norm"] == 2 * 4 * 16384 * token
    assert rows["permute"] == (15000 + 32768) * token
    small = 16384 * 8 * 8  # positions and weights
    assert rows["un-permute"] == (32768 + 2 * 16384) * token + small
    apart = {row.name: row.bytes for row in operations(work(adds_shared=False))}
    assert apart["un-permute"] == (32768 + 16384) * token + small
    assert rows["experts: SwiGLU"] == 32768 * 3 * 640 * 2
    assert unavoidable_bytes(work()) == (3 * 16384 + 32768) * token


def event(name, category, start, length, correlation=None, thread=1):
    args = {} if correlation is None else {"correlation": correlation}
    return {
        "ph": "X", "name": name, "cat": category, "ts": start, "dur": length, "tid": thread,
        "args": args,
    }  # fmt: skip


def test_kernels_belong_to_the_ranges_they_were_launched_in():
    """Late kernels, nested operations, another thread, and launches outside of any layer."""
    note = "user_annotation"
    trace = {
        "traceEvents": [
            event("decoder layer 3", note, 0, 100),
            event("operation outer", note, 10, 50),
            event("operation inner", note, 20, 10),
            event("operation elsewhere", note, 0, 100, thread=2),
            event("cudaLaunchKernel", "cuda_runtime", 12, 1, 1),
            event("cuLaunchKernelEx", "cuda_driver", 22, 1, 2),
            event("cudaLaunchKernel", "cuda_runtime", 80, 1, 3),
            event("cudaLaunchKernel", "cuda_runtime", 200, 1, 4),
            event("a", "kernel", 500, 7, 1, thread=7),
            event("b", "kernel", 600, 5, 2, thread=7),
            event("c", "gpu_memset", 700, 3, 3, thread=7),
            event("d", "kernel", 800, 2, 4, thread=7),
            event("e", "kernel", 900, 2, 99, thread=7),
            {"ph": "i", "name": "mark"},
        ]
    }
    found = [(layer, name, round(seconds * 1e6)) for layer, name, seconds in kernels_of(trace)]
    assert found == [(3, "outer", 7), (3, "outer/inner", 5), (3, "other", 3)]


def test_a_layer_in_a_file_says_how_near_the_floor_it_is():
    rows = [OperationTime(row, 2 * row.floor(H100)) for row in operations(work())[:3]]
    layer = LayerTime(work(), "prefill", 8e-3, rows, 1e-4, 10**9)
    record = layer_record("full", layer, H100)
    assert [row["ratio"] for row in record["operations"]] == pytest.approx([2.0] * 3)
    floor = sum(row.needs.floor(H100) for row in rows)
    assert record["ratio"] == pytest.approx(8e-3 / floor)
    assert record["sustained_floor"] is None
    slower = layer_record("full", layer, dataclasses.replace(H100, sustained_rate=H100.rate / 2))
    assert slower["floor"] == record["floor"]
    assert slower["sustained_floor"] == sum(
        max(2 * row.needs.operations / H100.rate, row.needs.bytes / H100.bandwidth) for row in rows
    )
    assert record["memory_ratio"] == pytest.approx(1e9 / unavoidable_bytes(work()))
    add_norm = record["operations"][0]
    assert add_norm["bound"] == "memory"
    assert add_norm["bandwidth_fraction"] == pytest.approx(0.5)
    table = layer_table({"layers": [record]})
    assert table.columns.tolist() == [("prefill 2 x 8192", "full")]
    assert table.index.tolist() == [*(row.needs.name for row in rows), "whole layer"]
    least = f"{rows[0].needs.floor(H100) * 1e6:,.0f}"
    assert table.iloc[0, 0].endswith(f" / {least} = 2.00")
    assert table.iloc[-1, 0].startswith("8,000 / ")

    fewer = layer_record("full", LayerTime(work(), "decode", 8e-3, rows[::2], 1e-4, 10**9), H100)
    both = layer_table({"layers": [record, fewer]})
    assert both.index.tolist() == table.index.tolist()
    assert both.loc[rows[1].needs.name].tolist().count("") == 1


def a_gpu(monkeypatch):
    """One of 24 GB."""
    found = SimpleNamespace(total_memory=24 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)


class MadeUpStack:
    """Takes the place of what needs a GPU."""

    def __init__(self, config, layer, parallel, variant, depth):
        self.work = work(layer=layer, parallel=parallel)

    def prefill(self, batch, length):
        changed = dataclasses.replace(self.work, batch=batch, length=length, context=length)
        rows = [OperationTime(row, row.floor(H100)) for row in operations(changed)[:2]]
        return LayerTime(changed, "prefill", 1e-3, rows, 1e-4, 10**9, 2e-3)

    def decode(self, batch, context):
        changed = dataclasses.replace(self.work, batch=batch, length=1, context=context)
        return LayerTime(changed, "decode", 1e-3, [OperationTime(operations(work())[0], 1e-4)], 0)

    def growth(self, batch, steps):
        return 0


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--tp 4 --ep 2 --simulate-rank 3 --variant fused --prefill 3 77 --decode 5 9 --context 33",
        "--decode --peer",
    ],
)
def test_the_recorded_command_measures_the_same_and_names_no_file(words, tmp_path, monkeypatch):
    a_gpu(monkeypatch)
    monkeypatch.setattr(layer_floor, "_has_peer", lambda: True)
    monkeypatch.setattr("stepmoe.measure.layer_floor.Stack", MadeUpStack)
    chip = dataclasses.replace(H100, sustained_rate=0.8 * H100.rate)
    monkeypatch.setattr("stepmoe.measure.chip.measure_chip", lambda device: chip)
    monkeypatch.setattr("stepmoe.measure.peer.peer_version", lambda: "5.23")
    monkeypatch.setattr("stepmoe.measure.peer.peer_seconds", lambda *_: 1.0)
    here = dataclasses.replace(look_around(torch.device("cpu")), gpu="made up")
    monkeypatch.setattr("stepmoe.measure.environment.look_around", lambda device: here)
    file = tmp_path / "x.json"
    arguments = ["layer-floor", *words.split()]
    assert main([*arguments, "--json", str(file)]) == 0
    assert str(tmp_path) not in file.read_text()
    *start, name = shlex.split(json.loads(file.read_text())["command"])[:4]
    assert (start, name) == (["python", "-m", "stepmoe"], "layer-floor")
    again = parser().parse_args(shlex.split(json.loads(file.read_text())["command"])[3:])
    assert again == parser().parse_args(arguments)


@pytest.mark.parametrize("there", [True, False])
def test_the_peer_is_looked_for(there, monkeypatch):
    def find(name):
        assert name == "transformers.models.step3p7"
        if not there:
            raise ModuleNotFoundError(name)
        return object()

    monkeypatch.setattr(layer_floor.importlib.util, "find_spec", find)
    assert layer_floor._has_peer() is there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep", "3"], "ep=3 does not divide tp=8"),
        (["--simulate-rank", "8"], "simulate_rank must be a whole number from 0 to"),
        (["--decode", "0"], "--decode must be a whole number of at least 1, got 0"),
        (["--context", "-5"], "--context must be a whole number from 1 to 262144, got -5"),
        (["--prefill", "1", "262145"], "--prefill LENGTH must be a whole number from 1 to 262144"),
        (["--prefill", "0", "9"], "--prefill SEQUENCES must be a whole number of at least 1"),
        (["--peer"], "--peer needs transformers 5.23 or newer"),
        # 288 experts of 3 x 4096 x 1280 in bfloat16, six layers: 51 GiB, and attention's 1.
        (["--tp", "1", "--ep", "1"], "the weights take 52 GiB with tp=1 and torch.bfloat16"),
        (
            ["--json", "/no/such/folder/x.json"],
            "cannot write into /no/such/folder/x.json (No such file or directory)",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, monkeypatch):
    a_gpu(monkeypatch)
    monkeypatch.setattr(layer_floor, "_has_peer", lambda: False)
    monkeypatch.setattr(layer_floor, "measure", lambda *_: pytest.fail("it started"))
    assert main(["layer-floor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["layer-floor"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
