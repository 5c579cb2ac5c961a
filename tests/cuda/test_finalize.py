"""FlashInfer's MoE-finalize kernel on an NVIDIA GPU that 2, 4 or 8 ranks share, or a GPU a rank.

Before and after each of its calls another fused all-reduce runs, as in a layer: without one the
kernel may wait for ever (stepmoe/comm/fusion/finalize.py says why).
"""

import pytest
import torch
from fused_results import compile_flashinfer, fingerprint, larger_error

import stepmoe as sm
from stepmoe.variants.finalized import FinalizedLayer

pytest.importorskip("flashinfer.comm", reason="needs FlashInfer", exc_type=ImportError)
pytestmark = pytest.mark.cuda

EPS, HIDDEN, EXPERTS, TOP_K = 1e-5, 4096, 288, 8
BF16, FP16 = torch.bfloat16, torch.float16
# Relative to float64 over the whole tensor. The kernel rounds weights, 8 products, 8 sums, the
# shared expert's, those over up to 8 ranks, the residual and the norm: the same arithmetic in
# torch errs by at most 2**-7.9 in bfloat16.
TOLERANCE = {BF16: 2**-7.5, FP16: 2**-10.5}


@pytest.fixture(scope="module", params=(2, 4, 8), ids="tp{}".format)
def ranks(request):
    with sm.Ranks(request.param, device="cuda") as shared:
        shared.run(compile_flashinfer, timeout=900)
        yield shared


class Case:
    """Fresh inputs, the same on every rank, and the float64 result. Lives in a rank."""

    def __init__(self, tokens, ep, dtype, seed):
        from stepmoe.comm.communicator import Communicator
        from stepmoe.comm.groups import build_groups, world_size
        from stepmoe.kernels.permute import sort_by_expert

        self.group = build_groups(sm.ParallelConfig(world_size()))["tp"]
        self.comm = Communicator(self.group)
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

        popular = normal(EXPERTS, dtype=torch.float32)  # some ranks get many rows
        ids = (normal(tokens, EXPERTS, dtype=torch.float32) + popular).topk(TOP_K).indices
        scores = normal(tokens, TOP_K, dtype=torch.float32).sigmoid()
        self.weights = 3 * scores / scores.sum(-1, keepdim=True)
        cut = self.group.size // ep  # ranks that share an expert: each gives an addend
        self.addends = normal(cut, tokens, TOP_K, HIDDEN)
        self.shared = normal(self.group.size, tokens, HIDDEN)
        self.residual, self.gamma = 3 * normal(tokens, HIDDEN), 0.3 * normal(HIDDEN)
        index, local = self.group.index, EXPERTS // ep
        self.order = sort_by_expert(ids, index // cut * local, local)
        self.outputs = self.addends[index % cut].flatten(0, 1)[
            self.order.choices.long().clamp(0, tokens * TOP_K - 1)
        ]
        behind = torch.arange(tokens * TOP_K, device="cuda") >= self.order.ends[-1]
        self.outputs.masked_fill_(behind[:, None], float("nan"))  # what a rank has no row for

    def run(self):
        """(normed, residual) of this rank."""
        from stepmoe.comm.fusion import Rows, Unsummed, force
        from stepmoe.comm.placement import PARTIAL

        shared = self.shared[self.group.index].clone()
        rows = Rows(self.outputs, self.order, self.weights)
        pending = Unsummed(shared, PARTIAL, self.group, len(shared), "pending", rows=rows)
        residual = self.comm.replicated(self.residual, "residual")
        with force("flashinfer"):
            done = self.comm.all_reduce_add_rms_norm(pending, residual, self.gamma, EPS, "test")
        return [placed.tensor for placed in done]

    def attention(self):
        """The other collective that stands between two calls."""
        from stepmoe.comm.fusion import force

        partial = self.comm.partial(self.shared[self.group.index].clone(), "partial")
        residual = self.comm.replicated(self.residual, "residual")
        with force("flashinfer"):
            done = self.comm.all_reduce_add_rms_norm(partial, residual, self.gamma, EPS, "test")
        return [placed.tensor for placed in done]

    def error(self, normed, total):
        """The larger of their relative errors against float64."""
        exact = self.residual.double() + self.shared.double().sum(0)
        for k in range(TOP_K):
            exact += self.weights[:, k, None].double() * self.addends[:, :, k].double().sum(0)
        return larger_error(normed, total, exact, self.gamma, EPS)


def many_cases(tokens, dtype, times):
    """The worst error, a fingerprint of all results, what ran."""
    worst = torch.zeros((), dtype=torch.float64, device="cuda")
    bits = torch.zeros((), dtype=torch.int64, device="cuda")
    ran = set()
    for seed in range(times):
        size = torch.distributed.get_world_size()
        case = Case(tokens, size if seed % 2 else max(1, size // 2), dtype, 1000 * tokens + seed)
        with sm.Ledger() as ledger:
            normed, total = case.run()
        case.attention()
        ran.add(ledger.entries[0].implementation)
        worst = torch.maximum(worst, case.error(normed, total))
        bits = bits * 31 + fingerprint(normed, total)
    return worst.item(), bits.item(), ran


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 3, 64, 100, 128])
def test_right_and_the_same_bits_on_every_rank(ranks, tokens, dtype):
    results = ranks.run(many_cases, tokens, dtype, 20, timeout=120)
    assert max(worst for worst, _, _ in results) < TOLERANCE[dtype]
    assert len({bits for _, bits, _ in results}) == 1
    assert all(ran == {"flashinfer moe-finalize"} for *_, ran in results)


def captured(tokens, replays):
    """Three layers' worth of calls in one CUDA graph, replayed with fresh inputs, against the same
    calls outside of a graph; how often the kernel stands in the graph."""
    from stepmoe.comm.ledger import untimed

    ep = torch.distributed.get_world_size()
    case = Case(tokens, ep, BF16, seed=1)

    def three_times():
        return [tensor for _ in range(3) for tensor in (*case.run(), *case.attention())]

    three_times()
    graph = torch.cuda.CUDAGraph()
    with untimed() as ledger, torch.cuda.graph(graph):
        kept = three_times()
    same, bits = 0, []
    for replay in range(replays):
        fresh = Case(tokens, ep, BF16, seed=10 + replay)
        for name in ("weights", "shared", "residual", "gamma", "outputs"):
            getattr(case, name).copy_(getattr(fresh, name))
        case.order.positions.copy_(fresh.order.positions)
        graph.replay()
        bits.append(fingerprint(*kept).item())
        same += all(map(torch.equal, kept, three_times()))
    ran = [entry.implementation for entry in ledger.entries]
    return same, bits, ran.count("flashinfer moe-finalize")


def test_cuda_graph_replays(ranks):
    results = ranks.run(captured, 16, 20, timeout=120)
    _, bits, _ = results[0]
    assert results == [(20, bits, 3)] * len(results)
    assert len(set(bits)) == 20, "replays did not see the fresh inputs"


def whole_model(input_ids):
    """Logits of `fused` and of the finalized layers, in bfloat16; what ran."""
    from stepmoe.comm.fusion import force

    size = torch.distributed.get_world_size()
    config = sm.Step3p5Config.tiny().replace(hidden_size=256, num_experts_per_tok=8)
    parallel = sm.ParallelConfig(size, size // 2)
    found = []
    with force("flashinfer"):
        for variant in ("fused", FinalizedLayer):
            model = sm.Step3p5ForCausalLM.from_config(config, variant, parallel, dtype=BF16)
            with sm.Ledger() as ledger:
                for _ in range(5):
                    logits = model(input_ids)
            found.append(logits.float())
    return found, [entry.implementation for entry in ledger.entries]


def test_a_model_of_such_layers(ranks):
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))
    if len(ranks.run(torch.distributed.get_rank)) > 4:
        pytest.skip("tiny() has 4 key-value heads")
    for (fused, finalized), ran in ranks.run(whole_model, ids, timeout=120):
        # Other roundings: 0.01 with the kernel's arithmetic in torch, up to 0.07 where a near tie
        # goes to another expert. The mildest fault tried, one of 8 experts left out, makes 0.31.
        assert (fused - finalized).norm() / fused.norm() < 0.2
        assert ran.count("flashinfer moe-finalize") == 5 * 3
