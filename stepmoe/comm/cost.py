"""What a collective costs: steps times latency, plus bytes over bandwidth.

The model is alpha + beta n, a start-up time for each message and a time for each byte, with which
Thakur, Rabenseifner and Gropp compare collectives ("Optimization of Collective Communication
Operations in MPICH", 2005). What it gives is a prediction, and is called that everywhere: it knows
nothing of congestion or of ranks that wait for each other. One form of it, "pipelined", has a
bandwidth that grows with the size, as a library's has that cuts large tensors into more pieces.

Legend: n ranks, S bytes of the whole tensor (as in the ledger: what all_reduce and reduce_scatter
take, what all_gather returns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepmoe.errors import ConfigError

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather")
ALGORITHMS = ("ring", "pipelined", "one_shot", "two_shot")


@dataclass(frozen=True)
class Link:
    """How one rank is connected to its peers.

    Attributes:
        latency: seconds that one step takes before the first byte arrives.
        bandwidth: bytes a second that one rank sends, in one direction.
        source: where the two figures come from.
    """

    name: str
    latency: float
    bandwidth: float
    source: str

    def __post_init__(self) -> None:
        if not self.latency >= 0 or not self.bandwidth > 0:
            raise ConfigError(
                f"link {self.name}: latency={self.latency} s must be at least 0 and "
                f"bandwidth={self.bandwidth} bytes/s above 0"
            )


_NCCL = "NCCL 2.30 src/graph/tuning.cc, hwLatencies"
LINKS = {
    "nvlink4": Link(
        "nvlink4",
        3.4e-6,
        450e9,
        f"H100/H200 SXM datasheet: 450 GB/s a direction; latency: {_NCCL}, ring, Simple protocol",
    ),
    # The same wires under NCCL's protocol for small messages: a flag travels with every 4 bytes.
    "nvlink4_ll": Link(
        "nvlink4_ll",
        0.6e-6,
        141e9,
        f"latency: {_NCCL}, ring, LL protocol; bandwidth: llMaxBws for Hopper, one node, there",
    ),
    "pcie5": Link(
        "pcie5",
        5.7e-6,
        63e9,
        "PCI Express 5.0 x16: 32 GT/s, 16 lanes, 128b/130b coding; "
        f"latency: {_NCCL}, ring, Simple protocol",
    ),
    "nccl_sm90": Link(
        "nccl_sm90",
        0.73e-6,
        559e9,
        "fitted as pipelined to NCCL's all_reduce of 1 and 128 MiB on 8 GPUs, likely SM90 (vLLM "
        "#42324); above the wires' 450 GB/s, so the switch probably takes part in the sum "
        "(inferred)",
    ),
    "infiniband": Link(
        "infiniband",
        14e-6,
        50e9,
        "NDR, one 400 Gb/s port for each GPU, as NVIDIA's DGX H100 has them; "
        f"latency: {_NCCL}, ring, Simple protocol, network",
    ),
    "loopback": Link(
        "loopback",
        0.79e-3,
        1.05e9,
        "measured: gloo, 4 CPU ranks sharing 2 busy cores, torch 2.13, all_reduce of 1 KiB to "
        "16 MiB fitted as a ring, 2026-11-23; another machine differs",
    ),
}


def terms(operation: str, nbytes: float, ranks: int, algorithm: str = "ring") -> tuple[int, float]:
    """Steps that follow each other, and the bytes that each rank sends in all of them.

    ring: n - 1 steps for either half, S/n bytes each; an all_reduce is both halves. The fewest
        bytes possible (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
        workstations", 2009).
    pipelined: the ring's steps and bytes, of which `collective_time` makes another time.
    one_shot: one step. For an all_reduce every rank reads every peer's whole tensor, (n - 1) S, and
        sums by itself (oneShotAllReduceKernel in TensorRT-LLM's customAllReduceKernels.cu).
    two_shot: an all_reduce in two steps, each rank first summing its own n-th of the tensor, then
        reading the others' (twoShotAllReduceKernel there); the ring's bytes, spread over all peers
        at once. NVIDIA's MultiShot is this with multicast in the switch: 2 steps for a ring's
        2n - 2 ("3x Faster AllReduce with NVSwitch and TensorRT-LLM MultiShot").

    The halves of one_shot and two_shot are the same: one step in which each rank exchanges S/n with
    every peer. One rank sends nothing.

    Raises:
        ConfigError: an unknown operation or algorithm, or impossible numbers.
    """
    if operation not in OPERATIONS:
        raise ConfigError(f"operation {operation!r} is not known: use one of {OPERATIONS}")
    if algorithm not in ALGORITHMS:
        raise ConfigError(
            f"algorithm {algorithm!r} is not known: use one of {ALGORITHMS}; for ranks on several "
            "nodes there is hierarchical_time, which takes two links"
        )
    if ranks < 1 or nbytes < 0:
        raise ConfigError(f"ranks={ranks} must be at least 1 and nbytes={nbytes} at least 0")
    if ranks == 1:
        return 0, 0.0
    halves = 2 if operation == "all_reduce" else 1
    if algorithm in ("ring", "pipelined"):
        steps = halves * (ranks - 1)
    elif algorithm == "two_shot":
        steps = halves
    else:
        steps = 1
        if operation == "all_reduce":
            return steps, (ranks - 1) * nbytes
    return steps, halves * (ranks - 1) / ranks * nbytes


def collective_time(
    operation: str, nbytes: float, ranks: int, link: Link, algorithm: str = "ring"
) -> float:
    """Predicted seconds of one collective; `terms` has the steps, the bytes and their sources.

    pipelined: (sqrt(steps x latency) + sqrt(sent / bandwidth))^2. A stream cut into m pieces that
    follow each other over p hops takes (p + m) (latency + sent / m / bandwidth); with the best m
    for each size that is this square (Johnsson and Ho, "Optimum broadcasting and
    personalized communication in hypercubes", 1989). So half of the bandwidth is reached late, and
    small tensors pay less than a straight line through large ones says.
    """
    steps, sent = terms(operation, nbytes, ranks, algorithm)
    start, transfer = steps * link.latency, sent / link.bandwidth
    if algorithm == "pipelined":
        return float((start**0.5 + transfer**0.5) ** 2)
    return start + transfer


def fit(
    sizes: Sequence[float],
    seconds: Sequence[float],
    ranks: int,
    algorithm: str = "ring",
    operation: str = "all_reduce",
    name: str = "fitted",
) -> Link:
    """The link whose predictions lie nearest to measured times, by relative least squares.

    Relative, because the spread of a measured time grows with the time. The latency is kept at or
    above 0: where the best line would start below, the best one through 0 is taken.

    Args:
        sizes: bytes of the whole tensor, at least two different ones.
        seconds: the measured time of each.

    Raises:
        ConfigError: too few or unequal numbers, or times that do not grow with the size.
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < 2:
        raise ConfigError(
            f"a fit needs a time for each of at least two different sizes, got {len(sizes)} sizes "
            f"({len(set(sizes))} different) and {len(seconds)} times"
        )
    if ranks < 2 or min(seconds) <= 0:
        raise ConfigError(
            f"a fit needs at least 2 ranks and times above 0, got ranks={ranks} and a shortest "
            f"time of {min(seconds)} s"
        )
    rows = np.array([terms(operation, size, ranks, algorithm) for size in sizes], dtype=float)
    # The square root of a pipelined time is linear in the roots of latency and time a byte.
    power = 0.5 if algorithm == "pipelined" else 1.0
    weighted = (rows / np.asarray(seconds, dtype=float)[:, None]) ** power
    ones = np.ones(len(sizes))
    latency, per_byte = np.linalg.lstsq(weighted, ones, rcond=None)[0]
    if latency < 0:
        latency, per_byte = 0.0, np.linalg.lstsq(weighted[:, 1:], ones, rcond=None)[0][0]
    if per_byte <= 0:
        raise ConfigError(
            f"the times ({min(seconds):.3g} to {max(seconds):.3g} s) do not grow with the sizes "
            f"({min(sizes):.3g} to {max(sizes):.3g} bytes): measure larger tensors"
        )
    latency, per_byte = latency ** (1 / power), per_byte ** (1 / power)
    source = f"fitted to {len(sizes)} times of {operation}, {ranks} ranks, as {algorithm}"
    return Link(name, float(latency), float(1 / per_byte), source)
