"""routing.py on the GPU: one matrix product on tensor cores, and one Triton kernel for the rest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def compute_logits(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """See routing.compute_logits.

    The product of two bfloat16 (or float16) numbers is exact in float32, and the tensor cores add
    in float32: casting the inputs to float32 first would change only the order of the sum.
    """
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
        block, rest = _two_blocks(num_experts, block_k)
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
        )
    return ids, weights


def _two_blocks(num_experts: int, block_k: int) -> tuple[int, int]:
    """How many experts to look at at once, in powers of two: 288 as 256 and 32, not as 512."""
    whole = max(block_k, triton.next_power_of_2(num_experts))
    half = whole // 2
    rest = max(block_k, triton.next_power_of_2(max(1, num_experts - half)))
    return (half, rest) if block_k <= half and rest < half else (whole, 0)


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
):
    """One program: one token, the best of BLOCK experts and of the REST behind them."""
    logits_ptr += tl.program_id(0).to(tl.int64) * EXPERTS
    best = tl.topk(_keys(logits_ptr, bias_ptr, 0, EXPERTS, BLOCK), BLOCK_K)
    if REST:
        others = tl.topk(_keys(logits_ptr, bias_ptr, BLOCK, EXPERTS, REST), BLOCK_K)
        best = tl.topk(tl.reshape(tl.join(best, others), (2 * BLOCK_K,)), BLOCK_K)
    chosen = 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32)

    place = tl.arange(0, BLOCK_K)
    kept = place < TOP_K
    logit = tl.load(logits_ptr + chosen, mask=kept, other=-float("inf"))
    weights = _sigmoid(logit.to(tl.float32))
    if NORMALISES:
        weights /= tl.sum(weights, axis=0)
    start = tl.program_id(0).to(tl.int64) * TOP_K
    tl.store(ids_ptr + start + place, chosen.to(tl.int64), mask=kept)
    tl.store(weights_ptr + start + place, weights * scaling_factor, mask=kept)


@triton.jit
def _keys(logits_ptr, bias_ptr, first, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Score and expert in one integer, so that one top-k finds both: of BLOCK experts from `first`.

    The bits of a float order like an integer once those of a negative one are flipped; below them,
    the lower expert is greater.
    """
    expert = first + tl.arange(0, BLOCK)
    inside = expert < EXPERTS
    logits = tl.load(logits_ptr + expert, mask=inside, other=0.0).to(tl.float32)
    biased = _sigmoid(logits) + tl.load(bias_ptr + expert, mask=inside, other=0.0)
    bits = biased.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - expert).to(tl.int64)
    return tl.where(inside, key, -0x8000000000000000)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
