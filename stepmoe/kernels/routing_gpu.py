"""routing.py on the GPU: one matrix product on tensor cores, and one Triton kernel for the rest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 4  # of one program


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
        _choose[(triton.cdiv(num_tokens, _TOKENS),)](
            logits.contiguous(),
            bias.float(),
            ids,
            weights,
            num_tokens,
            scaling_factor,
            EXPERTS=num_experts,
            TOP_K=top_k,
            NORMALISES=normalises,
            TOKENS=_TOKENS,
            BLOCK=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(top_k),
        )
    return ids, weights


@triton.jit
def _choose(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    scaling_factor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: TOKENS tokens. K times, take the best expert and strike it off."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    expert = tl.arange(0, BLOCK)[None, :]
    inside = (token < num_tokens) & (expert < EXPERTS)
    logits = tl.load(logits_ptr + token * EXPERTS + expert, mask=inside, other=0.0)
    scores = 1.0 / (1.0 + tl.exp(-logits.to(tl.float32)))
    bias = tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0)
    biased = tl.where(expert < EXPERTS, scores + bias, -float("inf"))

    place = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((TOKENS, BLOCK_K), tl.int32)
    weights = tl.zeros((TOKENS, BLOCK_K), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(biased, axis=1)[:, None]
        score = tl.sum(tl.where(expert == best, scores, 0.0), axis=1)[:, None]
        chosen = tl.where(place == k, best, chosen)
        weights = tl.where(place == k, score, weights)
        biased = tl.where(expert == best, -float("inf"), biased)
    if NORMALISES:
        weights /= tl.sum(weights, axis=1)[:, None]

    kept = (token < num_tokens) & (place < TOP_K)
    tl.store(ids_ptr + token * TOP_K + place, chosen.to(tl.int64), mask=kept)
    tl.store(weights_ptr + token * TOP_K + place, weights * scaling_factor, mask=kept)
