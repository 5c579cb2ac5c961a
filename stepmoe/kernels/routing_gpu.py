"""routing.py on the GPU: one matrix product on tensor cores, and one Triton kernel for the rest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.linear_gpu import few_tokens, is_few
from stepmoe.kernels.overlap_gpu import let_next_start, overlap, wait

LOWEST = tl.constexpr(-0x80000000)  # below the key of every score


def compute_logits(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """See routing.compute_logits.

    The product of two bfloat16 (or float16) numbers is exact in float32, and the tensor cores add
    in float32: casting the inputs to float32 first would change only the order of the sum.
    """
    if is_few(hidden_states, weight):
        shape = len(hidden_states), len(weight)
        output = torch.empty(shape, dtype=torch.float32, device=weight.device)
        return few_tokens(hidden_states, weight, output)
    if hidden_states.dtype is torch.float32 or hidden_states.dtype is not weight.dtype:
        return hidden_states.float() @ weight.float().T
    return torch.mm(hidden_states, weight.T, out_dtype=torch.float32)


def choose_experts(
    logits: Tensor, bias: Tensor, top_k: int, normalises: bool, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """See routing.choose_experts. Among equal scores the lower expert comes first."""
    num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    if num_tokens:
        block_k = max(2, triton.next_power_of_2(top_k))
        block, rest = _two_blocks(num_experts)
        _choose[(num_tokens,)](
            logits.contiguous(),
            bias.float(),
            ids,
            weights,
            scaling_factor,
            EXPERTS=num_experts,
            TOP_K=top_k,
            NORMALISES=normalises,
            BLOCK=block,
            REST=rest,
            BLOCK_K=block_k,
            num_warps=1,
            **overlap(logits),
        )
    return ids, weights


def _two_blocks(num_experts: int) -> tuple[int, int]:
    """Two powers of two that hold them, for less padding than one: 288 are 256 and 32, not 512."""
    half = max(1, triton.next_power_of_2(num_experts) // 2)
    return half, triton.next_power_of_2(max(1, num_experts - half))


@triton.jit
def _choose(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    scaling_factor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISES: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: one token, the best of BLOCK experts and of the REST behind them."""
    let_next_start(OVERLAPS)
    wait(OVERLAPS)
    logits_ptr += tl.program_id(0).to(tl.int64) * EXPERTS
    place = tl.arange(0, BLOCK_K)
    expert = tl.arange(0, BLOCK)
    other_expert = BLOCK + tl.arange(0, REST)
    key = _ordered(logits_ptr, bias_ptr, expert, EXPERTS)
    other_key = _ordered(logits_ptr, bias_ptr, other_expert, EXPERTS)
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    for k in tl.static_range(TOP_K):
        highest = tl.maximum(tl.max(key, 0), tl.max(other_key, 0))
        first = tl.min(tl.where(key == highest, expert, EXPERTS), 0)
        other_first = tl.min(tl.where(other_key == highest, other_expert, EXPERTS), 0)
        best = tl.minimum(first, other_first)
        chosen = tl.where(place == k, best, chosen)
        key = tl.where(expert == best, LOWEST, key)
        other_key = tl.where(other_expert == best, LOWEST, other_key)

    kept = place < TOP_K
    logit = tl.load(logits_ptr + chosen, mask=kept, other=-float("inf"))
    weights = _sigmoid(logit.to(tl.float32))
    if NORMALISES:
        weights /= tl.sum(weights, axis=0)
    start = tl.program_id(0).to(tl.int64) * TOP_K
    tl.store(ids_ptr + start + place, chosen.to(tl.int64), mask=kept)
    tl.store(weights_ptr + start + place, weights * scaling_factor, mask=kept)


@triton.jit
def _ordered(logits_ptr, bias_ptr, expert, EXPERTS: tl.constexpr):
    """The biased scores of these experts as integers of the same order, also where one is NaN.

    The bits of a float order like an integer once those of a negative one are flipped.
    """
    inside = expert < EXPERTS
    logits = tl.load(logits_ptr + expert, mask=inside, other=0.0).to(tl.float32)
    biased = _sigmoid(logits) + tl.load(bias_ptr + expert, mask=inside, other=0.0)
    bits = biased.to(tl.int32, bitcast=True)
    return tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
