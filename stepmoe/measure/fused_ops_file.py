"""Timings of the fused operation as a table, as a dict for charts, and in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stepmoe.comm.cost import LINKS
from stepmoe.errors import ConfigError
from stepmoe.measure.environment import Place, provenance
from stepmoe.measure.fused_ops import REHEARSED_IN, TIMED_IN, Timing, wire_floor

FORMAT = "stepmoe fused operation 1"


def with_provenance(
    timings: list[Timing],
    places: list[Place],
    hidden_size: int,
    dtype: torch.dtype,
    command: str = "",
    *,
    rehearsal: bool = False,
) -> dict[str, Any]:
    """What `time_fused_ops` returned together with where, when and how it was measured.

    A row's "bus_gb_s" is the bus bandwidth as nccl-tests defines it for an all-reduce
    (doc/PERFORMANCE.md there): 2 (n - 1) / n times the tensor's bytes over the time of a call. The
    bandwidth of a GPU's links bounds it, unless the switch takes part in the sum. "of_nvlink4" is
    its ratio to 450 GB/s. Of a fused operation the time of add and norm is in it.

    Args:
        places: `look_around` of every rank.
        command: the command line that measures the same again.
    """
    return {
        "format": FORMAT,
        "recorded": False,
        **provenance(places),
        "command": command,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": hidden_size,
        "timed_in": REHEARSED_IN if rehearsal else TIMED_IN,
        "rehearsal": rehearsal,
        "rows": [_row(timing, hidden_size, dtype, len(places)) for timing in timings],
    }


def load_fused_ops(path: str | Path) -> dict[str, Any]:
    """Read what `python -m stepmoe bench-fusion --json` wrote; "recorded" is then True.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ConfigError(
            f"{file} holds no timings of the fused operation: its format is {found!r}, wanted "
            f"{FORMAT!r}. Give a file that `python -m stepmoe bench-fusion --json` wrote"
        )
    return {**content, "recorded": True}


def table(timings: list[Timing]) -> str:
    """Median microseconds of a call: a line for each number of tokens."""
    names = list(dict.fromkeys(timing.implementation for timing in timings))
    wide = max(map(len, names)) + 2
    lines = [" " * 8 + "".join(f"{name:>{wide}}" for name in names) + "   (µs a call, median)"]
    for tokens in dict.fromkeys(timing.tokens for timing in timings):
        cells = [timing for timing in timings if timing.tokens == tokens]
        shown = (f"{t.median:{wide}.1f}" if t.microseconds else f"{'-':>{wide}}" for t in cells)
        lines.append(f"{tokens:8}" + "".join(shown))
    refusals = dict.fromkeys(timing.refusal for timing in timings if timing.refusal)
    return "\n".join([*lines, *refusals])


def _row(timing: Timing, hidden_size: int, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    times = sorted(timing.microseconds)
    floor = wire_floor(timing.tokens, hidden_size, dtype, ranks)
    row: dict[str, Any] = {
        "tokens": timing.tokens,
        "implementation": timing.implementation,
        "wire_floor_us": round(floor, 3),
    }
    if not times:
        return row | {"refusal": timing.refusal}
    tenth = len(times) // 10
    return row | {
        "median_us": round(timing.median, 3),
        "p10_us": round(times[tenth], 3),
        "p90_us": round(times[-1 - tenth], 3),
        "bus_gb_s": round(floor / timing.median * LINKS["nvlink4"].bandwidth / 1e9, 3),
        "of_nvlink4": round(floor / timing.median, 5),
        "error": timing.error,
    }
