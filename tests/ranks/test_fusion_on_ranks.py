"""The Triton kernels in Triton's interpreter, over memory that four CPU ranks share; and the vote.

What runs on a GPU is the same source: tests/cuda/test_fusion.py.
"""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import stepmoe as sm

pytest.importorskip("triton", reason="needs Triton, which PyPI has for Linux only")
EPS = 1e-5
HIDDEN = 3 * 64  # an odd multiple of 64: neither a power of two nor one block


def set_up(shapes, dtype=torch.float32, seed=0):
    """In a rank: its group, and for each number of tokens every rank's partial sums and a residual,
    and one weight, all the same on every rank."""
    from stepmoe.comm.groups import build_groups, world_size

    torch.manual_seed(seed)
    group = build_groups(sm.ParallelConfig(world_size()))["tp"]
    weight = 0.3 * torch.randn(HIDDEN)
    cases = [
        (torch.randn(group.size, t, HIDDEN).to(dtype), 3 * torch.randn(t, HIDDEN).to(dtype))
        for t in shapes
    ]
    return group, cases, weight


def exact(partials, residual, weight):
    total = partials.double().sum(0) + residual.double()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    return total * scale * (1 + weight.double()), total


def everyones(value):
    """Whether all ranks have the same bits."""
    every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(every, value)
    return all(torch.equal(value, other) for other in every)


def run_kernels(dtype):
    """Calls of changing size and number of shots through one window; small programs and windows,
    so that rows share programs and the window grows."""
    group, cases, weight = set_up((1, 5, 9, 3, 7, 0), dtype)
    from stepmoe.comm.fusion import Fusion, force, triton_path
    from stepmoe.kernels import all_reduce_norm_gpu

    shots = ("one-shot", "two-shot", "one-shot", "one-shot", "two-shot", "two-shot")
    fusion, found = Fusion(), []
    with (
        mock.patch.object(all_reduce_norm_gpu, "PROGRAMS", 4),
        mock.patch.object(triton_path, "FIRST_CAPACITY", 4),
    ):
        for which, (partials, residual) in zip(shots, cases, strict=True):
            with force(f"triton {which}"):
                choice = fusion.choose(group, partials[group.index], weight)
                normed, total = fusion.run(choice, partials[group.index], residual, weight, EPS)
            same = everyones(normed) and everyones(total)
            found.append((normed, total, *exact(partials, residual, weight), same))
    return found


# Over single entries of up to 12: float32 rounds four numbers of that size at 24 bits; Triton's
# interpreter cuts bfloat16 off at 8 bits, twice.
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 21), (torch.bfloat16, 6)])
def test_kernels_against_float64(ranks4, dtype, bits):
    for results in ranks4.run(run_kernels, dtype):
        for normed, total, exact_normed, exact_total, same in results:
            assert same, "ranks differ"
            limits = {"rtol": 2.0**-bits, "atol": 4 * 2.0**-bits}
            torch.testing.assert_close(normed.double(), exact_normed, **limits)
            torch.testing.assert_close(total.double(), exact_total, **limits)


def through_the_model():
    """The fused variant with Triton demanded, against the same with the unfused reference."""
    set_up(())
    from stepmoe.comm.fusion import force

    config = sm.Step3p5Config.tiny()
    model = sm.Step3p5ForCausalLM.from_config(config, "fused", device="cpu")
    ids = torch.arange(2).view(2, 1)
    with force("triton"), sm.Ledger() as ledger:
        logits = model(ids)
    return logits, model(ids), {(e.op, e.implementation, e.reason) for e in ledger.entries}


def test_the_fused_variant_runs_on_it(ranks4):
    for logits, reference, entries in ranks4.run(through_the_model):
        # float32: the sums of four ranks in another order, through two layers.
        torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)
        assert entries == {
            ("all_reduce_add_rms_norm", "triton one-shot", "forced"),
            ("all_reduce", "", ""),
        }


def vote(broken_rank, topology):
    """Choose as on GPUs, while one rank cannot open its window."""
    group, [(partials, _)], weight = set_up((4,), torch.bfloat16)
    from stepmoe.comm.fusion import Fusion, Place, dispatch, triton_path

    broken = MemoryError("no memory here") if group.index == broken_rank else triton_path.Room
    fusion, partial = Fusion(), partials[group.index]
    with (
        mock.patch.object(dispatch, "find_place", return_value=Place(topology, 4, (9, 0))),
        mock.patch.object(triton_path, "Room", side_effect=broken) as room,
    ):
        choices = [fusion.choose(group, partial, weight) for _ in range(2)]
    return choices, room.call_count


def test_one_rank_that_cannot_makes_all_fall_back_with_its_reason(ranks4):
    for (first, second), attempts in ranks4.run(vote, 2, "shared GPU"):
        assert first.implementation == "unfused"
        assert "triton: cannot run: rank 2: MemoryError: no memory here" in first.reason
        assert second == first
        assert attempts == 1, "a known answer needs no second vote"


def test_without_flashinfer_all_take_triton(ranks4):
    for (first, second), _ in ranks4.run(vote, None, "one GPU a rank"):
        assert first.implementation == "triton one-shot"
        assert "flashinfer: cannot run: rank 0: ModuleNotFoundError" in first.reason
        assert second == first


def demand(implementation, dtype=torch.float32):
    group, [(partials, _)], weight = set_up((4,), dtype)
    from stepmoe.comm.fusion import Fusion, force

    try:
        with force(implementation):
            Fusion().choose(group, partials[group.index], weight)
    except sm.ConfigError as error:
        return str(error)
    return "it ran"


@pytest.mark.parametrize(
    ("implementation", "dtype", "message"),
    [
        ("flashinfer", torch.bfloat16, "needs one GPU a rank or shared GPU, here: cpu"),
        ("triton", torch.float64, "has no kernel for float64"),
    ],
)
def test_a_demand_that_cannot_be_met_is_an_error(ranks4, implementation, dtype, message):
    for said in ranks4.run(demand, implementation, dtype):
        assert said.startswith(f"force('{implementation}')")
        assert message in said


def die_in_a_meeting():
    group, [(partials, residual)], weight = set_up((2,))
    from stepmoe.comm.fusion import Fusion, force

    fusion, partial = Fusion(), partials[group.index]
    with force("triton"):
        choice = fusion.choose(group, partial, weight)
        if group.index == 1:
            os._exit(3)
        fusion.run(choice, partial, residual, weight, EPS)


def test_a_rank_that_dies_frees_those_that_wait_for_it(ranks4):
    with pytest.raises(sm.RankError, match="rank 1 ended its process with exit code 3"):
        ranks4.run(die_in_a_meeting, timeout=60)
    assert ranks4.run(demand, "unfused") == ["it ran"] * 4


def time_it():
    from stepmoe.measure import time_fused_ops

    try:
        time_fused_ops([1])
    except sm.ConfigError as error:
        return str(error)
    return "it ran"


def test_ranks_without_a_gpu_of_their_own_are_not_timed(ranks4):
    for said in ranks4.run(time_it):
        assert "needs two ranks or more with one GPU a rank; here: cpu" in said
