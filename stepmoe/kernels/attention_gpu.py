"""prefill_attention as a Triton kernel: online softmax, the query heads of a group in one tile.

All query heads that share a key-value head see the same keys. So a tile's rows are (token, head of
the group) pairs, token after token: with 12 heads a group, 64 rows are of 6 or 7 tokens. That reads
each key once for all heads, and under a window of 512 a tile touches 518 keys instead of 575.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stepmoe.kernels.overlap_gpu import is_hopper_or_newer
from stepmoe.kernels.softmax_gpu import HIDDEN, Tile, absorb, block_d

_LONG = 2048  # tokens of a prompt from which torch's own kernel runs under a full layer
_GATED = 16  # heads of one program that applies the gate alone

# Two or four programs share a multiprocessor, 64 K registers and 227 KB: while one waits for its
# softmax, others multiply. They are small enough only if no thread computes addresses.
_DESCRIBED = Tile(64, 32, 4, 2, registers=128)
_DESCRIBED_FULL = Tile(128, 64, 8, 2, registers=128)  # without a window: more keys a row
# Too few programs for that: more keys a step, more steps ahead, no limit of registers. An H200 took
# 25.7 us for 2 x 600 tokens in the tiles above, 14.9 in this one, 19.1 in one of 128 rows. Two
# share a multiprocessor. Up to 500 programs were timed; it was the fastest for these as well.
_DESCRIBED_FEW = Tile(64, 64, 4, 3)
_FEW = 4 * 132  # programs of these, by which an H200's multiprocessors have had two each, twice
_POINTED = Tile(128, 64, 8, 3)
_POINTED_MEMORY = 132 * 1024  # what that takes, compiled for an H100 or B200; elsewhere less
# Of heads of more than 128 entries, which fill registers and memory; and of GPUs with less memory.
_WIDE = Tile(64, 32, 4, 2)
_EXACT = Tile(32, 32, 4, 2)  # of float32, which is twice as large


def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, gate: Tensor, window: int | None
) -> Tensor:
    """See attention.prefill_attention.

    A long prompt under a full layer goes to torch's attention (cuDNN's on an H200: 0.509 ms where
    the kernel below takes 0.529, at 2 x 8192 tokens and 8 heads); windows, pasts, short prompts and
    float32 come here.
    """
    batch, num_heads, length, head_dim = query.shape
    seen = keys.shape[2]
    out = query.new_empty(batch * length, num_heads * head_dim)
    is_exact = query.dtype is torch.float32
    if window is None and seen == length >= _LONG and not is_exact:
        attended = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True
        )
        _gate(attended, gate, out)
    elif not is_exact and head_dim <= 128 and _can_describe(query, keys, values):
        tile = _DESCRIBED_FULL if window is None else _DESCRIBED
        if batch * triton.cdiv(length * num_heads, _DESCRIBED_FEW.rows) < _FEW:
            tile = _DESCRIBED_FEW
        _launch(query, keys, values, gate, out, window, tile, is_described=True)
    else:
        tile = _EXACT if is_exact else _WIDE
        if not is_exact and head_dim <= 128 and _has_memory(query):
            tile = _POINTED
        _launch(query, keys, values, gate, out, window, tile, is_described=False)
    return out


def _can_describe(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the rows of a tile follow one another in memory, and the hardware can copy tiles of
    all three: from places and with strides of whole 16 bytes."""
    _, num_heads, _, head_dim = query.shape
    return (
        _has_copies(query)
        and keys.shape[1] == 1
        and query.stride()[1:] == (head_dim, num_heads * head_dim, 1)
        and all(
            x.stride(3) == 1
            and x.data_ptr() % 16 == 0
            and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
            for x in (query, keys, values)
        )
    )


def _has_copies(query: Tensor) -> bool:
    """Whether there is such hardware. Before Hopper there is none, and with the addresses that
    Triton then computes for a descriptor, registers do not suffice."""
    return not query.is_cuda or is_hopper_or_newer(query)  # not on a GPU: the interpreter


def _has_memory(query: Tensor) -> bool:
    """Whether a multiprocessor has room for _POINTED: all but GPUs of compute capability 8.6, 8.9
    and 12, which have 100 KiB."""
    if not query.is_cuda:  # the interpreter
        return True
    properties = torch.cuda.get_device_properties(query.device)
    return properties.shared_memory_per_multiprocessor >= _POINTED_MEMORY


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gate: Tensor,
    out: Tensor,
    window: int | None,
    tile: Tile,
    is_described: bool,
) -> None:
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads, seen = keys.shape[1:3]
    group = num_heads // num_kv_heads
    padded = block_d(head_dim)
    sources: list[Tensor | TensorDescriptor] = [query, keys, values, out]
    if is_described:
        by_row = batch, length * group, head_dim
        rows = query.transpose(1, 2).reshape(by_row), out.view(by_row)
        sources = [
            TensorDescriptor.from_tensor(x, [1, size, padded])
            for x, size in (
                (rows[0], tile.rows),
                (keys[:, 0], tile.keys),
                (values[:, 0], tile.keys),
                (rows[1], tile.rows),
            )
        ]
    grid = (triton.cdiv(length * group, tile.rows), batch * num_kv_heads)
    _attend[grid](
        sources[0],
        *query.stride()[:3],
        sources[1],
        *keys.stride()[:3],
        sources[2],
        *values.stride()[:3],
        gate,
        gate.stride(0),
        sources[3],
        length,
        seen - length,
        math.log2(math.e) / math.sqrt(head_dim),
        DESCRIBED=is_described,
        GROUP=group,
        KV_HEADS=num_kv_heads,
        WINDOW=window or 0,
        SIZE=head_dim,
        BLOCK_D=padded,
        ROWS=tile.rows,
        KEYS=tile.keys,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
    )


def _gate(attended: Tensor, gate: Tensor, out: Tensor) -> None:
    """out (B L, H d) = attended (B, H, L, d) times sigmoid(gate (B L, H)), head by head."""
    _, num_heads, length, head_dim = attended.shape
    heads = gate.numel()
    _scale_heads[(triton.cdiv(heads, _GATED),)](
        attended,
        *attended.stride()[:3],
        gate,
        gate.stride(0),
        out,
        heads,
        length,
        HEADS=num_heads,
        SIZE=head_dim,
        BLOCK_D=block_d(head_dim),
        ROWS=_GATED,
    )


@triton.jit
def _scale_heads(
    in_ptr,
    in_stride_b,
    in_stride_h,
    in_stride_l,
    gate_ptr,
    gate_stride,
    out_ptr,
    rows,
    length,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS (token, head) pairs."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    entry = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (entry < SIZE)[None, :]
    in_ptr += (token // length) * in_stride_b + head * in_stride_h + token % length * in_stride_l
    x = tl.load(in_ptr[:, None] + entry[None, :], mask=inside, other=0.0)
    gate = tl.load(gate_ptr + token * gate_stride + head, mask=row < rows, other=0.0)
    result = x.to(tl.float32) * tl.sigmoid(gate.to(tl.float32))[:, None]
    out = out_ptr + row[:, None] * SIZE + entry[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    query,
    query_stride_b,
    query_stride_h,
    query_stride_l,
    keys,
    keys_stride_b,
    keys_stride_g,
    keys_stride_s,
    values,
    values_stride_b,
    values_stride_g,
    values_stride_s,
    gate_ptr,
    gate_stride,
    out,
    length,
    past,
    scale,
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS (token, head) pairs of one key-value head of one sequence.

    DESCRIBED: query, keys, values and out are tensor descriptors, else pointers.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: they see most keys
    b, g = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    wide_b = b.to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, g * GROUP + row % GROUP
    entry = tl.arange(0, BLOCK_D)
    if DESCRIBED:
        queries = tl.reshape(query.load([b, tile * ROWS, 0]), (ROWS, BLOCK_D))
    else:
        inside = (token < length)[:, None] & (entry < SIZE)[None, :]
        place = query + wide_b * query_stride_b + head * query_stride_h
        place += token.to(tl.int64) * query_stride_l
        queries = tl.load(place[:, None] + entry[None, :], mask=inside, other=0.0)
        keys += wide_b * keys_stride_b + g * keys_stride_g
        values += wide_b * values_stride_b + g * values_stride_g

    # Keys first to end - 1 are seen by some row of the tile, keys all_from to all_to - 1 by all.
    newest = past + tl.minimum((tile * ROWS + ROWS - 1) // GROUP, length - 1)
    oldest = past + tile * ROWS // GROUP
    end, all_to = newest + 1, oldest + 1
    first, all_from = 0, 0
    if WINDOW:
        first = tl.maximum(0, oldest - WINDOW + 1)
        all_from = tl.maximum(0, newest - WINDOW + 1)

    top = tl.full((ROWS,), HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for begin in range(first, end, KEYS):
        cut = (begin < all_from) | (begin + KEYS > all_to)
        top, total, sums = absorb(
            top, total, sums, queries, past + token, begin, end, cut, scale,
            keys, keys_stride_s, values, values_stride_s, b,
            WINDOW, DESCRIBED, SIZE, BLOCK_D, KEYS, PRECISION,
        )  # fmt: skip

    gate_ptr += (wide_b * length + token) * gate_stride + head
    gate = tl.load(gate_ptr, mask=token < length, other=0.0).to(tl.float32)
    result = sums * (tl.sigmoid(gate) / total)[:, None]
    if DESCRIBED:
        result = tl.reshape(result.to(out.dtype), (1, ROWS, BLOCK_D))
        out.store([b, tile * ROWS, 0], result)
    else:
        out_row = (wide_b * length + token) * (GROUP * KV_HEADS) + head
        place = out + out_row[:, None] * SIZE + entry[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside)
