"""Throughput of a workload: how prompts are cut into steps, and what a simulated rank reports."""

import json
from typing import ClassVar

import pytest
import torch

import stepmoe as sm
from stepmoe.__main__ import main
from stepmoe.generation import StepGraph, next_tokens
from stepmoe.measure import Workload, compare_throughput, decoding, load, prefilling, save
from stepmoe.measure.report import throughput_table
from stepmoe.measure.stand_ins import stand_in_seconds
from stepmoe.measure.workload import Batch
from stepmoe.predict import compute_of_run

TINY = sm.Step3p5Config.tiny()
ALONE = sm.ParallelConfig(4, 2, simulate_rank=1)


@pytest.mark.parametrize(
    ("input_len", "prompts", "chunk", "batches"),
    [
        (8192, 5, 16384, [Batch(2, 8192), Batch(2, 8192), Batch(1, 8192)]),
        (8192, 2, 8192, [Batch(1, 8192)] * 2),
        (8192, 2, 3000, [Batch(1, 3000)] * 2),  # each prompt in steps of 3000, 3000, 2192
        (10, 3, 64, [Batch(3, 10)]),
    ],
)
def test_prompts_share_steps_that_have_room(input_len, prompts, chunk, batches):
    work = Workload(input_len, 1, prompts, chunk)
    assert work.batches == batches
    assert all(batch.prompts * batch.length <= chunk for batch in work.batches)


@pytest.fixture(scope="module")
def frame():
    work = Workload(
        input_len=40, output_len=3, prompts=3, chunk=16, decode=(3,), context=30, decode_steps=2
    )
    return compare_throughput(TINY, ["three_all_reduces", "reduce_scatter"], work, parallel=ALONE)


def test_steps_tokens_and_time_agree(frame):
    for row, sample in zip(frame.to_dict("records"), frame.attrs["samples"], strict=True):
        seconds = sample["seconds"]
        if row["phase"] == "decode":
            assert (row["batch"], row["length"], row["context"]) == (3, 1, 30)
            assert row["tokens_per_second"] == pytest.approx(3 * 2 / sum(seconds))
            continue
        # Three prompts, each in steps of 16, 16 and 8, and two decode steps for three new tokens.
        assert len(seconds) == 3 * (3 + 2)
        assert row["steps"] == 6
        assert row["tokens_per_second"] == pytest.approx(3 * 43 / sum(seconds))
        full = [s for i, s in enumerate(seconds) if i % 5 < 2]
        assert row["median"] == pytest.approx(torch.tensor(full).double().quantile(0.5).item())
        assert row["memory"] > row["weights"] > 0


def test_speed_up_is_the_ratio_of_tokens_a_second(frame):
    for _, (baseline, other) in (
        frame.groupby("phase").apply(lambda f: f.to_dict("records")).items()
    ):
        assert (baseline["speedup"], baseline["verdict"]) == (1, "the baseline")
        ratio = other["tokens_per_second"] / baseline["tokens_per_second"]
        assert other["speedup"] == pytest.approx(ratio)
        assert other["verdict"] == "too few rounds for an interval"  # three batches, two steps


def test_parts_of_a_step_add_up(frame):
    for row in frame.to_dict("records"):
        assert row["compute"] > 0
        assert row["communication"] > 0  # of the stand-ins
        assert row["waiting"] < row["compute"]  # it meets nobody, which takes microseconds


def test_what_it_sends_is_what_a_ledger_sees(frame):
    for row in frame.to_dict("records"):
        model = sm.Step3p5ForCausalLM.from_config(TINY, row["variant"], ALONE)
        with sm.Ledger() as ledger:
            model(torch.ones(row["batch"], row["length"], dtype=torch.int64), last_only=True)
        assert row["counts"] == ledger.counts() != {}
        assert row["bytes_sent"] == ledger.bytes_sent()
        assert sum(part["count"] for part in row["sent"]) == len(ledger.entries)
        copies = [e.seconds for e in ledger.entries if e.op in ("all_gather", "reduce_scatter")]
        assert (row["stand_in"] > 0) == bool(copies)  # a sum stays as it is: nothing is copied
        assert row["stand_in"] < max(row["p90"], 1)
        assert stand_in_seconds(ledger, model.comm.group, torch.device("cpu")) == sum(copies)
        sizes = sum(part["bytes"] * part["count"] for part in row["sent"])
        assert sizes == sum(entry.bytes for entry in ledger.entries)


def test_routing_by_choice():
    work = Workload(input_len=64, prompts=8, chunk=512)
    busiest = {}
    for routing in ("uniform", "skewed"):
        frame = compare_throughput(TINY, ["deferred"], work, parallel=ALONE, routing=routing)
        busiest[routing] = frame.attrs["routing"]["busiest"]
    # 512 tokens x 4 of 16 experts: the busiest of an even router has a tenth more than the mean.
    assert 1 < busiest["uniform"] < busiest["skewed"] - 0.2


def test_it_is_kept_in_a_file(frame, tmp_path):
    save(frame, tmp_path / "x.json")
    again = load(tmp_path / "x.json")
    assert again.drop(columns="counts").equals(frame.drop(columns="counts"))
    assert again.attrs == frame.attrs | {"recorded": True}
    with pytest.raises(sm.ConfigError, match="lacks the columns sent"):
        save(frame.drop(columns="sent"), tmp_path / "y.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--chunk 0", "chunk must be a whole number of at least 1, got 0"),
        ("--input-len 3000", "exceeds max_position_embeddings = 2048"),
        ("--input-len 8 --decode 4 --context 2040", "exceeds max_position_embeddings = 2048"),
        ("--input-len 8 --simulate-rank 4", "simulate_rank must be"),
        ("--input-len 8 --layers 3-1", "runs backwards"),
        ("--input-len 8 --layers 5", "layer 5 does not exist"),
        ("--model nowhere --input-len 8", "nowhere does not exist"),
        ("--input-len 8 --variants deferred deferred", "none twice"),
        ("--input-len 8 --shape nowhere", "--shape nowhere: give tiny, flash, or a folder"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    assert main(["prefill", "--tp", "4", *words.split(), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_flash_step_that_does_not_fit_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 2**12)  # 4096 pages of 4096 bytes
    assert main(["prefill", "--shape", "flash", "--tp", "8", "--ep", "4", "--device", "cpu"]) == 2
    assert "the weights take" in capsys.readouterr().err


def test_some_real_layers_by_the_command(tmp_path, capsys):
    folder = "tests/step3p5-tiny-reference"
    words = f"prefill --model {folder} --layers 1-2 --tp 4 --simulate-rank 3 --input-len 9"
    file = tmp_path / "x.json"
    assert main([*words.split(), "--prompts", "2", "--device", "cpu", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "routing of the checkpoint" in shown
    assert "this rank" in shown
    attrs = json.loads(file.read_text())["attrs"]
    assert attrs["config"]["num_hidden_layers"] == 2
    assert f"--model {folder}" in attrs["command"]
    assert "--shape" not in attrs["command"]
    assert main([*words.split(), "--routing", "skewed"]) == 2
    assert "a checkpoint has its own" in capsys.readouterr().err


class HostGraph:
    """A StepGraph that launches its step: which steps would be replayed can be seen on a CPU."""

    made: ClassVar[list["HostGraph"]] = []

    def __init__(self, model, batch, length, cache, start, beside=None):
        self.model, self.shape, self.cache, self.start = model, (batch, length), cache, start
        self.beside, self.seen = beside, []
        HostGraph.made.append(self)

    def step(self, tokens):
        assert tokens.shape == self.shape
        assert self.cache.length == int(self.cache.position) == self.start
        self.seen.append(tokens.clone())
        return next_tokens(self.model, tokens, self.cache)


@pytest.fixture
def host_graphs(monkeypatch):
    monkeypatch.setattr(prefilling, "StepGraph", HostGraph)
    monkeypatch.setattr(prefilling, "can_replay", lambda model, phase: phase == "prefill")
    monkeypatch.setattr(HostGraph, "made", [])
    return HostGraph


VARIANTS = ["three_all_reduces", "reduce_scatter"]


def test_full_steps_are_replayed_and_the_others_are_not(host_graphs):
    # Prompts of 16, 16 and 8 tokens, and 2 decode steps: three prompts, one of them a warm-up.
    work = Workload(40, 3, 2, 16, decode=(2,), context=8, decode_steps=1)
    frame = compare_throughput(TINY, VARIANTS, work, parallel=ALONE)
    assert [(graph.shape, graph.start) for graph in host_graphs.made] == [
        ((1, 16), start) for _ in VARIANTS for start in (0, 16)
    ]
    for graph in host_graphs.made:
        assert len(graph.seen) == 3
        assert not torch.equal(graph.seen[0], graph.seen[2]), "one prompt again and again"
    assert len({id(graph.cache) for graph in host_graphs.made}) == 1
    # Each shares memory with one before.
    assert [graph.beside for graph in host_graphs.made] == [None, *host_graphs.made[:-1]]
    assert list(frame["is_graph"]) == [True, False] * 2
    assert not frame["stand_in"].isna().any()
    assert prefilling.PARTLY in frame.attrs["notes"]
    shown = throughput_table(frame)
    assert shown.count("replayed from a CUDA graph; compute, communicate, wait: of steps la") == 1


def test_an_uneven_last_batch_is_launched_by_the_host(host_graphs):
    frame = compare_throughput(TINY, VARIANTS, Workload(16, 1, 5, 32), parallel=ALONE)
    assert [(graph.shape, len(graph.seen)) for graph in host_graphs.made] == [((2, 16), 3)] * 2
    assert list(frame["is_graph"]) == [True] * 2
    assert list(frame["steps"]) == [2] * 2
    assert prefilling.PARTLY in frame.attrs["notes"]
    even = compare_throughput(TINY, VARIANTS, Workload(16, 1, 4, 32), parallel=ALONE)
    assert prefilling.PARTLY not in even.attrs["notes"]
    assert {"median", "stand_in"} <= set(even)
    even.attrs["hardware"]["gpus"] = ["X"]
    for name, compute in compute_of_run(even).items():
        row = even[even["variant"] == name].iloc[0]
        assert compute.seconds == row["median"] - row["stand_in"]


def test_the_host_launches_every_step_if_asked_to(host_graphs, monkeypatch):
    monkeypatch.setattr(decoding, "graph_for", lambda *_: pytest.fail("a graph was asked for"))
    work = Workload(16, 1, 2, 32, decode=(2,), context=8, decode_steps=1)
    frame = compare_throughput(TINY, VARIANTS, work, parallel=ALONE, eager=True)
    assert not host_graphs.made
    assert not frame["is_graph"].any()


def test_a_cpu_has_no_graphs_and_says_nothing_of_them(frame):
    assert not frame["is_graph"].any()
    assert not any("CUDA graph" in note for note in frame.attrs["notes"])


def test_the_command_says_that_it_was_eager(tmp_path):
    file, words = tmp_path / "x.json", "prefill --tp 4 --simulate-rank 0 --input-len 8 --prompts 1"
    for more in ([], ["--eager"]):
        assert main([*words.split(), *more, "--device", "cpu", "--json", str(file)]) == 0
        assert ("--eager" in load(file).attrs["command"]) == bool(more)


def test_a_graph_refuses_steps_that_it_was_not_captured_for():
    """What is baked in would be computed in silence."""
    graph = object.__new__(StepGraph)
    model = sm.Step3p5ForCausalLM.from_config(TINY)
    graph.batch, graph.length, graph.start, graph.cache = 2, 5, 0, model.new_cache()
    graph._tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(sm.ConfigError, match=r"2 x 5 tokens after 0 cached ones .* 2 x 4 after 0"):
        graph.step(graph._tokens[:, :4])
    graph.cache.move_to(5)
    with pytest.raises(sm.ConfigError, match="2 x 5 after 5: call the model"):
        graph.step(graph._tokens)


def test_decoded_sequences_have_tokens_of_their_own(monkeypatch):
    """Equal tokens would choose equal experts, and decode steps would read too few weights."""
    seen = []
    step = decoding._step
    monkeypatch.setattr(decoding, "_step", lambda *args: seen.append(args[-1]) or step(*args))
    work = Workload(input_len=8, prompts=1, chunk=8, decode=(6,), context=4, decode_steps=1)
    compare_throughput(TINY, ["fused"], work, parallel=ALONE, layers=(1,))
    assert seen
    assert all(len(tokens.unique()) > 3 for tokens in seen)
