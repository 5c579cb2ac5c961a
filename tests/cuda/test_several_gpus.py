"""A GPU a rank, with 2, 4 and 8 of them: NCCL, the fused kernels, and both in a decode graph.

What needs more GPUs than there are is skipped. The functions that take `case` run in the ranks.
"""

import itertools

import oracle
import pytest
import torch
import torch.distributed as dist
from greedy import eager_tokens

import stepmoe as sm
from stepmoe.comm.fusion import force
from stepmoe.measure.distance import relative_error
from stepmoe.parallel import tensor_layouts
from stepmoe.random_weights import random_tensor

pytestmark = pytest.mark.cuda

# Heads, experts and sizes that 8 ranks can share; a hidden size that all fused kernels take.
SHAPE = sm.Step3p5Config.tiny().replace(hidden_size=1024)
SEED = 5
IDS = torch.randint(256, (3, 21), generator=torch.Generator().manual_seed(SEED))  # 63 tokens
LAYOUTS = list(itertools.product(sm.VARIANTS, (1, 2, 4), ("tp", "dp")))


@pytest.fixture(scope="module", params=(2, 4, 8), ids="tp{}".format)
def ranks(request):
    if (there := torch.cuda.device_count()) < request.param:
        pytest.skip(f"needs {request.param} NVIDIA GPUs, here: {there}")
    with sm.Ranks(request.param, device="cuda") as own:
        assert "one GPU a rank" in own.describe()
        yield own


@pytest.fixture(scope="module")
def exact():
    """The logits of IDS in float64, from the same weights."""
    layouts = tensor_layouts(SHAPE, sm.ParallelConfig(), 0)
    weights = {name: random_tensor(name, layout, SEED) for name, layout in layouts.items()}
    return oracle.forward(SHAPE, weights, IDS)["logits"]


def tp_of(ranks):
    return len(ranks.run(dist.get_rank))


def one_pass(variant, parallel, dtype, implementation=None):
    """Logits in one pass, and in three with a cache; what carried out the fused operation."""
    model = sm.Step3p5ForCausalLM.from_config(SHAPE, variant, parallel, dtype, seed=SEED)
    assert model.lm_head.weight.is_cuda
    with force_or_not(implementation), sm.Ledger() as ledger:
        whole = model(IDS.cuda())
        cache = model.new_cache()
        parts = [model(part, cache) for part in IDS.cuda().split([13, 1, 7], dim=1)]
    fused = [e for e in ledger.entries if e.op == "all_reduce_add_rms_norm"]
    return whole.cpu(), torch.cat(parts, dim=1).cpu(), {entry.implementation for entry in fused}


def force_or_not(implementation):
    from contextlib import nullcontext

    return force(implementation) if implementation else nullcontext()


@pytest.mark.parametrize(("variant", "ep", "attention"), LAYOUTS)
def test_every_layout_against_the_oracle(ranks, exact, variant, ep, attention):
    if (tp := tp_of(ranks)) % ep:
        pytest.skip(f"{ep} expert groups need as many ranks")
    parallel = sm.ParallelConfig(tp, ep, attention)
    results = ranks.run(one_pass, variant, parallel, torch.float32, timeout=120)
    for whole, in_parts, _ in results:
        # float32 without TF32, 5 layers: rounding is some 1e-6, a wrong sum is off by percents.
        assert relative_error(whole, exact) < 1e-4
        assert relative_error(in_parts, exact) < 1e-4
        assert torch.equal(whole, results[0][0]), "ranks differ"


@pytest.mark.parametrize("implementation", ["unfused", "triton", "flashinfer"])
def test_the_fused_variant_in_every_implementation(ranks, exact, implementation):
    if implementation == "flashinfer":
        pytest.importorskip("flashinfer.comm", reason="needs FlashInfer", exc_type=ImportError)
    parallel = sm.ParallelConfig(tp_of(ranks), 2)
    results = ranks.run(
        one_pass, "fused", parallel, torch.bfloat16, implementation, timeout=600
    )  # which FlashInfer may have to compile for
    for whole, in_parts, ran in results:
        assert all(name.startswith(implementation) for name in ran)
        assert ran
        # Mean: a near-tie in the router may pick another expert; bf16 keeps 8 bits over 5 layers.
        for logits in (whole, in_parts):
            error = (logits.double() - exact).abs().mean() / exact.abs().mean()
            assert error < 0.15, f"mean relative error {error}"
        assert torch.equal(whole, results[0][0]), "ranks differ"


def replayed_and_eager(variant, parallel, implementation=None):
    """Tokens decoded by a replayed graph and one step after the other, and how many are no ties."""
    model = sm.Step3p5ForCausalLM.from_config(SHAPE, variant, parallel, torch.bfloat16, seed=SEED)
    ids = IDS.cuda()
    with force_or_not(implementation):
        replayed = model.generate(ids, 20)
        eager, certain, _ = eager_tokens(model, ids, 20, model.decode_graph.capacity)
    return replayed.cpu(), eager.cpu(), certain


GRAPHS = [
    *((variant, attention, None) for variant in sm.VARIANTS for attention in ("tp", "dp")),
    *(("fused", "tp", implementation) for implementation in ("unfused", "triton", "flashinfer")),
]


@pytest.mark.parametrize(("variant", "attention", "implementation"), GRAPHS)
def test_a_replayed_decode_graph_equals_eager_steps(ranks, variant, attention, implementation):
    if implementation == "flashinfer":
        pytest.importorskip("flashinfer.comm", reason="needs FlashInfer", exc_type=ImportError)
    parallel = sm.ParallelConfig(tp_of(ranks), 2, attention)
    results = ranks.run(replayed_and_eager, variant, parallel, implementation, timeout=600)
    for replayed, eager, certain in results:
        assert replayed.shape == (3, 41)
        for sequence, end in enumerate(certain):
            assert torch.equal(replayed[sequence, :end], eager[sequence, :end])
        assert torch.equal(eager, results[0][1]), "ranks differ"
