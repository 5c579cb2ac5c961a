"""Random weights: of the right scale, never zero, and the same model however it is cut."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from stepmoe.parallel import TensorLayout


def random_tensor(name: str, layout: TensorLayout, seed: int) -> Tensor:
    """This rank's slice of a random float32 tensor that every rank draws alike, on the CPU.

    Matrices have entries of standard deviation 1 / sqrt(fan-in), so that activations keep their
    scale; norms and router biases are small and never zero.
    """
    full = torch.randn(layout.shape, generator=_generator(f"{seed}:{name}", torch.device("cpu")))
    return full[layout.slices].mul_(_scale(name, layout))


def draw_into(target: Tensor, name: str, layout: TensorLayout, seed: int) -> None:
    """Fill `target` with this rank's slice of a random tensor drawn on its device.

    For large shapes: memory holds one matrix in float32 beside the target, for stacked experts one
    expert's. One seed gives the same model however it is cut, on one kind of device: another kind,
    and `random_tensor`, draw other values of the same distribution.
    """
    scale = _scale(name, layout)
    if len(layout.shape) < 3:
        full = torch.randn(
            layout.shape,
            generator=_generator(f"{seed}:{name}", target.device),
            device=target.device,
        )
        target.copy_(full[layout.slices].mul_(scale))
        return
    experts, *within = layout.slices
    for expert in range(experts.start, experts.stop):
        full = torch.randn(
            layout.shape[1:],
            generator=_generator(f"{seed}:{name}:{expert}", target.device),
            device=target.device,
        )
        target[expert - experts.start].copy_(full[tuple(within)].mul_(scale))


def _generator(text: str, device: torch.device) -> torch.Generator:
    """Seeded by a text, the same in every process (Python's own hash is not)."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def _scale(name: str, layout: TensorLayout) -> float:
    if len(layout.shape) == 1:
        return 0.1
    return 1.0 if "embed_tokens" in name else layout.shape[-1] ** -0.5
