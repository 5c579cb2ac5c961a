"""The experts' kernels on an NVIDIA GPU at the published shape, in the production dtype.

tests/unit/kernels runs every kernel on small shapes, on the GPU where there is one.
"""

import pytest
import torch
import torch.nn.functional as F

import stepmoe as sm
from stepmoe.kernels import dispatch, norm, routing
from stepmoe.measure.distance import relative_error
from stepmoe.model.experts import RoutedExperts, passes

pytestmark = pytest.mark.cuda
FLASH, PARALLEL = sm.Step3p5Config.flash(), sm.ParallelConfig(8, 4)
BFLOAT16 = 2**-8  # relative spacing of bfloat16


@pytest.fixture(scope="module")
def experts():
    """72 of 288 experts at half their size, as rank 2 of tp=8, ep=4 holds them."""
    made = RoutedExperts(FLASH, FLASH.layer(4), PARALLEL, 2).requires_grad_(False)
    made.to("cuda", torch.bfloat16)
    for weight in (made.gate.weight, made.gate_up_proj.weight, made.down_proj.weight):
        weight.normal_(std=weight.shape[-1] ** -0.5)
    made.router_bias.data = torch.randn(288, device="cuda") * 0.05
    return made


def expected(experts, x, ids, weights):
    """Expert by expert in float32, whose error is far below that of bfloat16."""
    total = torch.zeros(x.shape, device="cuda")
    for expert in range(len(experts.down_proj.weight)):
        tokens, places = (ids == experts.first_expert + expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[tokens].float(), experts.gate_up_proj.weight[expert].float()).chunk(
            2, dim=-1
        )
        rows = F.linear(F.silu(gate) * up, experts.down_proj.weight[expert].float())
        total.index_add_(0, tokens, rows * weights[tokens, places, None])
    return total


@pytest.mark.parametrize("tokens", [1, 3, 64, 511, 2000, 16384])
@pytest.mark.parametrize("spread", ["routed", "all here", "one expert"])
def test_experts_however_the_tokens_are_spread(experts, tokens, spread):
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    ids, weights = experts.gate(x, experts.router_bias)
    if spread == "routed":
        ids[0, 0] = experts.first_expert  # so that something is here
    else:  # up to four times the rows that one pass has room for
        ids = experts.first_expert + (ids % 72 if spread == "all here" else torch.zeros_like(ids))
    wanted = expected(experts, x, ids, weights)
    # bfloat16 between the two products and at the end, and once more for every pass: rounding
    # errors of half a spacing at most, of which a norm sees less.
    assert relative_error(experts.apply_experts(x, ids, weights), wanted) < 1.5 * BFLOAT16
    onto = torch.randn_like(x)
    with_onto = wanted + onto.float()
    assert relative_error(experts.apply_experts(x, ids, weights, onto), with_onto) < 1.5 * BFLOAT16


@pytest.mark.parametrize("tokens", [1, 64, 3000, 16384])
def test_what_the_rows_are_added_to_gives_the_sum_to_the_last_bit(experts, tokens):
    x, onto = (torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wanted = onto + experts(x)
    assert torch.equal(experts(x, onto), wanted)


def test_tokens_without_an_expert_here_get_zeros(experts):
    x = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(300, 8, dtype=torch.int64, device="cuda")
    assert experts.apply_experts(x, ids, torch.ones(300, 8, device="cuda")).eq(0).all()


def test_memory_is_bounded_and_nothing_waits_for_the_gpu(experts):
    x = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16)
    experts(x)
    room = 43776  # a third more than the average of 32768, in whole tiles of 128
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = torch.cuda.max_memory_allocated() - before
    # Rows of a pass after both halves, the result, and small change for router and order.
    assert held < (room * (4096 + 640) + 16384 * 4096) * 2 + 2**26


def test_a_replayed_graph_equals_the_eager_pass_bit_for_bit(experts):
    for tokens in (1, 64, 3000):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            experts(x)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                captured = experts(x)
        for _ in range(3):
            x.normal_()
            torch.cuda.synchronize()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured, experts(x))


def test_router_logits_are_as_good_as_float32(experts):
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    weight = experts.gate.weight
    exact = x.double() @ weight.double().T
    # bfloat16 products are exact in float32. Measured: 2.3e-5 at most on the tensor cores, 4e-6
    # in float32, 1.5e-2 if the logits were rounded to bfloat16.
    assert (routing.compute_logits(x, weight) - exact).abs().max() < 1e-4


def test_add_and_norm_in_bfloat16():
    x, residual = (torch.randn(500, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(4096, device="cuda") * 0.1
    normed, total = norm.add_gemma_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    wanted = norm.gemma_rms_norm(total.double(), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), wanted, rtol=BFLOAT16, atol=1e-6)


def test_passes_cover_every_choice(experts):
    x = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16)
    ids, _ = experts.gate(x, experts.router_bias)
    from stepmoe.kernels.permute import sort_by_expert

    starts = passes(sort_by_expert(ids, experts.first_expert, 72), 4)
    assert len(starts) == 3
    assert starts[-1] + starts.step >= ids.numel()


def test_without_triton_the_reference_runs_and_the_ledger_says_so(monkeypatch):
    config = sm.Step3p5Config.tiny()
    ids = torch.arange(20).view(2, 10)
    kernels = sm.Step3p5ForCausalLM.from_config(config, device="cuda")(ids)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    monkeypatch.setattr("stepmoe.causal_lm.has_triton", lambda: False)
    model = sm.Step3p5ForCausalLM.from_config(config, device="cuda")
    with sm.Ledger() as ledger:
        plain = model(ids)
    assert dispatch.WHY_REFERENCE in ledger.notes
    # float32 in another order of summation; logits reach 5.
    torch.testing.assert_close(kernels, plain, atol=1e-4, rtol=0)
