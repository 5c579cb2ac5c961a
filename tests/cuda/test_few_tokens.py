"""Products of few tokens on an NVIDIA GPU, at the published shapes of tp=8, ep=4, in bfloat16."""

import pytest
import torch
import torch.nn.functional as F

import stepmoe as sm
from stepmoe.kernels import dots_gpu, linear, linear_gpu, routing, swiglu
from stepmoe.measure.distance import relative_error

pytestmark = pytest.mark.cuda
FLASH = sm.Step3p5Config.flash()
BFLOAT16 = 2**-8  # what rounding to bfloat16 changes a number by, at most, relative to it
SHAPES = [(1288, 4096), (1808, 4096), (4096, 1024), (4096, 1536), (288, 4096), (4096, 160)]


def drawn(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


@pytest.mark.parametrize("tokens", [1, 2, linear_gpu.FEW_TOKENS, 5, dots_gpu.MOST_TOKENS])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_products(rows, size, tokens):
    weight = drawn(rows, size, scale=size**-0.5)
    x = drawn(tokens, size)
    exact = x.double() @ weight.double().T
    found = linear.linear(x, weight)
    # One rounding to bfloat16; of the sum in float32 nothing is seen.
    assert relative_error(found, exact) < BFLOAT16
    assert (routing.compute_logits(x, weight) - exact).abs().max() < 2e-5
    fewest = 1 if tokens <= linear_gpu.FEW_TOKENS else linear_gpu.FEW_TOKENS + 1
    others = drawn(fewest, size)
    for token in range(tokens):
        others[-1] = x[token]
        again = linear.linear(others, weight)[-1]
        assert torch.equal(found[token], again), "a token's bits know no others"


@pytest.mark.parametrize("tokens", [1, linear_gpu.FEW_TOKENS, dots_gpu.MOST_TOKENS])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_gate_up_and_swiglu_are_no_worse_than_apart(tokens, limit):
    weight = drawn(320, 4096, scale=4096**-0.5)
    x = drawn(tokens, 4096)
    exact = swiglu.clamped_swiglu(F.linear(x.double(), weight.double()), limit)
    apart = swiglu.clamped_swiglu(F.linear(x, weight), limit)
    together = relative_error(linear.linear_swiglu(x, weight, limit), exact)
    assert together < BFLOAT16  # gate and up are not rounded
    assert together < 1.1 * relative_error(apart, exact)


@pytest.mark.parametrize("layer", [4, 5])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_decode_graph_repeats_the_eager_step_bit_for_bit(layer, batch):
    """Kernels that start early must wait for what they read, within a graph and without."""
    model = sm.Step3p5ForCausalLM.from_config(
        FLASH.with_layers(*[layer] * 3).replace(vocab_size=512),
        "deferred",
        sm.ParallelConfig(8, 4, simulate_rank=0),
        dtype=torch.bfloat16,
        device="cuda",
    )
    ids = torch.randint(512, (batch, 1), device="cuda")
    cache = model.new_cache(64)

    def step():
        cache.length = 40
        cache.position.fill_(40)
        return model(ids, cache)

    model(torch.randint(512, (batch, 41), device="cuda"), cache)
    eager = step().clone()
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
    torch.cuda.synchronize()
    for _ in range(50):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, eager)
    for _ in range(20):  # one after the other, with nothing that waits in between
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
