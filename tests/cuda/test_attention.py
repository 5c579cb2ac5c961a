"""Attention, cache and decode graphs on a GPU: real sizes, every variant, replay against eager."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from greedy import eager_tokens
from safetensors.torch import load_file

import stepmoe as sm
from stepmoe.generation import graph_for, next_tokens
from stepmoe.kernels import attention, qk_norm_rotary

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
REFERENCE = load_file(TINY / "reference.safetensors")
IDS = REFERENCE["input_ids"]
pytestmark = pytest.mark.cuda

# batch, heads, kv heads, length, past, window, head_dim, dtype: the published shares at TP8, and
# some odd ones. The number of tokens is kept low enough for the float64 reference.
SHAPES = [
    (2, 8, 1, 1500, 0, None, 128, torch.bfloat16),
    (2, 8, 1, 2100, 0, None, 128, torch.bfloat16),  # long enough for torch's own kernel
    (2, 12, 1, 1500, 0, 512, 128, torch.bfloat16),
    (2, 8, 1, 70, 1430, None, 128, torch.bfloat16),
    (1, 12, 1, 300, 1300, 512, 128, torch.float16),
    (3, 6, 2, 77, 0, 33, 64, torch.float32),
    (3, 4, 4, 37, 5, None, 12, torch.bfloat16),
    (2, 3, 1, 90, 7, 40, 24, torch.bfloat16),
    (1, 4, 2, 100, 0, 33, 256, torch.bfloat16),
]
# Against averages of values of size 1, relative to the largest: 2^-24, 2^-11, 2^-8, some of each.
LIMIT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "past", "window", "dim", "dtype"), SHAPES
)
def test_kernels_against_float64(batch, heads, kv_heads, length, past, window, dim, dtype):
    def tensor(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    size, total = (heads + 2 * kv_heads) * dim, past + length
    projected = tensor(batch * length, size + heads)
    q_weight, k_weight = tensor(dim) * 0.3, tensor(dim) * 0.3
    half = dim // 4 if window is None else dim // 2
    frequencies = 1e4 ** -torch.rand(half, device="cuda")
    start = torch.tensor([past], device="cuda")
    shape = (batch, kv_heads, total + 100, dim)
    cache = tensor(*shape), tensor(*shape)
    exact = qk_norm_rotary.qk_norm_rotary(
        projected.double(), batch, q_weight.double(), k_weight.double(), 1e-5,
        frequencies.double(), start, heads, kv_heads, tuple(kept.double() for kept in cache),
    )  # fmt: skip
    found = qk_norm_rotary.qk_norm_rotary(
        projected, batch, q_weight, k_weight, 1e-5, frequencies, start, heads, kv_heads, cache
    )
    for one, other in zip(found, exact, strict=True):
        # Angles to 1500 rad are off by 1e-4 in float32.
        assert error(one, other) < max(LIMIT[dtype], 2e-4)

    gate = projected[:, -heads:]
    query, keys, values = found[0], *(kept[:, :, :total] for kept in cache)
    wide = [x.double() for x in (query, keys, values, gate)]
    expected = attention.prefill_attention(*wide, window)
    assert (
        error(attention.prefill_attention(query, keys, values, gate, window), expected)
        < (LIMIT[dtype])
    )
    last, last_gate = query[:, :, -1:], gate.view(batch, length, -1)[:, -1]
    position = torch.tensor([total - 1], device="cuda")
    wide = [x.double() for x in (last, *cache, last_gate)]
    expected = attention.decode_attention(*wide, position)
    found = attention.decode_attention(last, *cache, last_gate, position)
    assert error(found, expected) < LIMIT[dtype]


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_reference_logits_in_chunks_and_token_by_token(variant):
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY, variant, device="cuda")
    for chunks in ([40], [13, 1, 26], [20, *[1] * 20], [3, 9, 28]):
        cache = model.new_cache()
        parts = [model(part, cache) for part in IDS.split(chunks, dim=1)]
        # 1e-4: float32 without TF32, other orders of summation; entries reach 20.
        torch.testing.assert_close(
            torch.cat(parts, dim=1).cpu(), REFERENCE["logits"], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_a_replayed_graph_equals_eager_steps_bit_for_bit(variant):
    model = sm.Step3p5ForCausalLM.from_pretrained(
        TINY, variant, dtype=torch.bfloat16, device="cuda"
    )
    # Every sequence runs to the last step: eager steps know of no end.
    model.config = replace(model.config, eos_token_ids=())
    compared = 0
    for batch, length in ((7, 17), (7, 20), (1, 5)):  # the second reuses the first one's graph
        ids = torch.randint(256, (batch, length), device="cuda")
        replayed = model.generate(ids, 30)
        graph = model.decode_graph
        eager, certain, cache = eager_tokens(model, ids, 30, graph.capacity)
        assert replayed.shape == eager.shape
        compared += sum(certain) - batch * length
        for sequence, end in enumerate(certain):
            assert torch.equal(replayed[sequence, :end], eager[sequence, :end])
            if end < length + 30:  # the caches of a layer with a window have gone round since
                continue
            for one, other in zip(graph.cache.layers, cache.layers, strict=True):
                assert torch.equal(one.keys[sequence], other.keys[sequence])
                assert torch.equal(one.values[sequence], other.values[sequence])
        assert graph.cache.length == int(graph.cache.position) == length + 29
    # Of 450 new tokens; 30 draws, on a CPU, had 101 to 289 before their sequences' first ties.
    assert compared > 45, "hardly anything was compared"


def test_a_graph_serves_one_batch_size_and_as_many_tokens_as_it_has_slots():
    model = sm.Step3p5ForCausalLM.from_config(
        sm.Step3p5Config.tiny(), dtype=torch.bfloat16, device="cuda"
    )
    model.generate(torch.zeros(2, 30, dtype=torch.int64), 10)
    first = model.decode_graph
    model.generate(torch.zeros(2, 8, dtype=torch.int64), 10)
    assert model.decode_graph is first
    for batch, length in ((2, 60), (1, 8)):
        model.generate(torch.zeros(batch, length, dtype=torch.int64), 10)
        assert model.decode_graph is not first
        assert model.decode_graph.batch == batch


def test_a_ledger_lists_the_collectives_of_every_replay():
    parallel = sm.ParallelConfig(4, 2, simulate_rank=1)
    model = sm.Step3p5ForCausalLM.from_pretrained(
        TINY, "fused", parallel, dtype=torch.bfloat16, device="cuda"
    )
    with sm.Ledger() as prefill:
        model(IDS[:, :10])
    with sm.Ledger() as ledger:
        model.generate(IDS[:, :10], 4)
    # The prompt and three steps, each with the collectives of one pass.
    assert ledger.counts() == {op: 4 * count for op, count in prefill.counts().items()}
    steps = [step for step in ledger.steps if step.op == "decode_graph"]
    assert len(steps) == 3
    assert all(step.seconds > 0 for step in steps)
    replayed = ledger.entries[len(prefill.entries) :]
    assert {entry.shape for entry in replayed} == {(2, 64)}
    assert {entry.seconds for entry in replayed} == {0.0}
    assert "replayed from a CUDA graph" in str(ledger)
    assert "nothing was sent" in str(ledger)


def test_memory_does_not_grow_over_1000_steps():
    model = sm.Step3p5ForCausalLM.from_config(
        sm.Step3p5Config.tiny(), dtype=torch.bfloat16, device="cuda"
    )
    graph, cache = graph_for(model, 2, 1100), model.new_cache(1100)
    new = torch.zeros(2, 1, dtype=torch.int64, device="cuda")

    def replay():
        graph.step(new)

    def eager():
        next_tokens(model, new, cache)

    for step in (replay, eager):
        for _ in range(20):
            step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(1000):
            step()
        torch.cuda.synchronize()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [(torch.float64, "it needs kernels"), (torch.float32, "grouped products wait for the host")],
)
def test_other_dtypes_decode_without_a_graph_and_say_so(dtype, reason):
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY, dtype=dtype, device="cuda")
    with sm.Ledger() as ledger:
        tokens = model.generate(IDS[:, :20], 5)
    assert f"without a CUDA graph: {reason}" in str(ledger).replace("the experts' ", "")
    assert model.decode_graph is None
    on_cpu = sm.Step3p5ForCausalLM.from_pretrained(TINY, dtype=dtype, device="cpu")
    assert torch.equal(tokens.cpu(), on_cpu.generate(IDS[:, :20], 5))
