"""A measured layer as plain data, for a file, and the table that such a file makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepmoe.measure.layer_floor import LayerTime
from stepmoe.measure.operations import unavoidable_bytes
from stepmoe.roofline import Chip

if TYPE_CHECKING:
    import pandas as pd


def layer_record(attention: str, layer: LayerTime, chip: Chip) -> dict[str, Any]:
    """One layer and its operations; seconds and bytes."""
    work, sustained = layer.work, chip.sustained()
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
        "sustained_floor": sustained and layer.floor(sustained),
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


def layer_table(record: dict[str, Any]) -> pd.DataFrame:
    """What `python -m stepmoe layer-floor --json` wrote: a row an operation, a column a step.

    An entry reads "time / floor = ratio", in us; without the ratio where the floor is below 0.1 us.
    It is empty where a step has no such operation: with few tokens some are part of others.
    """
    import pandas as pd

    columns = {}
    for layer in sorted(record["layers"], key=lambda each: (each["phase"], each["batch"])):
        step = (f"{layer['phase']} {layer['batch']} x {layer['length']}", layer["attention"])
        rows = {row["operation"]: row for row in layer["operations"]} | {"whole layer": layer}
        columns[step] = {name: _entry(row) for name, row in rows.items()}
    complete_first = sorted(columns.values(), key=len, reverse=True)
    names = dict.fromkeys(name for column in complete_first for name in column)
    del names["whole layer"]
    return pd.DataFrame(columns).reindex([*names, "whole layer"]).fillna("")


def _entry(row: dict[str, Any]) -> str:
    took, least = row["seconds"] * 1e6, row["floor"] * 1e6
    floor = f"{least:,.0f}" if least >= 100 else f"{least:#.3g}"
    return f"{took:,.0f} / {floor}" + (f" = {row['ratio']:.2f}" if least >= 0.1 else "")
