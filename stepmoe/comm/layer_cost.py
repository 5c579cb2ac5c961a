"""Predicted time of the communication, adds and norms of one MoE layer, for each variant.

What the experts and the attention compute is the same in every variant and left out. An add or a
norm is a pass over memory; each kernel costs a launch. The steps are those of the layers' forward
in stepmoe.variants, and tests hold the two together.

Legend: T tokens, n ranks; a whole tensor is T x hidden, its shard ceil(T / n) x hidden.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from stepmoe.comm.cost import LINKS, Link, collective_time, terms
from stepmoe.comm.fusion import GATES, Gate
from stepmoe.comm.nodes import Nodes, time_over_nodes
from stepmoe.errors import ConfigError

# Copy on an H100 80GB HBM3, bytes read plus bytes written: measured for this project, torch 2.11.
MEMORY_BANDWIDTH = 3.02e12
# Seconds from the end of one kernel to the start of the next. Assumed, neither measured nor
# published: some µs when the host issues each kernel, less in a CUDA graph.
LAUNCH = 2e-6

FUSED = "all_reduce_add_rms_norm"
# Times the tensor is read or written. The fused kernel reads the residual and writes it and the
# norm, less the write of the sum that a plain all_reduce ends with.
_PASSES = {"add": 3, "norm": 2, "+": 3, FUSED: 2}

# Operations of a MoE layer between two others, (operation, site, whether on the rank's own tokens);
# "+" adds the shared expert's output to the routed experts'.
_Recipe = tuple[tuple[str, str, bool], ...]


def _add_norm(site: str, own: bool) -> _Recipe:
    return (("add", site, own), ("norm", site, own))


def _recipe(variant: str, dp: bool) -> _Recipe:
    """What `forward` of a variant's layer does between its sub-layers."""
    before, after = "input_layernorm", "post_attention_layernorm"
    plus = ("+", "", False)
    if variant == "reduce_scatter":
        halves = (("all_gather", "attn_input", False), ("reduce_scatter", "o_proj", False))
        return (
            *_add_norm(before, True),
            *(() if dp else halves),
            *_add_norm(after, True),
            ("all_gather", "mlp_input", False),
            plus,
            ("reduce_scatter", "mlp_output", False),
        )
    if variant == "fused" and not dp:
        return ((FUSED, before, False), (FUSED, after, False), plus)
    three = variant == "three_all_reduces"
    attention = ("all_reduce", "o_proj" if three else after, False)
    gather = ("all_gather", "mlp_input", False)
    ends = (
        (("all_reduce", "share_expert", False), ("all_reduce", "experts", False), plus)
        if three
        else (plus, ("all_reduce", "mlp_output", False))
    )
    return (
        *_add_norm(before, dp),
        *(() if dp else (attention,)),
        *_add_norm(after, dp),
        *((gather,) if dp else ()),
        *ends,
    )


@dataclass(frozen=True)
class Part:
    """One operation of the layer and its predicted time.

    Attributes:
        op: as in the ledger; "+" for the sum of shared and routed output.
        nbytes: of the tensor that a collective carries, whole; of what an add or norm reads and
            writes.
        sent: bytes this rank sends.
        kernels: launched for it.
        seconds: predicted, launches included.
        implementation: which algorithm, "memory" for local work.
    """

    op: str
    site: str
    nbytes: float
    sent: float
    kernels: int
    seconds: float
    implementation: str

    @property
    def is_collective(self) -> bool:
        return self.sent > 0  # one rank alone sends nothing


@dataclass(frozen=True)
class LayerTime:
    """A prediction for one MoE layer of one variant."""

    variant: str
    tokens: int
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """Predicted: communication, adds, norms and launches."""
        return sum(part.seconds for part in self.parts)

    @property
    def communication(self) -> float:
        """Predicted: the collectives alone (a fused one with its add and norm)."""
        return sum(part.seconds for part in self.parts if part.is_collective)

    def counts(self) -> dict[str, int]:
        """How many collectives of each kind: a ledger's counts for such a layer."""
        return dict(Counter(part.op for part in self.parts if part.is_collective))

    def bytes_sent(self) -> float:
        """Bytes each rank sends under the algorithms assumed."""
        return sum(part.sent for part in self.parts)


@dataclass(frozen=True)
class Machine:
    """What a layer's time depends on besides its shape.

    Attributes:
        link: between the ranks.
        algorithm: of the plain collectives.
        fused_algorithms: of the fused kernel; the one predicted faster is taken.
        gate: above it the fused operation runs as its three parts; None for no limit.
        memory_bandwidth: bytes a second, read plus written.
        launch: seconds for each kernel.
        nodes: None if all ranks are on one. Over several, the fused operation runs as its parts:
            its kernels read the peers' memory over NVLink, and sglang turns it on for one node only
            (`nnodes == 1` in its server_args.py).
    """

    link: Link = LINKS["nvlink4"]
    algorithm: str = "ring"
    fused_algorithms: tuple[str, ...] = ("one_shot", "two_shot")
    gate: Gate | None = field(default_factory=lambda: GATES["sglang"])
    memory_bandwidth: float = MEMORY_BANDWIDTH
    launch: float = LAUNCH
    nodes: Nodes | None = None

    def __post_init__(self) -> None:
        if not self.memory_bandwidth > 0 or not self.launch >= 0 or not self.fused_algorithms:
            raise ConfigError(
                f"memory_bandwidth={self.memory_bandwidth} must be above 0, launch={self.launch} "
                f"at least 0, and fused_algorithms={self.fused_algorithms} not empty"
            )

    def fuses(self, tokens: int, hidden: int, dtype_bytes: int, tp: int) -> bool:
        """Whether the fused operation is one kernel."""
        gate = self.gate
        passes = gate is None or tokens <= gate_tokens(gate, hidden, dtype_bytes)
        return passes and (self.nodes is None or self.nodes.count(tp) == 1)


def layer_time(
    variant: str,
    tokens: int,
    hidden: int,
    tp: int,
    dtype_bytes: int = 2,
    machine: Machine | None = None,
    attention: str = "tp",
) -> LayerTime:
    """Predict communication, adds and norms of one MoE layer in the middle of the stack.

    Args:
        variant: one of sm.VARIANTS. With attention="dp" fused is deferred, as in the library.
        tokens: of the whole batch; under reduce_scatter and dp each rank holds ceil(tokens / tp).
        hidden: entries of one token; dtype_bytes: bytes of one entry.
        tp: ranks.
        machine: link, algorithms, gate, memory; None means Machine(), NVLink 4.

    Raises:
        ConfigError: an unknown variant or attention, or a size below 1.
    """
    if variant not in ("three_all_reduces", "deferred", "fused", "reduce_scatter"):
        raise ConfigError(f"no cost model of variant {variant!r}: use one of stepmoe.VARIANTS")
    if attention not in ("tp", "dp"):
        raise ConfigError(f"attention must be 'tp' or 'dp', got {attention!r}")
    for name, value in (("tokens", tokens), ("hidden", hidden), ("tp", tp)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    machine = machine or Machine()
    own = -(-tokens // tp)
    row = hidden * dtype_bytes
    parts = []
    for op, site, on_own in _recipe(variant, attention == "dp"):
        rows = own if on_own else tokens
        if op in ("all_gather", "reduce_scatter"):
            rows = own * tp  # padded, so that every rank has the same number
        if op == FUSED:
            parts.append(_fused(site, tokens, hidden, dtype_bytes, tp, machine))
        elif op in _PASSES:
            parts.append(_local(op, site, rows * row, machine))
        else:
            parts.append(_collective(op, site, rows * row, tp, machine))
    return LayerTime(variant, tokens, tuple(parts))


def _local(op: str, site: str, nbytes: float, machine: Machine) -> Part:
    moved = _PASSES[op] * nbytes
    return Part(
        op, site, moved, 0.0, 1, moved / machine.memory_bandwidth + machine.launch, "memory"
    )


def _collective(op: str, site: str, nbytes: float, tp: int, machine: Machine) -> Part:
    """With one rank there is nothing to launch."""
    nodes = machine.nodes or Nodes(per_node=tp)
    seconds, how = time_over_nodes(op, nbytes, tp, machine.link, nodes, machine.algorithm)
    # Over several nodes a rank sends as much as in one ring through all.
    _, sent = terms(op, nbytes, tp, machine.algorithm if nodes.count(tp) == 1 else "ring")
    kernels = int(tp > 1)
    return Part(op, site, nbytes, sent, kernels, seconds + kernels * machine.launch, how)


def _fused(
    site: str, tokens: int, hidden: int, dtype_bytes: int, tp: int, machine: Machine
) -> Part:
    """One kernel below the gate and on one node; else an all_reduce, an add and a norm."""
    nbytes = tokens * hidden * dtype_bytes
    if not machine.fuses(tokens, hidden, dtype_bytes, tp):
        plain = _collective("all_reduce", site, nbytes, tp, machine)
        rest = [_local(op, site, nbytes, machine) for op in ("add", "norm")]
        seconds = plain.seconds + sum(part.seconds for part in rest)
        return Part(FUSED, site, nbytes, plain.sent, plain.kernels + 2, seconds, "unfused")
    times = {
        algorithm: collective_time("all_reduce", nbytes, tp, machine.link, algorithm)
        for algorithm in machine.fused_algorithms
    }
    fastest = min(times, key=lambda algorithm: times[algorithm])
    memory = _PASSES[FUSED] * nbytes / machine.memory_bandwidth
    _, sent = terms("all_reduce", nbytes, tp, fastest)
    return Part(FUSED, site, nbytes, sent, 1, times[fastest] + memory + machine.launch, fastest)


def gate_tokens(gate: Gate, hidden: int, dtype_bytes: int) -> int:
    """Most tokens that a gate of the fused kernel lets through."""
    limits = []
    if gate.max_tokens is not None:
        limits.append(gate.max_tokens)
    if gate.max_bytes is not None:
        limits.append(gate.max_bytes // (hidden * dtype_bytes))
    if not limits:
        raise ConfigError(f"the gate {gate.name} has no limit: it lets any number through")
    return min(limits)
