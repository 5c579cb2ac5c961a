"""What a variant promises to send: the table of collectives, written once, for the ledger diff."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepmoe.comm.fusion import choose
from stepmoe.comm.fusion.vote import expected_place
from stepmoe.comm.ledger import Entry, Ledger
from stepmoe.config import Step3p5Config
from stepmoe.parallel import ParallelConfig

FUSED = "all_reduce_add_rms_norm"
_HALVES = ("all_gather", "reduce_scatter")

# Collectives of an MoE layer, in order; the sums complete what that layer computed.
_MOE_LAYER = {
    ("three_all_reduces", "tp"): ("all_reduce",) * 3,
    ("deferred", "tp"): ("all_reduce",) * 2,
    ("fused", "tp"): (FUSED,) * 2,
    ("reduce_scatter", "tp"): _HALVES * 2,
    ("three_all_reduces", "dp"): ("all_gather", "all_reduce", "all_reduce"),
    ("deferred", "dp"): ("all_gather", "all_reduce"),
    ("fused", "dp"): ("all_gather", "all_reduce"),
    ("reduce_scatter", "dp"): _HALVES,
}


@dataclass(frozen=True)
class Promised:
    """One collective that has to come, as a ledger would write it down."""

    layer: int | None
    op: str
    shape: tuple[int, int]
    dtype: torch.dtype
    group: str
    ranks: int
    implementation: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.what}, {self.how}" if self.reason else self.what

    @property
    def what(self) -> str:
        """What is sent, and between whom."""
        rows, columns = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} of {rows} x {columns} {dtype} over {self.group} ({self.ranks} ranks)"

    @property
    def how(self) -> str:
        """In which implementation, and why; empty where there is but one."""
        return f"{self.implementation}: {self.reason}" if self.reason else ""


def promised(
    variant: str,
    parallel: ParallelConfig,
    config: Step3p5Config,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Promised]:
    """The collectives of one forward pass over (batch, length) tokens, in order."""
    if parallel.tp == 1:
        return []
    tokens, hidden = batch * length, config.hidden_size
    place = expected_place(device, parallel.tp)
    by_rows = parallel.attention == "dp"  # sequences are dealt to the ranks, otherwise tokens
    per_rank = -(-batch // parallel.tp) * length if by_rows else -(-tokens // parallel.tp)

    def one(layer: int | None, op: str) -> Promised:
        shape = (per_rank * parallel.tp if op in _HALVES else tokens, hidden)
        made = choose(*shape, dtype, place) if op == FUSED else None
        how = (made.implementation, made.reason) if made else ("", "")
        return Promised(layer, op, shape, dtype, "tp", parallel.tp, *how)

    ops = [
        one(layer, op)
        for layer in range(config.num_hidden_layers)
        for op in _of_layer(variant, parallel, config, layer)
    ]
    shards = parallel.attention == "dp" or variant == "reduce_scatter"
    return [*ops, one(None, "all_gather")] if shards else ops


def _of_layer(
    variant: str, parallel: ParallelConfig, config: Step3p5Config, layer: int
) -> tuple[str, ...]:
    ops = _MOE_LAYER[variant, parallel.attention]
    if variant == "three_all_reduces" and layer not in config.moe_layers:
        return ops[:-1]  # a dense layer has one MLP, not two
    if ops[-1] == FUSED and layer == config.num_hidden_layers - 1:
        return (*ops[:-1], "all_reduce")  # no norm of the stack stands behind the last sum
    return ops


def recorded(ledger: Ledger) -> list[Promised]:
    """A ledger's collectives in the same words, extra ones of a Capture left out."""
    return [_as_promised(entry) for entry in ledger.entries if entry.site != "capture"]


def _as_promised(entry: Entry) -> Promised:
    rows, columns = entry.shape
    assert entry.dtype is not None
    return Promised(
        entry.layer if entry.site != "lm_head" else None,
        entry.op,
        (rows, columns),
        entry.dtype,
        entry.group,
        entry.group_size,
        entry.implementation,
        entry.reason,
    )
