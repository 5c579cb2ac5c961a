"""The fused all-reduce + add + norm on an NVIDIA GPU that 2, 4 or 8 ranks share, or a GPU a rank.

Times mean nothing here: ranks that share take turns. Run with `make test-cuda`.
"""

import functools
import itertools
import os
import time

import pytest
import torch
from fused_results import compile_flashinfer, fingerprint, larger_error

import stepmoe as sm

pytestmark = pytest.mark.cuda

EPS = 1e-5
BF16, FP16 = torch.bfloat16, torch.float16
FUSED = ("triton one-shot", "triton two-shot", "flashinfer one-shot", "flashinfer two-shot")
# Relative to float64 over the whole tensor. Rounding to p bits errs by at most 2**-p, on average
# by less than half of that; the sum, the residual and the norm are each rounded once.
TOLERANCE = {BF16: 2**-8, FP16: 2**-11, torch.float32: 2**-20}


@pytest.fixture(scope="module", params=(2, 4, 8), ids="tp{}".format)
def ranks(request):
    with sm.Ranks(request.param, device="cuda") as shared:
        yield shared


def needs_flashinfer(ranks, implementation):
    if implementation.startswith("flashinfer"):
        pytest.importorskip("flashinfer.comm", reason="needs FlashInfer", exc_type=ImportError)
        ranks.run(compile_flashinfer, timeout=900)


class Case:
    """Fresh inputs, the same on every rank, and the float64 result. Lives in a rank."""

    def __init__(self, tokens, hidden, dtype, seed, weight_dtype=None):
        from stepmoe.comm.communicator import Communicator
        from stepmoe.comm.groups import build_groups, world_size

        self.group = build_groups(sm.ParallelConfig(world_size()))["tp"]
        self.comm = Communicator(self.group)
        generator = torch.Generator("cuda").manual_seed(seed)
        normal = functools.partial(torch.randn, generator=generator, device="cuda")
        self.partials = normal(self.group.size, tokens, hidden).to(dtype)
        self.residual = (3 * normal(tokens, hidden)).to(dtype)
        self.weight = (0.3 * normal(hidden)).to(weight_dtype or dtype)

    def run(self, implementation=None):
        """(normed, residual) of this rank, and the ledger's entry."""
        from stepmoe.comm.fusion import force

        partial = self.comm.partial(self.partials[self.group.index].clone(), "partial")
        residual = self.comm.replicated(self.residual, "residual")
        arguments = (partial, residual, self.weight, EPS, "test")
        with sm.Ledger() as ledger:
            if implementation:
                with force(implementation):
                    normed, total = self.comm.all_reduce_add_rms_norm(*arguments)
            else:
                normed, total = self.comm.all_reduce_add_rms_norm(*arguments)
        return normed.tensor, total.tensor, ledger.entries[0]

    def error(self, normed, total):
        """The larger of their relative errors against float64, left on the GPU."""
        exact = self.partials.double().sum(0) + self.residual.double()
        return larger_error(normed, total, exact, self.weight, EPS)


def one_case(implementation, tokens, hidden, dtype, seed, weight_dtype=None):
    case = Case(tokens, hidden, dtype, seed, weight_dtype)
    normed, total, entry = case.run(implementation)
    assert entry.implementation == implementation
    return case.error(normed, total).item(), fingerprint(normed, total).item()


def many_cases(implementation, sizes, dtype):
    seeds = itertools.count(100)
    return [one_case(implementation, *size, dtype, next(seeds)) for size in sizes]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("implementation", FUSED)
def test_right_and_the_same_bits_on_every_rank(ranks, implementation, dtype):
    needs_flashinfer(ranks, implementation)
    sizes = list(itertools.product((1, 3, 64, 257, 2048, 4096), (4096, 21 * 64)))
    if implementation == "flashinfer two-shot":  # which needs more tokens than ranks
        sizes = [size for size in sizes if size[0] > 8]
    results = ranks.run(many_cases, implementation, sizes, dtype, timeout=120)
    for size, *every in zip(sizes, *results, strict=True):
        assert max(error for error, _ in every) < TOLERANCE[dtype], size
        assert len({bits for _, bits in every}) == 1, f"ranks differ at {size}"


@pytest.mark.parametrize("implementation", FUSED)
def test_float32_weight_beside_bfloat16_tensors(ranks, implementation):
    needs_flashinfer(ranks, implementation)
    results = ranks.run(one_case, implementation, 33, 4096, BF16, 7, torch.float32)
    assert max(error for error, _ in results) < TOLERANCE[BF16]
    assert len({bits for _, bits in results}) == 1


def test_float32_tensors_take_triton(ranks):
    for implementation in FUSED[:2]:
        results = ranks.run(one_case, implementation, 33, 21 * 64, torch.float32, 8)
        assert max(error for error, _ in results) < TOLERANCE[torch.float32]


def one_and_two_shots(tokens, hidden):
    case = Case(tokens, hidden, BF16, seed=9)
    one, two = case.run("triton one-shot")[:2], case.run("triton two-shot")[:2]
    case.partials, case.residual = case.partials[:, -3:], case.residual[-3:]
    last = case.run("triton one-shot")[:2]
    same = [torch.equal(a, b) for a, b in zip(one, two, strict=True)]
    return same + [torch.equal(a[-3:], b) for a, b in zip(one, last, strict=True)]


def test_a_row_of_triton_has_the_same_bits_in_one_shot_or_two_and_in_any_company(ranks):
    assert ranks.run(one_and_two_shots, 700, 4096) == [[True] * 4] * len(ranks.run(os.getpid))


def repeat(implementations, times):
    worst = torch.zeros((), dtype=torch.float64, device="cuda")
    bits = torch.zeros((), dtype=torch.int64, device="cuda")  # nothing here waits for the GPU
    for i in range(times):
        case = Case(1 + 37 * i % 300, 21 * 64, BF16, seed=1000 + i)
        implementation = implementations[i % len(implementations)]
        if "two" in implementation and case.residual.shape[0] <= case.group.size:
            implementation = implementations[0]
        normed, total, _ = case.run(implementation)
        worst = torch.maximum(worst, case.error(normed, total))
        bits = bits * 31 + fingerprint(normed, total)
    return worst.item(), bits.item()


@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_a_thousand_fresh_inputs(ranks, name):
    """One shot and two in turn, sizes that change: where slots or flags were mixed up, it shows."""
    needs_flashinfer(ranks, name)
    results = ranks.run(repeat, [f"{name} one-shot", f"{name} two-shot"], 1000, timeout=200)
    assert max(worst for worst, _ in results) < TOLERANCE[BF16]
    assert len({bits for _, bits in results}) == 1


def captured(implementation, tokens, replays):
    """Three calls in a row in one CUDA graph, replayed with fresh inputs, against the same calls
    outside of a graph; between replays calls of another size use the same window."""
    from stepmoe.comm.fusion import force

    case, other = Case(tokens, 4096, BF16, seed=1), Case(17, 4096, BF16, seed=2)

    def three_times(residual):
        for i in range(3):
            partial = case.partials[(case.group.index + i) % case.group.size].clone()
            normed, residual = (
                placed.tensor
                for placed in case.comm.all_reduce_add_rms_norm(
                    case.comm.partial(partial, "p"),
                    case.comm.replicated(residual, "r"),
                    case.weight,
                    EPS,
                    "",
                )
            )
        return normed, residual

    same, bits = 0, []
    with force(implementation):
        three_times(case.residual)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = three_times(case.residual)
        for replay in range(replays):
            fresh = Case(tokens, 4096, BF16, seed=10 + replay)
            case.partials.copy_(fresh.partials)
            case.residual.copy_(fresh.residual)
            graph.replay()
            bits.append(fingerprint(*kept).item())
            other.run()
            same += all(map(torch.equal, kept, three_times(case.residual)))
    return same, bits


@pytest.mark.parametrize("implementation", FUSED)
def test_cuda_graph_replays(ranks, implementation):
    needs_flashinfer(ranks, implementation)
    results = ranks.run(captured, implementation, 40, 20, timeout=120)
    assert [same for same, _ in results] == [20] * len(results)
    assert all(bits == results[0][1] for _, bits in results)
    assert len(set(results[0][1])) == 20, "replays did not see the fresh inputs"


def beyond(implementation, limit):
    """More tokens than the first window holds, and then a graph captured before it grew."""
    from stepmoe.comm.fusion import force

    case = Case(5, 512, BF16, seed=3)
    partial = case.partials[case.group.index]

    def call():
        placed = case.comm.partial(partial.clone(), "p")
        residual = case.comm.replicated(case.residual, "r")
        return case.comm.all_reduce_add_rms_norm(placed, residual, case.weight, EPS, "")

    with force(implementation):
        first = call()[0].tensor
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()[0].tensor
        large = Case(limit + 1, 512, BF16, seed=4)
        refusal = ""
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                large.run(implementation)
        except RuntimeError as error:
            refusal = str(error)
        normed, total, _ = large.run(implementation)
        graph.replay()
        return large.error(normed, total).item(), torch.equal(kept, first), refusal


@pytest.mark.parametrize(("implementation", "limit"), [("triton", 256), ("flashinfer", 2048)])
def test_more_tokens_than_the_window_holds(ranks, implementation, limit):
    needs_flashinfer(ranks, implementation)
    for error, graph_is_right, refusal in ranks.run(beyond, implementation, limit, timeout=120):
        assert error < TOLERANCE[BF16]
        assert graph_is_right
        assert "run the same call once before the capture" in refusal


def own_choice(tokens, hidden, dtype):
    case = Case(tokens, hidden, dtype, seed=5)
    _, _, entry = case.run()
    return entry.implementation, entry.reason


def test_the_choice_and_its_reason_are_in_the_ledger(ranks):
    shares = "ranks share a GPU" in ranks.describe()
    results = ranks.run(own_choice, 8, 4096, BF16, timeout=300)
    assert len(set(results)) == 1
    implementation, reason = results[0]
    if shares:
        assert implementation == "triton one-shot"
        assert "shared GPU" in reason
        assert "flashinfer: ranks take turns" in reason
    else:
        assert "one GPU a rank" in reason
        assert implementation in ("flashinfer", "triton one-shot")
        assert ("flashinfer: cannot run" in reason) == (implementation != "flashinfer")
    for implementation, reason in ranks.run(own_choice, 2049, 64, BF16):
        assert (implementation, "2048" in reason) == ("unfused", True)


def refused(implementation, dtype):
    try:
        Case(4, 64, dtype, seed=6).run(implementation)
    except sm.ConfigError as error:
        return str(error)
    return "it ran"


def test_a_demand_that_cannot_be_met_is_an_error_on_every_rank(ranks):
    for message in ranks.run(refused, "triton", torch.float64):
        assert "has no kernel for float64" in message


def die_in_the_middle(implementation):
    case = Case(16, 4096, BF16, seed=11)
    for i in range(50):
        if case.group.index == 1 and i == 20:
            os._exit(3)
        case.run(implementation)


@pytest.mark.parametrize("implementation", ["triton", "flashinfer"])
def test_a_rank_that_dies_frees_the_others(ranks, implementation):
    needs_flashinfer(ranks, implementation)
    ranks.run(one_case, f"{implementation} one-shot", 16, 4096, BF16, 11, timeout=120)
    begun = time.monotonic()
    with pytest.raises(sm.RankError, match="rank 1 ended its process with exit code 3") as caught:
        ranks.run(die_in_the_middle, implementation)
    assert caught.value.rank == 1
    assert time.monotonic() - begun < 30  # the calls, the death and the end of spinning kernels
    results = ranks.run(one_case, f"{implementation} one-shot", 16, 4096, BF16, 12, timeout=120)
    assert max(error for error, _ in results) < TOLERANCE[BF16]


def come_alone():
    """Rank 0 runs a fused call that the others never enter, with a short patience."""
    from unittest import mock

    from stepmoe.kernels import all_reduce_norm_gpu

    case = Case(4, 192, BF16, seed=14)
    case.run("triton")
    torch.cuda.synchronize()
    if case.group.index == 0:
        with mock.patch.object(all_reduce_norm_gpu, "MAX_LOOKS", 1000):
            case.run("triton")
            torch.cuda.synchronize()


def test_a_rank_whose_peers_do_not_come_ends_with_an_error(ranks):
    with pytest.raises(sm.RankError) as caught:
        ranks.run(come_alone)
    print(caught.value)
    assert caught.value.rank == 0
    ranks.restart()  # after an assertion the process has no GPU any more


def fail_to_open(broken_rank):
    from unittest import mock

    from stepmoe.comm.fusion import flashinfer_path, triton_path

    case = Case(8, 192, BF16, seed=13)
    broken = case.group.index == broken_rank
    error = torch.cuda.OutOfMemoryError("no memory for a window")
    room = error if broken else triton_path.Room
    with (
        mock.patch.object(flashinfer_path, "_problem", return_value="no room" if broken else ""),
        mock.patch.object(triton_path, "Room", side_effect=room),
    ):
        normed, total, entry = case.run()
    return case.error(normed, total).item(), entry.implementation, entry.reason


def test_one_rank_that_fails_to_set_up_makes_all_fall_back(ranks):
    shares = "ranks share a GPU" in ranks.describe()
    for error, implementation, reason in ranks.run(fail_to_open, 1):
        assert error < TOLERANCE[BF16]
        assert implementation == "unfused"
        assert "rank 1: OutOfMemoryError: no memory for a window" in reason
        assert ("flashinfer: cannot run: rank 1: no room" in reason) == (not shares)
