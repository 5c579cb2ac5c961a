"""The attention kernels against their references in float64: uneven sizes, groups, windows, pasts.

float16 and float32 here: the interpreter has no matrix product of bfloat16. tests/cuda runs that.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepmoe.kernels import attention, qk_norm_rotary

examples = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = st.sampled_from([torch.float32, torch.float16])
SIZES = st.sampled_from([4, 12, 16, 24, 32])
# Outputs are averages of values of size 1: some roundings of 2^-24 or 2^-11.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}


class Drawn:
    """Random tensors of one attention layer; what they have in common."""

    def __init__(self, data, device):
        self.data, self.device = data, device
        self.dtype, self.head_dim = data.draw(DTYPES), data.draw(SIZES)
        self.batch, self.kv_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        self.heads = self.kv_heads * data.draw(st.integers(1, 6))
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))

    def tensor(self, *shape, dtype=None):
        drawn = torch.randn(*shape, generator=self.generator)
        return drawn.to(self.device, dtype or self.dtype)

    def close(self, found, expected):
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("many_programs", [1, 256])  # 1: often a program does every head
@examples
@given(data=st.data())
def test_q_and_k_are_normalised_and_rotated_and_keys_and_values_kept(
    device, monkeypatch, many_programs, data
):
    from stepmoe.kernels import qk_norm_rotary_gpu

    monkeypatch.setattr(qk_norm_rotary_gpu, "_MANY", qk_norm_rotary_gpu.Cut(64, 2, 4))
    monkeypatch.setattr(qk_norm_rotary_gpu, "_MANY_PROGRAMS", many_programs)
    draw = Drawn(data, device)
    length, past = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 300))
    size = (draw.heads + 2 * draw.kv_heads) * draw.head_dim
    projected = draw.tensor(draw.batch * length, size + draw.heads)
    weights = [draw.tensor(draw.head_dim) for _ in range(2)]
    half = data.draw(st.integers(1, draw.head_dim // 2))  # the rest of a head is not rotated
    frequencies = draw.tensor(half, dtype=torch.float32).abs()
    start = torch.tensor([past], device=device)
    slots = data.draw(st.integers(length, 12))  # fewer than the positions: a ring
    shape = (draw.batch, draw.kv_heads, slots, draw.head_dim)
    kept = draw.tensor(*shape), draw.tensor(*shape)

    def both(into, exact_into):
        exact = qk_norm_rotary.qk_norm_rotary(
            projected.double(), draw.batch, *(weight.double() for weight in weights), 1e-5,
            frequencies.double(), start, draw.heads, draw.kv_heads, exact_into,
        )  # fmt: skip
        found = qk_norm_rotary_gpu.qk_norm_rotary(
            projected, draw.batch, *weights, 1e-5, frequencies, start, draw.heads, draw.kv_heads,
            into,
        )  # fmt: skip
        for one, other in zip(found, exact, strict=True):
            assert one.shape == other.shape
            # Entries reach 10. Angles to 1000 rad are off by 6e-5 in float32, which is the
            # reference's dtype for them as well; float16 rounds the result, by 2^-11.
            tolerance = 1e-3 if draw.dtype is torch.float32 else 4e-3
            torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)
        return found

    both(None, None)
    found = both(kept, tuple(tensor.double() for tensor in kept))
    assert found[1] is kept[0]
    assert found[2] is kept[1]


# What decides which tiles are taken: programs, hardware that copies by descriptor, and memory.
@pytest.mark.parametrize(
    ("few", "copies", "memory"), [(0, True, True), (528, True, True), (0, False, False)]
)
@examples
@given(data=st.data())
def test_prefill_attention(device, monkeypatch, few, copies, memory, data):
    from stepmoe.kernels import attention_gpu

    monkeypatch.setattr(attention_gpu, "_FEW", few)
    monkeypatch.setattr(attention_gpu, "_has_copies", lambda query: copies)
    monkeypatch.setattr(attention_gpu, "_has_memory", lambda query: memory)
    draw = Drawn(data, device)
    length, past = data.draw(st.integers(1, 80)), data.draw(st.sampled_from([0, 0, 1, 33, 70]))
    window = data.draw(st.sampled_from([None, 1, 9, 40, 100]))
    query = draw.tensor(draw.batch, length, draw.heads, draw.head_dim).transpose(1, 2)
    keys = draw.tensor(draw.batch, draw.kv_heads, past + length, draw.head_dim)
    values = draw.tensor(draw.batch, past + length, draw.kv_heads, draw.head_dim).transpose(1, 2)
    gate = draw.tensor(draw.batch * length, draw.heads + 3)[:, 3:]
    wide = (tensor.double() for tensor in (query, keys, values, gate))
    expected = attention.prefill_attention(*wide, window)
    # A short prompt as a long one, or not: as torch's kernel and the gate's, or as the one kernel.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_gpu, "_LONG", data.draw(st.sampled_from([1, 2048])))
        draw.close(attention_gpu.prefill_attention(query, keys, values, gate, window), expected)


@examples
@given(data=st.data())
def test_decode_attention(device, data):
    from stepmoe.kernels import decode_gpu

    draw = Drawn(data, device)
    # Up to 10 programs share a sequence's slots; some get none while the cache is young.
    slots = data.draw(st.sampled_from([1, 7, 64, 250, 600]))
    position = torch.tensor([data.draw(st.integers(0, 2 * slots))], device=device)
    query = draw.tensor(draw.batch, draw.heads, 1, draw.head_dim)
    shape = (draw.batch, draw.kv_heads, slots, draw.head_dim)
    keys, values, gate = (
        draw.tensor(*shape),
        draw.tensor(*shape),
        draw.tensor(draw.batch, draw.heads),
    )
    wide = (tensor.double() for tensor in (query, keys, values, gate))
    expected = attention.decode_attention(*wide, position)
    for cache in (keys, values):
        cache[:, :, int(position) + 1 :] = float("nan")  # slots not taken must not be read
    draw.close(decode_gpu.decode_attention(query, keys, values, gate, position), expected)
