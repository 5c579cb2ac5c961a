"""Batch invariance: whether a sequence is computed to the same bits alone and among others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepmoe.checks import check_dtype, whole_number
from stepmoe.comm.summation import check_order, summation
from stepmoe.errors import ConfigError
from stepmoe.launch import Ranks, progress, rank_device
from stepmoe.measure.distance import distance, fingerprint
from stepmoe.measure.environment import Place, look_around
from stepmoe.measure.error import checked_layout, frame_of
from stepmoe.measure.latency import run_everywhere
from stepmoe.measure.plan import named_layers
from stepmoe.measure.source import Source, config_of, load
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import DecoderLayer

if TYPE_CHECKING:
    import pandas as pd


def batch_invariance(
    source: Source,
    input_ids: Tensor,
    batch_sizes: Iterable[int],
    variant: str | type[DecoderLayer] = "deferred",
    *,
    dtype: str | torch.dtype | None = None,
    order: str = "library",
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
    timeout: float | None = 600,
) -> pd.DataFrame:
    """Whether a sequence gets the same logits alone and in a batch.

    One row a batch size. Columns: batch_size, order; same_bits: sequences whose logits are those
    they get alone, bit for bit; sequences; those of `Distance`, the sequences alone being the
    reference; ranks_agree. Arguments and errors are `numerical_error`'s.

    Args:
        input_ids: (sequences, length) int64.
        batch_sizes: how many of them are computed together; the last batch may be smaller.
    """
    sizes = [whole_number("a batch size", size) for size in batch_sizes]
    kind = check_dtype(config_of(source).torch_dtype if dtype is None else dtype)
    parallel = checked_layout(source, input_ids, parallel, ranks, [kind])
    if not sizes:
        raise ConfigError("batch_sizes is empty: give at least one")
    check_order(order)
    (layer,) = named_layers([variant]).values()
    found = run_everywhere(
        ranks, timeout, _invariance_here, source, layer, parallel, kind, order, input_ids, sizes
    )
    return frame_of(found, str(kind), parallel)


def _invariance_here(
    source: Source,
    layer: type[DecoderLayer],
    parallel: ParallelConfig,
    dtype: torch.dtype,
    order: str,
    input_ids: Tensor,
    sizes: list[int],
) -> tuple[Place, list[dict[str, Any]]]:
    """In a rank: every batch size's row."""
    model = load(source, layer, parallel, dtype, rank_device())

    def logits_of(size: int) -> Tensor:
        with summation(order):
            return torch.cat([model(part).cpu() for part in input_ids.split(size)])

    alone = logits_of(1)
    rows = []
    for size in progress(sizes, desc="batches"):
        logits = logits_of(size)
        same = [torch.equal(a, b) for a, b in zip(logits, alone, strict=True)]
        row = {
            "batch_size": size,
            "order": order,
            "same_bits": sum(same),
            "sequences": len(same),
            **asdict(distance(logits, alone)),
            "fingerprint": fingerprint(logits),
        }
        rows.append(row)
    return look_around(rank_device()), rows
