"""Published and measured times over predicted curves: hollow markers and filled ones."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from stepmoe.charts.style import COLOURS, INK, MARKERS
from stepmoe.measure.report import provenance
from stepmoe.published import LayerPoint

_SHAPES = ("o", "s", "D", "v", "P", "X", "*")  # one a published series


def draw_published(axes: Axes, points: list[LayerPoint]) -> list[Line2D]:
    """Hollow markers in µs, one shape a series; returns one labelled line each."""
    lines = []
    for shape, (label, group) in zip(_SHAPES, groupby(points, lambda p: p.label), strict=False):
        series = list(group)
        (line,) = axes.plot(
            [point.tokens for point in series],
            [point.seconds * 1e6 for point in series],
            ls="none",
            marker=shape,
            ms=8,
            mfc="none",
            mew=1.8,
            color=COLOURS[series[0].variant],
            label=f"published, ×2: {label}",
            zorder=4,
            clip_on=False,
        )
        lines.append(line)
    return lines


def draw_measured(axes: Axes, measured: Any) -> tuple[list[Line2D], list[Artist]]:
    """Filled markers in µs with the spread from p10 to p90, half filled for decode.

    Args:
        measured: rows with variant, tokens, phase, median, p10, p90 in seconds.

    Returns:
        One labelled line a series, and all that was drawn.
    """
    lines: list[Line2D] = []
    drawn: list[Artist] = []
    what = _origin(measured.attrs)
    for (variant, phase), rows in measured.groupby(["variant", "phase"], sort=False):
        middle = rows["median"] * 1e6
        bars = axes.errorbar(
            rows["tokens"],
            middle,
            yerr=(middle - rows["p10"] * 1e6, rows["p90"] * 1e6 - middle),
            fmt=MARKERS.get(variant, "o"),
            ms=8,
            fillstyle="full" if phase == "prefill" else "bottom",
            color=COLOURS.get(variant, INK),
            capsize=3,
            clip_on=False,
            zorder=5,
        )
        points, caps, spreads = bars.lines
        points.set_label(f"measured, {phase}, whole forward pass: {what}")
        lines.append(points)
        drawn += [points, *caps, *spreads]
    return lines, drawn


def _origin(attrs: Mapping[str, Any]) -> str:
    """What a measurement ran on: `compare_latency` tells it in full, others in a word."""
    hardware = attrs.get("hardware", "hardware not recorded")
    return provenance(dict(attrs)) if isinstance(hardware, Mapping) else str(hardware)
