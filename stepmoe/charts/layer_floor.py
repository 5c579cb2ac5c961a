"""Picture of one rank's layer on a GPU: what each operation took, and the least it can take."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from stepmoe.charts.style import FAINT, INK, PAPER, new_figure, style
from stepmoe.errors import ConfigError

_WIDTH, _NAMES, _ROW, _HEAD, _FOOT = 10.0, 2.3, 0.3, 1.3, 0.6
_FLOOR, _REST = "#0072B2", "#E69F00"


def layer_floor(record: dict[str, Any], phase: str = "prefill", batch: int | None = None) -> Figure:
    """Draw the operations of every layer that a record holds in one phase, side by side.

    Args:
        record: what `python -m stepmoe layer-floor --json` wrote.
        phase: "prefill" or "decode".
        batch: sequences of the step; None means the first that was recorded.

    Raises:
        ConfigError: the record holds no such layer.
    """
    there = [layer for layer in record["layers"] if layer["phase"] == phase]
    wanted = there[0]["batch"] if batch is None and there else batch
    layers = [layer for layer in there if layer["batch"] == wanted]
    if not layers:
        held = sorted({(layer["phase"], layer["batch"]) for layer in record["layers"]})
        raise ConfigError(f"the record holds no {phase} of batch {batch}; it holds {held}")
    names = [row["operation"] for row in layers[0]["operations"]]
    height = _HEAD + _ROW * (len(names) + 1) + _FOOT
    with style():
        figure = new_figure(_WIDTH, height)
        gpu = ", ".join(record["hardware"]["gpus"])
        title = f"One rank's MoE layer, {phase}: the time of each operation over its floor"
        figure.suptitle(title, weight="bold", size=13.5, y=1 - 0.25 / height)
        made = f"recorded {record['date'][:10]} on one {gpu}, torch {record['versions']['torch']}"
        figure.text(0.5, 1 - 0.55 / height, made, ha="center", va="center", size=10)
        room = (_WIDTH - _NAMES) / len(layers)
        for place, layer in enumerate(layers):
            box = (
                (_NAMES + place * room) / _WIDTH,
                _FOOT / height,
                (room - 0.7) / _WIDTH,
                _ROW * (len(names) + 1) / height,
            )
            _draw(figure.add_axes(box), layer, names, first=place == 0)
        figure.legend(
            handles=[
                Patch(facecolor=_FLOOR, edgecolor=INK, label="the floor: least time"),
                Patch(facecolor=_REST, edgecolor=INK, hatch="//", label="above it"),
            ],
            loc="lower left",
            bbox_to_anchor=(0.0, 0.0),
            frameon=False,
        )
    return figure


def _draw(axes: Axes, layer: dict[str, Any], names: list[str], first: bool) -> None:
    """Bars of one layer, the floor in front; the ratio at the end of each, the layer's above.

    Above it also what its kernels take: the rest is gaps, and a host that launches too slowly.
    """
    rows = {row["operation"]: row for row in layer["operations"]}
    longest = max(row["seconds"] for row in rows.values()) * 1e6
    for y, name in enumerate(names):
        if (row := rows.get(name)) is None:  # part of another operation's kernel in this layer
            continue
        took, least = row["seconds"] * 1e6, row["floor"] * 1e6
        axes.barh(y, took, 0.7, color=_REST, edgecolor=INK, hatch="//", lw=0.8)
        axes.barh(y, min(least, took), 0.7, color=_FLOOR, edgecolor=INK, lw=0.8)
        axes.text(took + longest * 0.02, y, f"{row['ratio']:.2f}", va="center", size=10)
    axes.set_yticks(range(len(names)), names if first else [""] * len(names))
    axes.set(xlim=(0, longest * 1.15), ylim=(len(names) - 0.4, -0.6), xlabel="µs")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color=FAINT, lw=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.set_facecolor(PAPER)
    whole = f"{layer['attention']}: {layer['seconds'] * 1e6:,.0f} µs, {layer['ratio']:.2f} x floor"
    kernels = layer["other"] + sum(row["seconds"] for row in rows.values())
    alone = f"its kernels: {kernels * 1e6:,.0f} µs, {kernels / layer['floor']:.2f} x floor"
    axes.set_title(f"{whole}\n{alone}", size=11.5)
