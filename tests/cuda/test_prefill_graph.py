"""Prefill steps replayed from a CUDA graph: what they compute, what a measurement says of them."""

from pathlib import Path

import pytest
import torch

import stepmoe as sm
from stepmoe.generation import StepGraph, next_tokens
from stepmoe.measure import Workload, compare_throughput
from stepmoe.measure.rounds import share_weights
from stepmoe.variants import layer_class

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
ALONE = sm.ParallelConfig(4, 2, simulate_rank=1)
pytestmark = pytest.mark.cuda

BATCH, LENGTH, REST, NEW = 3, 13, 5, 2  # two full steps, a shorter one, decode steps
CAPACITY = 2 * LENGTH + REST + NEW


def tiny(parallel=None):
    return sm.Step3p5ForCausalLM.from_pretrained(
        TINY, sm.VARIANTS[0], parallel, torch.bfloat16, "cuda"
    )


def in_fp8():
    """A full and a sliding layer of the published sizes, with fewer experts."""
    config = sm.Step3p5Config.flash().with_layers(4, 5).replace(num_experts=48, vocab_size=512)
    parallel = sm.ParallelConfig(8, 4, simulate_rank=3)
    return sm.Step3p5ForCausalLM.from_config(
        config, sm.VARIANTS[0], parallel, torch.bfloat16, "cuda", quantization="fp8"
    )


MODELS = {"one rank": tiny, "simulated rank": lambda: tiny(ALONE), "FP8": in_fp8}


def variants_of(first):
    """All variants with the same weights, as they are measured."""
    others = {name: share_weights(first, layer_class(name)) for name in sm.VARIANTS[1:]}
    return {sm.VARIANTS[0]: first, **others}


def tokens_of(model, ids, cache, graphs):
    """The next token after every step of ids (B, L), and two more; replayed where there is a
    graph."""
    found = []
    for part in ids.split(LENGTH, dim=1):
        graph = graphs.get(cache.length)
        found.append(graph.step(part) if graph else next_tokens(model, part, cache))
    for _ in range(NEW):
        found.append(next_tokens(model, found[-1], cache))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", MODELS)
def test_replayed_steps_equal_eager_ones_bit_for_bit(kind):
    made = variants_of(MODELS[kind]())
    cache = made[sm.VARIANTS[0]].new_cache(CAPACITY)
    graphs, last = {}, None
    for name, model in made.items():
        graphs[name] = {}
        for start in (0, LENGTH):
            last = StepGraph(model, BATCH, LENGTH, cache, start, last)
            graphs[name][start] = last
    assert cache.length == int(cache.position) == 0
    # Not in the order of the captures: graphs that share memory must not depend on it.
    for name in [*reversed(made), *made, *made]:
        ids = torch.randint(256, (BATCH, 2 * LENGTH + REST), device="cuda")
        cache.clear()
        replayed = tokens_of(made[name], ids, cache, graphs[name])
        other = made[name].new_cache(CAPACITY)
        eager = tokens_of(made[name], ids, other, {})
        assert torch.equal(replayed, eager), name
        assert cache.length == int(cache.position) == other.length == CAPACITY
        for one, its in zip(cache.layers, other.layers, strict=True):
            assert torch.equal(one.keys, its.keys), name
            assert torch.equal(one.values, its.values), name


def test_a_long_prompt_replays_torchs_attention_and_several_passes():
    """From 2048 tokens on a full layer runs torch's own attention; experts take several passes."""
    config = sm.Step3p5Config.tiny().replace(max_position_embeddings=4096)
    model = sm.Step3p5ForCausalLM.from_config(
        config, "reduce_scatter", ALONE, torch.bfloat16, "cuda"
    )
    graph = StepGraph(model, 2, 2500, model.new_cache(2500), start=0)
    for _ in range(2):
        ids = torch.randint(config.vocab_size, (2, 2500), device="cuda")
        graph.cache.clear()
        replayed, cache = graph.step(ids), model.new_cache(2500)
        assert torch.equal(replayed, next_tokens(model, ids, cache))
        for one, its in zip(graph.cache.layers, cache.layers, strict=True):
            assert torch.equal(one.keys, its.keys)
            assert torch.equal(one.values, its.values)


def test_what_a_ledger_sees_of_a_replay():
    model = variants_of(tiny(ALONE))["reduce_scatter"]
    ids = torch.randint(256, (BATCH, LENGTH), device="cuda")
    with sm.Ledger() as eager:
        model(ids)
    graph = StepGraph(model, BATCH, LENGTH, model.new_cache(LENGTH), start=0)
    with sm.Ledger() as ledger:
        graph.step(ids)
    assert ledger.counts() == eager.counts()
    assert ledger.bytes_sent() == eager.bytes_sent()
    (step,) = (step for step in ledger.steps if step.op == "prefill_graph")
    assert step.seconds > 0
    assert "prefill steps were replayed from a CUDA graph" in str(ledger)


@pytest.mark.parametrize("eager", [False, True])
def test_a_measurement_says_how_steps_were_launched(eager, monkeypatch):
    monkeypatch.setenv("STEPMOE_DEVICE", "cuda")  # tests compare on the CPU; this process measures
    # Three prompts in steps of two: the last batch is uneven. Chunks: 32 of 40 tokens, then 8.
    for work in (Workload(20, 3, 3, 40), Workload(40, 1, 3, 32, decode=(2,), context=8)):
        frame = compare_throughput(
            sm.Step3p5Config.tiny(), workload=work, parallel=ALONE, dtype=torch.bfloat16,
            eager=eager,
        )  # fmt: skip
        assert set(frame["is_graph"]) == {not eager}
        prefill = frame[frame["phase"] == "prefill"]
        copying = frame["variant"] == "reduce_scatter"  # for a sum nothing stands in
        assert (frame["stand_in"] > 0).tolist() == copying.tolist()
        assert (frame["stand_in"] < frame["median"]).all()
        assert (prefill["memory"] > prefill["weights"]).all()
        assert any("launched by the host" in note for note in frame.attrs["notes"]) == (not eager)


def test_another_dtype_says_why_not(monkeypatch):
    monkeypatch.setenv("STEPMOE_DEVICE", "cuda")
    frame = compare_throughput(
        sm.Step3p5Config.tiny(), ["deferred"], Workload(20, 1, 2, 40), parallel=ALONE,
        dtype=torch.float16,
    )  # fmt: skip
    assert not frame["is_graph"].any()
    assert any("prefill steps ran without a CUDA graph" in note for note in frame.attrs["notes"])
