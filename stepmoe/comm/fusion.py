"""Which code carries out all-reduce + residual add + RMSNorm, and why.

The gate is data: print GATES in a notebook. Every choice is written to the ledger with its reason,
so that a fused path that is silently off cannot pass for one that is on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gate:
    """A published limit on the fused kernel.

    Attributes:
        max_tokens: most tokens that one fused call takes; None if the limit is in bytes.
        max_bytes: largest tensor that one fused call takes; None if the limit is in tokens.
        source: who set it.
    """

    name: str
    max_tokens: int | None
    max_bytes: int | None
    source: str

    def allows(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> bool:
        """Whether a (num_tokens, hidden_size) tensor of `dtype` may take the fused path."""
        size = num_tokens * hidden_size * dtype.itemsize
        return (self.max_tokens is None or num_tokens <= self.max_tokens) and (
            self.max_bytes is None or size <= self.max_bytes
        )


# The two caps disagree: 0.5 MB is 64 tokens at hidden 4096 in bf16.
GATES = {
    "sglang": Gate("sglang", 2048, None, "sglang FUSE_ALLREDUCE_MAX_BATCH_SIZE"),
    "vllm": Gate("vllm", None, 512 * 1024, "vLLM #44079, SM90 at TP8"),
}


@dataclass(frozen=True)
class Choice:
    """The implementation that will run, and why."""

    implementation: str
    reason: str


def choose(num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Pick the implementation of all_reduce_add_rms_norm for one (num_tokens, hidden_size) tensor.

    Every rank must come to the same answer: it depends only on what all of them share.
    """
    gate = GATES["sglang"]
    if not gate.allows(num_tokens, hidden_size, dtype):
        return Choice("unfused", f"{num_tokens} tokens are more than the gate's {gate.max_tokens}")
    if device.type == "cpu":
        return Choice("unfused", "CPU tensors: a fused kernel needs an NVIDIA GPU")
    return Choice("unfused", "this version of stepmoe has no fused kernel yet")
