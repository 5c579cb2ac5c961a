"""Which code carries out all-reduce + residual add + RMSNorm, and why, as data and one function.

Print GATES and REQUIREMENTS in a notebook. Every choice is written to the ledger with its reason,
so that a fused path that is silently off cannot pass for one that is on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Topology = Literal["cpu", "one GPU a rank", "shared GPU", "no peer access", "several hosts"]


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

# Bytes of the whole tensor up to which every rank sums all of it. By latency + bytes / bandwidth: a
# second meeting costs about 3 us, one shot carries (n - 1) (1 - 2 / n) times the tensor more over
# 450 GB/s. With 2 ranks both carry the same.
ONE_SHOT_MAX_BYTES = {2: None, 4: 1024 * 1024, 8: 256 * 1024}

# Bytes from which Triton's kernel is faster than FlashInfer's, by number of ranks: measured on two
# H100s (notebooks/results/h100x2_fusion.json: 44 against 52 us at 1024 tokens, 74 against 99 at
# 2048). Other numbers of ranks were not measured.
TRITON_FASTER_FROM_BYTES = {2: 8 * 1024 * 1024}


@dataclass(frozen=True)
class Place:
    """Where the ranks of a group run. It is the same on every rank.

    Attributes:
        topology: how they reach each other.
        world_size: ranks in the group.
        capability: the lowest compute capability among their GPUs; (0, 0) on CPUs.
    """

    topology: Topology
    world_size: int
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Requirement:
    """What an implementation needs in order to be right.

    Attributes:
        topologies: where the ranks may be.
        majors: major compute capabilities it was built for; None for any.
        dtypes: of the tensors.
        multiple: the hidden size must be a multiple of this.
        source: where the limits come from.
    """

    topologies: tuple[Topology, ...]
    majors: tuple[int, ...] | None
    world_sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    multiple: int
    source: str

    def unmet(self, place: Place, hidden_size: int, dtype: torch.dtype) -> str:
        """The first condition that does not hold, in words; empty if all do."""
        if place.topology not in self.topologies:
            return f"needs {' or '.join(self.topologies)}, here: {place.topology}"
        if place.world_size not in self.world_sizes:
            return f"needs {_one_of(self.world_sizes)} ranks, here: {place.world_size}"
        if self.majors is not None and place.capability[0] not in self.majors:
            have = "{}.{}".format(*place.capability)
            return f"needs compute capability {_one_of(self.majors)}.x, here: {have}"
        if dtype not in self.dtypes:
            return f"has no kernel for {str(dtype).removeprefix('torch.')}"
        if hidden_size % self.multiple:
            return f"needs a hidden size that is a multiple of {self.multiple}, here: {hidden_size}"
        return ""


# In order of preference. "cpu" is Triton's interpreter, which `choose` never picks.
REQUIREMENTS = {
    "flashinfer": Requirement(
        ("one GPU a rank", "shared GPU"), (9, 10), (2, 4, 8), (torch.bfloat16, torch.float16), 64,
        "FlashInfer 0.6.13, trtllm backend",
    ),
    "triton": Requirement(
        ("one GPU a rank", "shared GPU", "cpu"), None, (2, 4, 8),
        (torch.bfloat16, torch.float16, torch.float32), 64,
        "stepmoe.kernels.all_reduce_norm_gpu",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The implementation that will run, and why.

    Attributes:
        implementation: "unfused", "flashinfer", "triton one-shot" or "triton two-shot".
    """

    implementation: str
    reason: str


def choose(
    num_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    place: Place,
    refused: Mapping[str, str] | None = None,
) -> Choice:
    """Pick the implementation of all_reduce_add_rms_norm for one (num_tokens, hidden_size) tensor.

    Every rank must come to the same answer: it depends only on what all of them share.

    Args:
        refused: implementations ("flashinfer", "triton") that the ranks voted out, with the reason.
    """
    gate = GATES["sglang"]
    if not gate.allows(num_tokens, hidden_size, dtype):
        return Choice("unfused", f"{num_tokens} tokens are more than the gate's {gate.max_tokens}")
    if place.topology == "cpu":
        return Choice("unfused", "CPU tensors: a fused kernel needs an NVIDIA GPU")
    size = num_tokens * hidden_size * dtype.itemsize
    problems = {
        name: (refused or {}).get(name) or requirement.unmet(place, hidden_size, dtype)
        for name, requirement in REQUIREMENTS.items()
    }
    if not problems["flashinfer"]:
        problems["flashinfer"] = _why_not_flashinfer(size, place, not problems["triton"])
    for name, problem in problems.items():
        if problem:
            continue
        reason = f"{place.world_size} ranks, {place.topology}, {size // 1024} KiB"
        others = "".join(f"; {other}: {why}" for other, why in problems.items() if why)
        return Choice(with_shots(name, size, place.world_size), reason + others)
    return Choice("unfused", "; ".join(f"{name}: {why}" for name, why in problems.items()))


def _why_not_flashinfer(size: int, place: Place, triton_runs: bool) -> str:
    """Why FlashInfer is passed over where it would run; empty where it is taken."""
    if place.topology == "shared GPU":
        # Its module takes minutes to compile.
        return "ranks take turns on a shared GPU, so its speed gains nothing"
    limit = TRITON_FASTER_FROM_BYTES.get(place.world_size)
    if triton_runs and limit is not None and size >= limit:
        return f"slower than triton from {limit >> 20} MiB on with {place.world_size} ranks"
    return ""


def with_shots(name: str, size: int, world_size: int) -> str:
    """An implementation's full name for a tensor of `size` bytes; FlashInfer decides itself."""
    if name != "triton":
        return name
    limit = ONE_SHOT_MAX_BYTES[world_size]
    return "triton one-shot" if limit is None or size <= limit else "triton two-shot"


def _one_of(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))
