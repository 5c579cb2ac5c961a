"""Orders of summation, and distances between logits: rounding as written out by hand."""

import pytest
import torch
from scipy.special import rel_entr, softmax

import stepmoe as sm
from stepmoe.comm import wire
from stepmoe.comm.summation import ORDERS, add_up, summation
from stepmoe.measure.distance import distance, fingerprint, relative_error

STATED = [order for order in ORDERS if order != "library"]


@pytest.mark.parametrize("order", STATED)
@pytest.mark.parametrize(("ranks", "rows"), [(1, 3), (2, 5), (3, 2), (4, 8), (8, 3)])
def test_whole_numbers_are_summed_exactly(order, ranks, rows):
    addends = torch.randint(-9, 10, (ranks, rows, 7)).float()  # fewer rows than ranks, too
    assert torch.equal(add_up(addends, order), addends.sum(0))


def test_each_order_rounds_where_it_says():
    """bfloat16 has 8 bits: 256 + 1 is rounded to 256, and 256 + 2 is 258."""
    addends = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().view(4, 1, 1).expand(4, 4, 1)
    # Block b begins at rank b + 1. Ties go to the even neighbour: 257 to 256, 259 to 260.
    #   0: 1 + 1 + 1 + 256 = 259      1: 1 + 1 + 256 = 258, + 1 = 259
    #   2: 1 + 256 = 257, a 1 lost, and again       3: 256 + 1 = 257, the same
    assert add_up(addends, "ring").flatten().tolist() == [260.0, 260.0, 256.0, 256.0]
    assert add_up(addends, "tree").flatten().tolist() == [258.0] * 4  # (256 + 1) + (1 + 1)
    assert add_up(addends, "wide").flatten().tolist() == [260.0] * 4  # 259, rounded once


@pytest.mark.parametrize("order", STATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors_stay_within_the_bound_of_the_order(order, dtype):
    addends = torch.randn(8, 33, 5).to(dtype)
    exact = addends.double().sum(0)
    # Every rounded addition errs by half a unit of a partial sum; a sum rounded once by half a unit
    # of the result, and by what the wider dtype is off (2^-16 of that, or less).
    reach = addends.double().abs().sum(0) * 7 if order != "wide" else exact.abs() * (1 + 1e-4)
    error = (add_up(addends, order).double() - exact).abs()
    assert (error <= reach * torch.finfo(dtype).eps / 2 + 1e-15).all()


def test_sums_are_the_library_s_again_afterwards():
    before = wire.all_reduce, wire.reduce_scatter
    with summation("ring"):
        assert wire.all_reduce is not before[0]
        assert wire.reduce_scatter is not before[1]
    assert (wire.all_reduce, wire.reduce_scatter) == before
    with pytest.raises(ZeroDivisionError), summation("ring"):
        raise ZeroDivisionError
    assert (wire.all_reduce, wire.reduce_scatter) == before
    with summation("library"):
        assert (wire.all_reduce, wire.reduce_scatter) == before
    wrong = summation("random")
    with pytest.raises(sm.ConfigError, match="'random': use one of library, ring"), wrong:
        pass


def test_distance_of_logits_is_that_of_their_distributions():
    exact = torch.randn(3, 5, 11, dtype=torch.float64) * 3
    logits = (exact + 0.3 * torch.randn(3, 5, 11)).float()
    found = distance(logits, exact)
    p, q = softmax(exact.numpy(), axis=-1), softmax(logits.double().numpy(), axis=-1)
    assert found.kl == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-9)
    assert found.flips == (p.argmax(-1) != q.argmax(-1)).sum()
    assert found.largest == pytest.approx((logits.double() - exact).abs().max().item())
    assert (found.positions, found.logits) == (15, relative_error(logits, exact))
    itself = distance(exact, exact)
    assert (itself.logits, itself.largest, itself.kl, itself.flips) == (0, 0, 0, 0)


def test_fingerprints_see_every_bit():
    tensor = torch.randn(4, 6).bfloat16()
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    other = tensor.clone()
    other.view(torch.int16)[2, 3] ^= 1
    assert fingerprint(other) != fingerprint(tensor)
    assert fingerprint(tensor.float()) != fingerprint(tensor)
    assert fingerprint(tensor.view(6, 4)) != fingerprint(tensor)
    assert fingerprint(torch.zeros(2)) != fingerprint(-torch.zeros(2))
