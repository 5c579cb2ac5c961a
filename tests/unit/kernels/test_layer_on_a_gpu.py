"""One layer's share as a GPU runs it, on the CPU: kernels are noted and not run.

Nothing in a layer waits for a value, so the memory it holds and the kernels it launches are those
of a GPU, whatever the tensors contain.
"""

import os

import pytest
import torch
from noted import Noted

import stepmoe as sm
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import build_groups
from stepmoe.kernels import dispatch
from stepmoe.measure.operations import Work, unavoidable_bytes
from stepmoe.model import experts
from stepmoe.model.kv_cache import KVCache
from stepmoe.variants import LAYERS, Step

# A layer of the published shape with every size an eighth, and the same 8 choices a token: the
# ratios of its tensors are the published ones.
EIGHTH = sm.Step3p5Config.flash().replace(
    hidden_size=512, head_dim=16, moe_intermediate_size=160, share_expert_dim=160, num_experts=36
)
PARALLEL = sm.ParallelConfig(8, 4, simulate_rank=1)


@pytest.fixture
def on_gpu(device, monkeypatch):
    """CPU tensors go to the GPU's kernels, which are noted in place of being run."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run here: tests/cuda measure them")
    from triton.runtime.interpreter import InterpretedFunction

    from stepmoe.kernels import linear_gpu, routing_gpu

    noted = Noted()

    def note(self, *args, **kwargs):
        noted.kernels.append(self.fn.__name__)

    own_logits = routing_gpu.compute_logits

    def logits(x, weight):  # in place of a product that torch has on a GPU only
        if linear_gpu.is_few(x, weight):
            return own_logits(x, weight)
        noted.kernels.append("mm")
        return x.new_empty(len(x), len(weight), dtype=torch.float32)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(routing_gpu, "compute_logits", logits)
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(experts, "FEW_CHOICES", 512)  # 64 tokens: an eighth, too
    return noted


def run_layer(noted, variant, index, batch, length, cache=None):
    """A layer between two others; its inputs, as the layer before makes them, are noted with it."""
    comm = Communicator(build_groups(PARALLEL)["tp"])
    layer = LAYERS[variant](EIGHTH, PARALLEL, index, comm).bfloat16().requires_grad_(False)
    layer.moe.router_bias.data = torch.zeros(36)
    tokens = batch * length
    step = Step(batch, length, cache.length if cache else 0, -(-tokens // 8), cache)
    with torch.no_grad(), noted:
        if layer.shards_residual:
            rows, place = step.tokens_per_rank, lambda x, name: comm.sharded(x, tokens, name)
            first = place
        else:
            rows, place = tokens, comm.replicated
            first = comm.partial if variant == "fused" else comm.replicated
        given = [
            first(torch.zeros(rows, 512, dtype=torch.bfloat16), "x"),
            place(torch.zeros(rows, 512, dtype=torch.bfloat16), "residual"),
        ]
        noted.kernels.clear()
        layer(*given, step)


@pytest.mark.parametrize("index", [4, 5])  # full, sliding
@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_memory_of_a_prefill(on_gpu, variant, index):
    run_layer(on_gpu, variant, index, 2, 512)
    # An average rank's rows: 2 of a token's 8 choices.
    work = Work(EIGHTH, index, PARALLEL, 2, 512, 512, 2 * 1024, 9, 1024)
    assert on_gpu.peak < 1.5 * unavoidable_bytes(work)
    assert on_gpu.peak > unavoidable_bytes(work), "something was not noted"


PASS = ["_grouped", "_grouped", "_unpermute"]


def test_kernels_of_a_prefill(on_gpu):
    run_layer(on_gpu, "deferred", 5, 2, 512)
    on_gpu.kernels.remove("_to_copy")  # the rotary frequencies, once
    attention = ["_add_norm", "mm", "_norm_rotate", "_attend", "mm"]
    router = ["mm", "_choose", "_count", "_add_up", "_place"]
    shared = ["_add_norm", "mm", "_swiglu", "mm"]
    assert on_gpu.kernels == [*attention, *shared, *router, *PASS, *PASS, *PASS]


@pytest.mark.parametrize(
    ("batch", "product", "experts"),
    [
        (1, "_sums", ["_gate_up", "_down"]),
        (16, "_dots", ["_place_few", "_grouped", "_grouped", "_unpermute"]),
    ],
)
def test_kernels_of_a_decode_step(on_gpu, batch, product, experts):
    cache = KVCache(EIGHTH, torch.device("cpu"), capacity=4096, holds_all=True)
    cache.length = 4095
    run_layer(on_gpu, "deferred", 4, batch, 1, cache)
    for once in ("_to_copy", "new_zeros", "new_zeros"):  # the rotary frequencies, and the cache
        on_gpu.kernels.remove(once)
    attention = ["_add_norm", product, "_norm_rotate", "_decode", "_combine", product]
    shared = ["_add_norm", product, product]  # SwiGLU within the first
    assert on_gpu.kernels == [*attention, *shared, product, "_choose", *experts]
