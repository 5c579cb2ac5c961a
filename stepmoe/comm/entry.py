"""Entry: one step of a rank, as a ledger keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass
class Entry:
    """One step of this rank: a collective, or local work between collectives.

    Attributes:
        op: "all_reduce", "reduce_scatter", "all_gather", "all_reduce_add_rms_norm"; for local work
            what was computed ("attention").
        kind: "collective" or "local".
        group: name of the group ("tp"); empty for local work.
        group_size: ranks in it.
        shape: of the whole tensor that crosses the group: what all_reduce and reduce_scatter take,
            what all_gather returns, padding included.
        dtype: of that tensor; None for local work.
        bytes: shape times size of dtype.
        layer: decoder layer, None outside the layers.
        site: where in the layer ("o_proj", "mlp").
        tensor: name of the tensor that came out.
        placement: of that tensor: "Replicate", "Shard", "Partial".
        start: seconds since the ledger opened.
        seconds: how long this rank spent in it, waiting for slower ranks included. On a GPU times
            are read off CUDA events when the ledger closes: the GPU's time, not the host's.
        waited: the part of `seconds` before every rank had come; 0 outside `split_waiting()`.
        implementation: which code carried a fused operation out; reason: why that one.
    """

    op: str
    kind: Literal["collective", "local"]
    layer: int | None
    site: str = ""
    group: str = ""
    group_size: int = 1
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    bytes: int = 0
    tensor: str = ""
    placement: str = ""
    start: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    implementation: str = ""
    reason: str = ""

    @property
    def bytes_sent(self) -> float:
        """Fewest bytes this rank must send: the bandwidth-optimal ring's share.

        2 (n-1)/n of the tensor for an all_reduce, (n-1)/n for reduce_scatter and all_gather
        (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009). A backend may send
        more.
        """
        if self.kind == "local":
            return 0.0
        halves = 2 if self.op.startswith("all_reduce") else 1
        return halves * self.bytes * (self.group_size - 1) / self.group_size

    @property
    def label(self) -> str:
        """The step's name in a profile: "stepmoe::all_reduce, layer 3, o_proj"."""
        layer = "outside the layers" if self.layer is None else f"layer {self.layer}"
        return ", ".join(part for part in (f"stepmoe::{self.op}", layer, self.site) if part)
