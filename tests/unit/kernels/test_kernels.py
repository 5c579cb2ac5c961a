"""Every Triton kernel against its plain reference in float64: fresh inputs, uneven sizes.

float16 and float32 here: the interpreter rounds to bfloat16 another way than a GPU does.
"""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepmoe.kernels import few_experts, grouped, linear, norm, permute, routing, swiglu

# The fixture is the same device for every example.
examples = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = st.sampled_from([torch.float32, torch.float16])
SIZES = st.sampled_from([8, 40, 64, 104])


def tolerance(dtype):
    # Inputs of size 1 to 10: some roundings of 2^-24 or 2^-11 relative, and of the result.
    return {"atol": 2e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 4e-3, "rtol": 4e-3}


def drawn(data, *shape, dtype, device, scale=1.0):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def close(found, expected, dtype):
    torch.testing.assert_close(found.double(), expected.double(), **tolerance(dtype))


@examples
@given(data=st.data())
def test_norm_alone_and_with_the_add(device, data):
    from stepmoe.kernels import norm_gpu

    dtype, size = data.draw(DTYPES), data.draw(SIZES)
    rows = data.draw(st.integers(1, 150))
    x, residual = (drawn(data, rows, size, dtype=dtype, device=device, scale=3) for _ in range(2))
    weight = drawn(data, size, dtype=torch.float32, device=device, scale=0.3)
    eps = data.draw(st.sampled_from([1e-5, 1e-1]))
    expected = norm.gemma_rms_norm(x.double(), weight.double(), eps)
    close(norm_gpu.gemma_rms_norm(x, weight, eps), expected, dtype)
    wide = torch.cat((x, residual), dim=1)  # rows that are not contiguous
    close(norm_gpu.gemma_rms_norm(wide[:, :size], weight, eps), expected, dtype)
    normed, total = norm_gpu.add_gemma_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, x + residual), "the sum is rounded once, as torch rounds it"
    close(normed, norm.gemma_rms_norm(total.double(), weight.double(), eps), dtype)


@examples
@given(data=st.data())
def test_clamped_swiglu(device, data):
    from stepmoe.kernels import swiglu_gpu

    dtype, size = data.draw(DTYPES), data.draw(SIZES)
    rows, limit = data.draw(st.integers(1, 90)), data.draw(st.sampled_from([None, 0.4, 2.0]))
    gate_up = drawn(data, rows, 2 * size, dtype=dtype, device=device, scale=3)
    expected = swiglu.clamped_swiglu(gate_up.double(), limit)
    close(swiglu_gpu.clamped_swiglu(gate_up, limit), expected, dtype)
    filled = data.draw(st.integers(0, rows))
    count = torch.tensor([filled], dtype=torch.int32, device=device)
    found = swiglu_gpu.clamped_swiglu(gate_up, limit, count)
    close(found[:filled], expected[:filled], dtype)


@examples
@given(data=st.data())
def test_choice_of_experts(device, data):
    from stepmoe.kernels import routing_gpu

    tokens, experts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, min(9, experts)))
    logits = drawn(data, tokens, experts, dtype=torch.float32, device=device, scale=2)
    bias = drawn(data, experts, dtype=torch.float32, device=device, scale=0.5)
    rule = (top_k, data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 3.0])))
    expected_ids, expected_weights = routing.choose_experts(logits.double(), bias, *rule)
    ids, weights = routing_gpu.choose_experts(logits, bias, *rule)
    # Equal choices although the scores differ by 1e-7: a tie that near has a chance of 1e-5 here.
    assert torch.equal(ids, expected_ids)
    close(weights, expected_weights, torch.float32)


def test_equal_scores_go_to_the_lower_expert(device):
    from stepmoe.kernels import routing_gpu

    logits = torch.tensor([[0.5, 1.0, 1.0, 0.5, 1.0]], device=device)
    ids, _ = routing_gpu.choose_experts(logits, torch.zeros(5, device=device), 4, True, 1.0)
    assert ids.tolist() == [[1, 2, 4, 0]]


def routed(data, device, max_tokens=150):
    """Some tokens' choices; which experts are local; sometimes everyone wants the same ones."""
    tokens, experts = data.draw(st.integers(1, max_tokens)), data.draw(st.integers(2, 40))
    top_k, num_local = data.draw(st.integers(1, 2)), data.draw(st.integers(1, experts))
    first = data.draw(st.integers(0, experts - num_local))
    scores = drawn(data, tokens, experts, dtype=torch.float32, device=device)
    if data.draw(st.booleans()):
        scores[:, data.draw(st.integers(0, experts - 1))] += 100
    return scores.topk(top_k, dim=-1).indices, first, num_local


@examples
@given(data=st.data())
def test_order_and_the_rows_there_and_back(device, data):
    from stepmoe.kernels import permute_gpu, sort_by_expert_gpu

    ids, first, num_local = routed(data, device)
    expected = permute.sort_by_expert(ids.cpu(), first, num_local)
    few = data.draw(st.sampled_from([0, 2048]))  # both ways of sorting
    with mock.patch.object(sort_by_expert_gpu, "_FEW", few):
        order = sort_by_expert_gpu.sort_by_expert(ids, first, num_local)
    for field in dataclasses.fields(order):
        assert torch.equal(getattr(order, field.name).cpu(), getattr(expected, field.name))

    dtype, size = data.draw(DTYPES), data.draw(SIZES)
    x = drawn(data, len(ids), size, dtype=dtype, device=device)
    weights = drawn(data, *ids.shape, dtype=torch.float32, device=device)
    start, count = data.draw(st.integers(0, ids.numel())), data.draw(st.integers(1, ids.numel()))
    filled = max(0, min(count, int(order.ends[-1]) - start))
    rows = permute_gpu.permute_rows(x, order, start, count)
    assert torch.equal(rows[:filled], permute.permute_rows(x, order, start, count)[:filled])

    rows[filled:] = torch.nan  # what nobody computed must not be read
    exact = permute.unpermute_rows(rows.double(), order, weights.double(), start, None)
    found = permute_gpu.unpermute_rows(rows, order, weights, start, None)
    close(found, exact, dtype)
    for limits in ({"_FEW_TOKENS": 0}, {"_FEW_TOKENS": 0, "_MANY_TOKENS": 0}):
        with mock.patch.multiple(permute_gpu, **limits):
            more = permute_gpu.unpermute_rows(rows, order, weights, start, None)
            added = permute_gpu.unpermute_rows(rows, order, weights, start, x.clone())
        assert torch.equal(more, found)
        assert torch.equal(added, x + found)
    # Not nearer to float64 than an addition of its own would be, but the same: no rounding is left
    # out, so a variant's result does not depend on where it adds.
    onto = x.clone()
    together = permute_gpu.unpermute_rows(rows, order, weights, start, onto)
    assert together is onto
    assert torch.equal(together, x + found)
    close(together, x.double() + exact, dtype)


def ways_of_grouped_products():
    """What to patch: for few rows; for many; for many with tiles so small that a program looks for
    more a second time; for many on a GPU that has no memory for the second half's tiles."""
    from stepmoe.kernels import grouped_gpu, grouped_many_gpu
    from stepmoe.kernels.tiles_gpu import Tile

    small = Tile(rows=16, columns=16, depth=32, warps=4, stages=3)
    many = {"FEW_ROWS": 0}
    return [
        [mock.patch.object(grouped_gpu, "FEW_ROWS", 4096)],
        [mock.patch.multiple(grouped_gpu, **many)],
        [
            mock.patch.multiple(grouped_gpu, GATE_UP_MANY=small, **many),
            mock.patch.object(grouped_many_gpu, "TILE", small),
        ],
        [
            mock.patch.multiple(grouped_gpu, **many),
            mock.patch.object(grouped_many_gpu, "fits", return_value=False),
        ],
    ]


@examples
@given(data=st.data())
def test_grouped_products(device, data):
    from stepmoe.kernels import grouped_gpu

    ids, first, num_local = routed(data, device, max_tokens=60)
    order = permute.sort_by_expert(ids, first, num_local)
    size, inner, limit = data.draw(SIZES), data.draw(SIZES), data.draw(st.sampled_from([None, 0.4]))
    half = {"dtype": torch.float16, "device": device}
    x = drawn(data, len(ids), size, **half)
    up = drawn(data, num_local, 2 * inner, size, scale=size**-0.5, **half)
    down = drawn(data, num_local, size, inner, scale=inner**-0.5, **half)
    start, count = data.draw(st.integers(0, ids.numel())), data.draw(st.integers(1, ids.numel()))
    filled = max(0, min(count, int(order.ends[-1]) - start))
    way = data.draw(st.integers(0, 3))

    expected = grouped.gate_up_swiglu(x.double(), up.double(), order, start, count, limit)
    with contextlib.ExitStack() as patched:
        for patch in ways_of_grouped_products()[way]:
            patched.enter_context(patch)
        found = grouped_gpu.gate_up_swiglu(x, up, order, start, count, limit)
        close(found[:filled], expected[:filled], torch.float16)
        expected = grouped.grouped_linear(found.double(), down.double(), order, start)
        found[filled:] = torch.nan  # what nobody computed must not reach a row that counts
        found = grouped_gpu.grouped_linear(found, down, order, start)
    close(found[:filled], expected[:filled], torch.float16)


def test_dispatch_keeps_the_cpu_and_float64_on_the_reference():
    from stepmoe.kernels.dispatch import takes_kernel

    assert not takes_kernel(torch.ones(2), 3, None)
    assert not takes_kernel(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int64))
    assert not takes_kernel(1, 2.0)


@pytest.mark.cuda
def test_dispatch_on_a_gpu():
    from stepmoe.kernels.dispatch import takes_kernel

    x = torch.ones(2, device="cuda")
    assert takes_kernel(x, 3, None)
    assert not takes_kernel(x, torch.ones(2)), "one tensor elsewhere"
    assert not takes_kernel(x.double())
    watched = x.clone().requires_grad_()
    assert not takes_kernel(watched), "the kernels have no backward"
    with torch.no_grad():
        assert takes_kernel(watched)


@examples
@given(data=st.data())
def test_products_of_few_tokens(device, data):
    from stepmoe.kernels import linear_gpu, routing_gpu

    dtype, limit = data.draw(DTYPES), data.draw(st.sampled_from([None, 0.4]))
    tokens = data.draw(st.sampled_from([1, 2, linear_gpu.FEW_TOKENS, 5, 13, 16, 17]))  # all ways
    size, columns = data.draw(SIZES), data.draw(st.integers(1, 300))
    weight = drawn(data, 2 * columns, size, dtype=dtype, device=device, scale=size**-0.5)
    x = drawn(data, tokens, size, dtype=dtype, device=device)
    exact = x.double(), weight.double()
    close(linear_gpu.linear(x, weight), linear.linear(*exact), dtype)
    found = linear_gpu.linear_swiglu(x, weight, limit)
    close(found, linear.linear_swiglu(*exact, limit), dtype)
    if dtype is torch.float32 or linear_gpu.is_few(x, weight):  # torch's product needs a GPU
        logits = routing_gpu.compute_logits(x, weight)
        assert logits.dtype is torch.float32
        close(logits, linear.linear(*exact), torch.float32)
    if linear_gpu.is_few(x, weight):
        fewest = 5 if tokens > linear_gpu.FEW_TOKENS else 1  # up to 4, another kernel
        others = drawn(data, fewest, size, dtype=dtype, device=device)
        for token in range(tokens):
            others[-1] = x[token]
            found = linear_gpu.linear(others, weight)[-1]
            assert torch.equal(linear_gpu.linear(x, weight)[token], found), "it knows no others"


@examples
@given(data=st.data())
def test_experts_of_few_tokens(device, data):
    from stepmoe.kernels import few_experts_gpu

    ids, first, num_local = routed(data, device, max_tokens=4)
    size, inner, limit = data.draw(SIZES), data.draw(SIZES), data.draw(st.sampled_from([None, 0.4]))
    dtype = torch.float16  # RoutedExperts takes these kernels in 16 bits only
    up, down = (
        drawn(data, num_local, *shape, scale=shape[1] ** -0.5, dtype=dtype, device=device)
        for shape in ((2 * inner, size), (size, inner))
    )
    weights = drawn(data, *ids.shape, dtype=torch.float32, device=device)
    x = drawn(data, len(ids), size, dtype=dtype, device=device)
    expected = few_experts.few_gate_up(x.double(), up.double(), ids, first, limit)
    rows = few_experts_gpu.few_gate_up(x, up, ids, first, limit)
    is_here = (ids >= first) & (ids < first + num_local)
    close(rows[is_here], expected[is_here], dtype)

    rows[~is_here] = torch.nan  # what nobody computed must not be read
    exact = few_experts.few_down(rows.double(), down.double(), ids, weights.double(), first, None)
    found = few_experts_gpu.few_down(rows, down, ids, weights, first, None)
    close(found, exact, dtype)
    onto = x.clone()
    together = few_experts_gpu.few_down(rows, down, ids, weights, first, onto)
    assert together is onto
    assert torch.equal(together, x + found)


@examples
@given(data=st.data())
def test_products_on_tensor_cores(device, data):
    from stepmoe.kernels import dots_gpu

    limit, size = data.draw(st.sampled_from([None, 0.4])), data.draw(st.integers(1, 300))
    tokens = data.draw(st.integers(1, dots_gpu.MOST_TOKENS))
    columns = data.draw(st.integers(1, 60))
    rows, warps = data.draw(st.sampled_from([8, 16, 32])), data.draw(st.sampled_from([1, 2, 4]))
    cut = dots_gpu.Dots(rows, warps)
    x = drawn(data, tokens, size, dtype=torch.float16, device=device)
    weight = drawn(data, 2 * columns, size, dtype=torch.float16, device=device, scale=size**-0.5)
    output = torch.empty(tokens, 2 * columns, dtype=torch.float32, device=device)
    dots_gpu.launch(x, weight, output, cut)
    close(output, linear.linear(x.double(), weight.double()), torch.float32)
    output = torch.empty(tokens, columns, dtype=torch.float16, device=device)
    dots_gpu.launch(x, weight, output, cut, limit)
    close(output, linear.linear_swiglu(x.double(), weight.double(), limit), torch.float16)


@pytest.mark.parametrize(
    ("rows", "size", "cut"),
    [
        (1288, 4096, (16, 8)),
        (1808, 4096, (16, 8)),
        (4096, 1024, (16, 4)),
        (4096, 1536, (16, 4)),
        (288, 4096, (8, 8)),
        (320, 4096, (8, 8)),
        (4096, 160, (32, 1)),
        (7, 40, (32, 1)),
        (7, 8192, (8, 8)),
        (7, 8224, None),  # more than registers hold
        (4096, 3000, None),  # more warps than run at once
        (40000, 160, None),
    ],
)
def test_cuts_of_a_weight(device, rows, size, cut):
    from stepmoe.kernels import dots_gpu

    found = dots_gpu.cut_for(torch.empty(rows, size, device="meta"))
    assert found == (cut and dots_gpu.Dots(*cut))


@pytest.mark.parametrize(
    ("rows", "columns", "size", "piece"),
    [
        (1288, 1288, 4096, (4, 8)),
        (1808, 1808, 4096, (4, 8)),
        (4096, 4096, 1024, (4, 2)),
        (4096, 4096, 1536, (4, 2)),
        (288, 288, 4096, (1, 4)),
        (320, 160, 4096, (1, 4)),
        (4096, 4096, 160, (8, 1)),
        (7, 7, 8192, (1, 8)),
        (7, 7, 40, (1, 1)),
        (20000, 10000, 8192, (1, 8)),
    ],
)
def test_pieces_of_a_weight(device, rows, columns, size, piece):
    from stepmoe.kernels import linear_gpu

    found = linear_gpu.piece_for(torch.empty(rows, size, device="meta"), columns)
    assert found == linear_gpu.Piece(*piece)
