"""Measurements in files: JSON that pandas alone can read, with everything that belongs to them.

A file holds one kind of measurement, latency, throughput or accuracy, told by its columns.

    pandas.read_json("notebooks/results/cpu_tiny_tp2.json", orient="table")

gives the rows; `load` gives back the attributes as well, and every digit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepmoe.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

# What a file of each kind calls itself, and the columns it has at least.
FORMATS = {
    "latency": "stepmoe latency 1",
    "throughput": "stepmoe throughput 1",
    "accuracy": "stepmoe accuracy 1",
}
_NEEDED = {
    "latency": ("variant", "tokens", "phase", "median", "p10", "p90", "verdict", "counts"),
    "throughput": ("variant", "phase", "tokens", "median", "tokens_per_second", "sent", "weights"),
    "accuracy": ("variant", "dtype", "questions", "right", "low", "high", "marks", "answers"),
}


def save(frame: pd.DataFrame, path: str | Path) -> None:
    """Write what `compare_latency`, `compare_throughput` or `compare_accuracy` returned; by
    convention under notebooks/results/.

    Raises:
        ConfigError: another kind of frame, or no such folder.
    """
    columns = getattr(frame, "columns", ())
    telling = {"marks": "accuracy", "tokens_per_second": "throughput"}
    kind = next((kind for name, kind in telling.items() if name in columns), "latency")
    check_frame(frame, kind)
    file = Path(path)
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}; make it first")
    rows = [without_nan(row) for row in frame.to_dict("records")]
    schema = json.loads(frame.head(0).to_json(orient="table", index=False))["schema"]
    content = {"format": FORMATS[kind], "attrs": frame.attrs, "schema": schema, "data": rows}
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def load(path: str | Path) -> pd.DataFrame:
    """Read what `save` wrote: equal to what was saved, but for attrs["recorded"], which is True.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    import pandas as pd

    file = Path(path)
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    kind = next((kind for kind, name in FORMATS.items() if name == found), None)
    if kind is None:
        raise ConfigError(
            f"{file} holds no measurement: its format is {found!r}, wanted "
            f"{' or '.join(map(repr, FORMATS.values()))}. Give a file that stepmoe.measure.save, "
            "or `python -m stepmoe` bench, prefill or accuracy with --json, wrote"
        )
    try:
        columns = [field["name"] for field in content["schema"]["fields"]]
        kinds = {f["name"]: float for f in content["schema"]["fields"] if f["type"] == "number"}
        frame = pd.DataFrame(content["data"], columns=columns).astype(kinds)
        frame.attrs = {**content["attrs"], "recorded": True}
        return check_frame(frame, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is damaged: {type(error).__name__}: {error}") from error


def load_each(folder: str | Path, kind: str) -> dict[str, pd.DataFrame]:
    """`load` of every NAME_KIND.json in a folder, by NAME, in alphabetical order: of h100_prefill
    and h200_prefill both, where both were recorded.

    Raises:
        ConfigError: there is none, or one of them holds something else.
    """
    ending = f"_{kind}.json"
    files = sorted(Path(folder).glob(f"*{ending}"))
    if not files:
        raise ConfigError(f"{folder} holds no file *{ending}")
    return {file.name.removesuffix(ending): load(file) for file in files}


def check_frame(frame: pd.DataFrame, kind: str = "latency") -> pd.DataFrame:
    """The frame, if it is one of `compare_latency`'s or, with another kind, of
    `compare_throughput`'s or `compare_accuracy`'s: rows can be left out, columns cannot."""
    missing = [name for name in _NEEDED[kind] if name not in getattr(frame, "columns", ())]
    if missing or "hardware" not in frame.attrs:
        raise ConfigError(
            f"{type(frame).__name__} is not what compare_{kind} returned: it lacks "
            + (f"the columns {', '.join(missing)}" if missing else "its attrs")
        )
    if not len(frame):
        raise ConfigError("the frame has no row: leave some in")
    return frame


def without_nan(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """The row with None for each NaN, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
    }
