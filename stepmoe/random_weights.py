"""Random weights: of the right scale, never zero, and the same model however it is cut."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from stepmoe import fp8
from stepmoe.kernels.block_scale import BlockScaled
from stepmoe.parallel import TensorLayout


def random_tensor(name: str, layout: TensorLayout, seed: int) -> Tensor:
    """This rank's slice of a random float32 tensor that every rank draws alike, on the CPU.

    Matrices have entries of standard deviation 1 / sqrt(fan-in), so that activations keep their
    scale; norms and router biases are small and never zero.
    """
    return _on_cpu(name, layout, seed)[layout.slices]


def copy_into(target: Tensor | BlockScaled, name: str, layout: TensorLayout, seed: int) -> None:
    """Fill `target` with `random_tensor`."""
    _keep(target, 0, _on_cpu(name, layout, seed), layout.slices)


def draw_into(target: Tensor | BlockScaled, name: str, layout: TensorLayout, seed: int) -> None:
    """Fill `target` with this rank's slice of a random tensor drawn on its device.

    For large shapes: memory holds one matrix in float32 beside the target, for stacked experts one
    expert's. One seed gives the same model however it is cut, on one kind of device: another kind,
    and `random_tensor`, draw other values of the same distribution.
    """
    device = target.weight.device if isinstance(target, BlockScaled) else target.device
    scale = _scale(name, layout)
    if len(layout.shape) < 3:
        whole = _drawn(f"{seed}:{name}", layout.shape, scale, device)
        _keep(target, 0, whole, layout.slices)
        return
    experts, *within = layout.slices
    for number, expert in enumerate(range(experts.start, experts.stop)):
        one = _drawn(f"{seed}:{name}:{expert}", (1, *layout.shape[1:]), scale, device)
        _keep(target, number, one, (slice(0, 1), *within))


def _keep(
    target: Tensor | BlockScaled, begin: int, whole: Tensor, slices: tuple[slice, ...]
) -> None:
    """Copy a slice of a whole tensor to where it begins in the target; to FP8 block by block."""
    if isinstance(target, BlockScaled):
        fp8.quantise_into(target, begin, whole[fp8.hull(slices, tuple(whole.shape))], slices)
    else:
        part = whole[slices]
        target[begin : begin + len(part)] = part


def _on_cpu(name: str, layout: TensorLayout, seed: int) -> Tensor:
    cpu = torch.device("cpu")
    return _drawn(f"{seed}:{name}", layout.shape, _scale(name, layout), cpu)


def _drawn(text: str, shape: tuple[int, ...], scale: float, device: torch.device) -> Tensor:
    """Normal with deviation `scale`, in float32: another dtype draws other numbers, and torch's
    default may have been changed."""
    generator = _generator(text, device)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale)


def _generator(text: str, device: torch.device) -> torch.Generator:
    """Seeded by a text, the same in every process (Python's own hash is not)."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def _scale(name: str, layout: TensorLayout) -> float:
    if len(layout.shape) == 1:
        return 0.1
    return 1.0 if "embed_tokens" in name else layout.shape[-1] ** -0.5
