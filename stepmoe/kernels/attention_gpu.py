"""prefill_attention as a Triton kernel: online softmax, the query heads of a group in one tile.

All query heads that share a key-value head see the same keys. So a tile's rows are (token, head of
the group) pairs, token after token: with 12 heads a group, 128 rows are 11 tokens. That reads each
key once for all heads, and under a window of 512 a tile touches 523 keys instead of 640.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.softmax_gpu import HIDDEN, Tile, absorb, block_d

_LONG = 2048  # tokens of a prompt from which torch's own kernel runs under a full layer
_GATED = 16  # heads of one program that applies the gate alone


def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, gate: Tensor, window: int | None
) -> Tensor:
    """See attention.prefill_attention.

    A long prompt under a full layer goes to torch's attention (cuDNN's on an H100: 0.483 ms where
    the kernel below takes 0.575, at 2 x 8192 tokens and 8 heads); windows, pasts, short prompts and
    float32 come here.
    """
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads, seen = keys.shape[1:3]
    group = num_heads // num_kv_heads
    out = query.new_empty(batch * length, num_heads * head_dim)
    if window is None and seen == length >= _LONG and query.dtype is not torch.float32:
        attended = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True
        )
        _gate(attended, gate, out)
        return out
    exact = query.dtype is torch.float32  # its tiles are twice as large, and its products exact
    tile = Tile(32, 32, 4, 2) if exact else Tile(128, 64, 8, 3)
    grid = (triton.cdiv(length * group, tile.rows), batch * num_kv_heads)
    _attend[grid](
        query,
        *query.stride()[:3],
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        gate,
        gate.stride(0),
        out,
        length,
        seen - length,
        math.log2(math.e) / math.sqrt(head_dim),
        GROUP=group,
        KV_HEADS=num_kv_heads,
        WINDOW=window or 0,
        SIZE=head_dim,
        BLOCK_D=block_d(head_dim),
        ROWS=tile.rows,
        KEYS=tile.keys,
        PRECISION="ieee" if exact else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


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
    query_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_l,
    keys_ptr,
    keys_stride_b,
    keys_stride_g,
    keys_stride_s,
    values_ptr,
    values_stride_b,
    values_stride_g,
    values_stride_s,
    gate_ptr,
    gate_stride,
    out_ptr,
    length,
    past,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS (token, head) pairs of one key-value head of one sequence."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: they see most keys
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    g = tl.program_id(1) % KV_HEADS
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, g * GROUP + row % GROUP
    entry = tl.arange(0, BLOCK_D)
    inside = (token < length)[:, None] & (entry < SIZE)[None, :]
    query_ptr += b * query_stride_b + head * query_stride_h + token * query_stride_l
    query = tl.load(query_ptr[:, None] + entry[None, :], mask=inside, other=0.0)
    keys_ptr += b * keys_stride_b + g * keys_stride_g
    values_ptr += b * values_stride_b + g * values_stride_g

    # Keys first:end are seen by some row of the tile, keys all_from:all_to by every row. Softmax
    # asks for no order: first come the tiles of keys that need no mask, then those at both edges.
    newest = past + tl.minimum((tile * ROWS + ROWS - 1) // GROUP, length - 1)
    oldest = past + tile * ROWS // GROUP
    end, all_to = newest + 1, oldest + 1
    first, all_from = 0, 0
    if WINDOW:
        first = tl.maximum(0, oldest - WINDOW + 1)
        all_from = tl.maximum(0, newest - WINDOW + 1)
    inner = first + tl.cdiv(all_from - first, KEYS) * KEYS
    outer = tl.maximum(inner, first + (all_to - first) // KEYS * KEYS)

    top = tl.full((ROWS,), HIDDEN, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for begin in range(inner, outer, KEYS):
        top, total, sums = absorb(
            top, total, sums, query, past + token, begin, end, scale,
            keys_ptr, keys_stride_s, values_ptr, values_stride_s,
            WINDOW, False, SIZE, BLOCK_D, KEYS, PRECISION,
        )  # fmt: skip
    for edge in range(first, end - (outer - inner), KEYS):
        begin = edge if edge < inner else edge + (outer - inner)
        top, total, sums = absorb(
            top, total, sums, query, past + token, begin, end, scale,
            keys_ptr, keys_stride_s, values_ptr, values_stride_s,
            WINDOW, True, SIZE, BLOCK_D, KEYS, PRECISION,
        )  # fmt: skip

    out_row = (b * length + token) * (GROUP * KV_HEADS) + head
    gate_ptr += (b * length + token) * gate_stride + head
    gate = tl.load(gate_ptr, mask=token < length, other=0.0).to(tl.float32)
    result = sums * (tl.sigmoid(gate) / total)[:, None]
    out = out_ptr + out_row[:, None] * SIZE + entry[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)
