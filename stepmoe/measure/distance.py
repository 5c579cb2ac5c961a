"""How far one model's logits are from another's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """How far logits are from others.

    Attributes:
        logits: relative error, in the 2-norm.
        largest: of all entries, the largest absolute difference.
        kl: Kullback-Leibler divergence of the predicted distributions from the reference's, in
            nats, the mean over positions.
        flips: positions at which another token comes first.
        positions: batch x length.
    """

    logits: float
    largest: float
    kl: float
    flips: int
    positions: int


def relative_error(value: Tensor, exact: Tensor) -> float:
    """2-norm of value - exact over that of exact, in float64; tensors of equal shape."""
    difference = value.double() - exact.double()
    return float(difference.norm() / exact.double().norm())


def distance(logits: Tensor, exact: Tensor) -> Distance:
    """Compare logits (B, L, V) with the reference's, in float64."""
    ours, theirs = logits.double(), exact.double()
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    first = ours.argmax(-1) != theirs.argmax(-1)
    return Distance(
        relative_error(ours, theirs),
        float((ours - theirs).abs().max()),
        float(kl.mean()),
        int(first.sum()),
        first.numel(),
    )


def fingerprint(tensor: Tensor) -> str:
    """Equal for tensors that are equal bit for bit, of equal shape and dtype."""
    values = tensor.detach().cpu().contiguous()
    content = values.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{values.dtype} {values.shape}".encode() + content).hexdigest()[:16]
