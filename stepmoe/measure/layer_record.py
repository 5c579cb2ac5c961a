"""A measured layer as plain data, for a file."""

from __future__ import annotations

from typing import Any

from stepmoe.measure.layer_floor import LayerTime
from stepmoe.measure.operations import unavoidable_bytes
from stepmoe.roofline import Chip


def layer_record(attention: str, layer: LayerTime, chip: Chip) -> dict[str, Any]:
    """One layer and its operations; seconds and bytes."""
    work = layer.work
    return {
        "attention": attention,
        "phase": layer.phase,
        "batch": work.batch,
        "length": work.length,
        "context": work.context,
        "rows": work.rows,
        "experts": work.experts,
        "tokens_here": work.tokens_here,
        "seconds": layer.seconds,
        "eager_seconds": layer.eager_seconds,
        "floor": layer.floor(chip),
        "ratio": layer.ratio(chip),
        "other": layer.other,
        "activation_bytes": layer.activation_bytes,
        "unavoidable_bytes": unavoidable_bytes(work),
        "memory_ratio": layer.memory_ratio(),
        "operations": [
            {
                "operation": row.needs.name,
                "seconds": row.seconds,
                "floor": row.needs.floor(chip),
                "ratio": row.ratio(chip),
                "bound": row.needs.bound(chip),
                "operations": row.needs.operations,
                "bytes": row.needs.bytes,
                "bandwidth_fraction": row.needs.bytes / row.seconds / chip.bandwidth,
            }
            for row in layer.operations
        ],
    }
