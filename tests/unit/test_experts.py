"""Passes over the rows of the routed experts: bounded memory, and no token is ever dropped."""

import pytest
import torch

import stepmoe as sm
from stepmoe.kernels.permute import RowOrder, sort_by_expert
from stepmoe.model import experts as module
from stepmoe.model.experts import RoutedExperts, passes

TINY = sm.Step3p5Config.tiny()


def experts_of(ep, rank):
    made = RoutedExperts(TINY, TINY.layer(4), sm.ParallelConfig(4, ep), rank).double()
    torch.manual_seed(rank)
    for weight in made.parameters():
        torch.nn.init.normal_(weight.data, std=0.2)
    return made.requires_grad_(False)


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("spread", ["routed", "all here", "none here"])
@pytest.mark.parametrize("step", [1, 7, 100])
def test_many_passes_give_what_one_gives(monkeypatch, ep, spread, step):
    experts = experts_of(ep, rank=1)
    x = torch.randn(21, TINY.hidden_size, dtype=torch.float64)
    onto = torch.randn_like(x)
    ids, weights = experts.gate(x, experts.router_bias)
    num_local = TINY.num_experts // ep
    if spread == "all here":
        ids = experts.first_expert + ids % num_local
    elif spread == "none here" and ep > 1:
        ids = (experts.first_expert + num_local + ids % num_local) % TINY.num_experts
    once = experts.apply_experts(x, ids, weights, onto.clone())
    monkeypatch.setattr(module, "passes", lambda order, ep: range(0, ids.numel(), step))
    often = experts.apply_experts(x, ids, weights, onto.clone())
    # float64; the passes only group the sum of a token's rows differently.
    torch.testing.assert_close(often, once, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ep", [1, 4])
def test_what_the_rows_are_added_to_gives_the_sum_to_the_last_bit(dtype, ep):
    experts = experts_of(ep, rank=1).to(dtype)
    x, onto = (torch.randn(21, TINY.hidden_size).to(dtype) for _ in range(2))
    before = onto.clone()
    assert torch.equal(experts(x, onto), onto + experts(x))
    assert torch.equal(onto, before), "the reference leaves its inputs alone"


def test_on_the_cpu_one_pass_has_exactly_the_rows_of_this_rank():
    ids = torch.rand(50, 16).topk(4).indices
    order = sort_by_expert(ids, 4, 4)
    here = int(((ids >= 4) & (ids < 8)).sum())
    assert passes(order, ep=4) == range(0, here, here)
    assert len(passes(sort_by_expert(ids, 16, 4), ep=4)) == 0


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, and has no number that a host may read."""

    is_cuda = True

    def __int__(self):
        raise AssertionError("the host waited for the GPU")


@pytest.mark.parametrize(
    ("tokens", "ep", "step", "count"),
    [(16384, 4, 43776, 3), (16384, 1, 131072, 1), (512, 4, 4096, 1), (513, 4, 1408, 3)],
)
def test_on_a_gpu_the_passes_follow_from_the_token_count_alone(tokens, ep, step, count):
    ends = torch.zeros(72, dtype=torch.int32).as_subclass(OnGpu)
    positions = torch.empty(tokens, 8, dtype=torch.int32)
    starts = passes(RowOrder(positions, positions.flatten(), ends), ep)
    assert (starts.step, len(starts)) == (step, count)
    assert starts[-1] + starts.step >= positions.numel(), "a choice has no pass"
