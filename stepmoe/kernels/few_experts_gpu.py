"""few_experts.py as two Triton kernels: nothing is sorted, and every choice reads its own weights.

With so few tokens two of them seldom choose the same expert. As in linear_gpu.py a program has a
few whole rows of a weight, and asks for all of them at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait
from stepmoe.kernels.swiglu_gpu import swiglu_entry

# Columns of the output and warps of a program. GATE_UP was the fastest of five on an H200 with one
# token (notebooks/results/h200_tuning.md); beside this DOWN no other was measured.
GATE_UP = (2, 4)
DOWN = (4, 4)


def few_gate_up(
    x: Tensor, weight: Tensor, topk_ids: Tensor, first_expert: int, limit: float | None
) -> Tensor:
    """See few_experts.few_gate_up."""
    num_local, features, size = weight.shape
    rows = x.new_empty(*topk_ids.shape, features // 2)
    columns, warps = GATE_UP
    _gate_up[(triton.cdiv(features // 2, columns), topk_ids.numel())](
        x.contiguous(),
        topk_ids.contiguous(),
        weight,
        rows,
        first_expert,
        limit or 0.0,
        LOCAL=num_local,
        TOP_K=topk_ids.shape[1],
        SIZE=size,
        INNER=features // 2,
        CLAMPS=limit is not None,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(size),
        num_warps=warps,
        **overlap(x),
    )
    return rows


def few_down(
    rows: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    first_expert: int,
    onto: Tensor | None,
) -> Tensor:
    """See few_experts.few_down."""
    num_local, size, inner = weight.shape
    tokens, top_k = topk_ids.shape
    output = rows.new_empty(tokens, size) if onto is None else onto.contiguous()
    columns, warps = DOWN
    _down[(triton.cdiv(size, columns), tokens)](
        rows.contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        weight,
        output,
        first_expert,
        LOCAL=num_local,
        TOP_K=top_k,
        SIZE=size,
        INNER=inner,
        ADDS=onto is not None,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(inner),
        num_warps=warps,
        **overlap(rows),
    )
    return output


@triton.jit
def _gate_up(
    x_ptr,
    ids_ptr,
    weight_ptr,
    rows_ptr,
    first_expert,
    limit,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    CLAMPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: COLUMNS of the row of one choice."""
    let_next_start(OVERLAPS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    entry = tl.arange(0, BLOCK)
    choice = tl.program_id(1)
    wait(OVERLAPS)
    expert = tl.load(ids_ptr + choice) - first_expert
    if (expert >= 0) & (expert < LOCAL):
        inside = (column < INNER)[:, None] & (entry < SIZE)[None, :]
        weight_row = (expert * 2 * INNER + column.to(tl.int64))[:, None]
        place = weight_ptr + weight_row * SIZE + entry[None, :]
        gate = tl.load(place, mask=inside, other=0.0)
        up = tl.load(place + INNER * SIZE, mask=inside, other=0.0)
        x = tl.load(x_ptr + choice // TOP_K * SIZE + entry, mask=entry < SIZE, other=0.0)
        x = x.to(tl.float32)[None, :]
        gate = tl.sum(gate.to(tl.float32) * x, axis=1)
        up = tl.sum(up.to(tl.float32) * x, axis=1)
        result = swiglu_entry(gate, up, limit, CLAMPS).to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + choice * INNER + column, result, mask=column < INNER)


@triton.jit
def _down(
    rows_ptr,
    ids_ptr,
    weights_ptr,
    weight_ptr,
    output_ptr,
    first_expert,
    LOCAL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    ADDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: COLUMNS of one token's output, choice after choice; most are of other ranks.

    Roundings are those of grouped_linear, of the weighted sum, and of its addition to the output.
    """
    let_next_start(OVERLAPS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    entry = tl.arange(0, BLOCK)
    inside = (column < SIZE)[:, None] & (entry < INNER)[None, :]
    token = tl.program_id(1)
    wait(OVERLAPS)
    experts, shares = (), ()  # type: tuple[int, ...], tuple[float, ...]
    for k in tl.static_range(TOP_K):  # all at once: the loop below waits for weights
        experts += (tl.load(ids_ptr + token * TOP_K + k) - first_expert,)
        shares += (tl.load(weights_ptr + token * TOP_K + k).to(tl.float32),)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(TOP_K):
        expert = experts[k]
        if (expert >= 0) & (expert < LOCAL):
            weight_row = (expert * SIZE + column)[:, None]
            weight = tl.load(weight_ptr + weight_row * INNER + entry, mask=inside, other=0.0)
            row = rows_ptr + (token * TOP_K + k) * INNER + entry
            row = tl.load(row, mask=entry < INNER, other=0.0).to(tl.float32)
            product = tl.sum(weight.to(tl.float32) * row[None, :], axis=1)
            total += product.to(output_ptr.dtype.element_ty).to(tl.float32) * shares[k]
    place = output_ptr + token * SIZE + column
    if ADDS:
        sums = total.to(output_ptr.dtype.element_ty).to(tl.float32)
        total = tl.load(place, mask=column < SIZE, other=0.0).to(tl.float32) + sums
    tl.store(place, total.to(output_ptr.dtype.element_ty), mask=column < SIZE)
