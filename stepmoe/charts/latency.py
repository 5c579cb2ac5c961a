"""Measured latencies: how long, where the time goes, and how sure a difference is.

Each function takes one or several frames of `measure.compare_latency`, live or loaded, draws them
below each other and says above each which it is and what it was measured on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stepmoe.charts.panels import (
    AXIS,
    HEAD,
    NAMES,
    WIDTH,
    Grid,
    by_tokens,
    figure_of,
    height_of,
    inches_wide,
    look_of_variant,
    name_rows,
)
from stepmoe.charts.runs import spread
from stepmoe.charts.style import FAINT, INK, PAPER, label_end
from stepmoe.errors import ConfigError
from stepmoe.measure.plan import BASELINE
from stepmoe.measure.report import title_of, unit_for
from stepmoe.measure.speedup import NO_DIFFERENCE
from stepmoe.measure.store import check_frame

if TYPE_CHECKING:
    import pandas as pd

# Where the time goes; hatches repeat the colours.
PARTS: dict[str, dict[str, Any]] = {
    "compute": {"facecolor": "#F0E442", "edgecolor": INK, "linewidth": 0.5},
    "communication": {"facecolor": "#0072B2", "edgecolor": PAPER, "linewidth": 0, "hatch": "///"},
    "waiting": {"facecolor": "#DDDDDD", "edgecolor": INK, "linewidth": 0.5, "hatch": ".."},
}
_HEIGHT = 2.7  # of a panel of lines, inches


def latency(*frames: pd.DataFrame, title: str | None = None) -> Figure:
    """Median latency against tokens, a line a variant; the bars reach from p10 to p90.

    Raises:
        ConfigError: no frame, or one that is not of compare_latency.
    """

    def draw(grid: Grid, frame: pd.DataFrame) -> None:
        phases = [part for _, part in frame.groupby("phase", sort=False)]
        width = WIDTH / len(phases)
        grid.y += HEAD
        highest = frame["p90"].max()
        is_log = bool(highest > 10 * frame["p10"].min())
        for number, part in enumerate(phases):
            axes = grid.axes(0.75 + number * width, width - 0.75 - NAMES, _HEIGHT)
            _lines(axes, part, unit_for([highest]), is_log=is_log)
        grid.y += _HEIGHT + AXIS
        grid.text(0.75, f"median of {frame['repeats'].min()} rounds; bars from p10 to p90")
        grid.y += HEAD

    return figure_of(frames, title, lambda _: _HEIGHT + AXIS + 2 * HEAD, draw)


def where_the_time_goes(*frames: pd.DataFrame, title: str | None = None) -> Figure:
    """Compute, communication and waiting of the mean rank, stacked, a bar a variant.

    Raises:
        ConfigError: as `latency`.
    """

    def height(frame: pd.DataFrame) -> float:
        return 2 * HEAD + sum(HEAD + height_of(cells) + AXIS for cells in by_tokens(frame))

    def draw(grid: Grid, frame: pd.DataFrame) -> None:
        for cells in by_tokens(frame):
            grid.y += HEAD
            width = (WIDTH - NAMES) / len(cells)
            for number, cell in enumerate(cells):
                axes = grid.axes(NAMES + number * width, width - 0.75, height_of(cells))
                _stacks(axes, cell, named=number == 0)
            grid.y += height_of(cells) + AXIS
        grid.legend(NAMES, [Patch(**look, label=name) for name, look in PARTS.items()])
        grid.y += HEAD
        low, high = frame["split_overhead"].min(), frame["split_overhead"].max()
        grid.text(
            NAMES,
            "told apart by letting the ranks meet before each collective, "
            f"which changes a step by {low:+.0%} to {high:+.0%}",
        )
        grid.y += HEAD

    return figure_of(frames, title, height, draw)


def speedup(*frames: pd.DataFrame, title: str | None = None) -> Figure:
    """How much faster than three_all_reduces, with the 95 % interval; hollow where it contains 1.

    Raises:
        ConfigError: as `latency`; or three_all_reduces was not measured, or nothing beside it.
    """
    for frame in frames:
        names = set(check_frame(frame)["variant"])
        if BASELINE not in names or len(names) < 2:
            raise ConfigError(
                f"a speed-up is against {BASELINE}: measure it and another variant, "
                f"not {', '.join(sorted(names))} alone"
            )
    others = [frame[frame["variant"] != BASELINE] for frame in frames]

    def height(frame: pd.DataFrame) -> float:
        return sum(HEAD + height_of(cells) for cells in by_tokens(frame)) + AXIS + HEAD

    def draw(grid: Grid, frame: pd.DataFrame) -> None:
        rows = by_tokens(frame)
        limits = min(0.9, frame["speedup_low"].min()), max(1.1, frame["speedup_high"].max())
        for row, cells in enumerate(rows):
            grid.y += HEAD
            width = (WIDTH - NAMES) / len(cells)
            for number, cell in enumerate(cells):
                axes = grid.axes(NAMES + number * width, width - 1.75, height_of(cells))
                _intervals(axes, cell, limits, named=number == 0, last=row == len(rows) - 1)
            grid.y += height_of(cells)
        grid.y += AXIS
        repeats = frame["repeats"].min()
        grid.text(NAMES, f"median of {repeats} paired rounds, 95 % interval; hollow: it contains 1")
        grid.y += HEAD

    return figure_of(others, title, height, draw)


def _lines(
    axes: Axes, frame: pd.DataFrame, factor_and_unit: tuple[float, str], *, is_log: bool
) -> None:
    factor, unit = factor_and_unit
    tokens = sorted(frame["tokens"].unique())
    names = list(frame["variant"].unique())
    limits = tokens[0] / 1.4, tokens[-1] * 1.4
    apart = (limits[1] / limits[0]) ** 0.014
    ends = []
    for number, (name, part) in enumerate(frame.groupby("variant", sort=False)):
        middle, look = part["median"] * factor, look_of_variant(name, names)
        # Moved apart sideways, so that the bars of one count do not cover each other.
        x = part["tokens"] * apart ** (number - (len(names) - 1) / 2)
        reach = [middle - part["p10"] * factor, part["p90"] * factor - middle]
        axes.errorbar(x, middle, yerr=reach, lw=1.6, capsize=2.5, elinewidth=1.1, ms=5.5, **look)
        ends.append((float(middle.iloc[-1]), name, look))
    axes.set_xscale("log", base=2)
    axes.set_xlim(limits)
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, None)
    axes.set_title(frame["phase"].iloc[0], loc="left", size=11.5)
    axes.set_xlabel("new tokens in a step")
    axes.set_ylabel(f"latency in {unit}")
    _name_ends(axes, sorted(ends, key=lambda end: end[0]))


def _name_ends(axes: Axes, ends: list[tuple[float, str, dict[str, Any]]]) -> None:
    """Beside the end of each line its name, moved apart where lines end close to each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((axes.get_xlim()[1], y))[1]) * _HEIGHT for y, *_ in ends]
    inch = 1 / inches_wide(axes)
    places = spread(wanted, [0.2] * len(ends), _HEIGHT)
    for y, place, (_, name, look) in zip(wanted, places, ends, strict=True):
        heights = (y / _HEIGHT, place / _HEIGHT)
        leader: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        axes.plot((1 - 0.04 * inch, 1 + 0.08 * inch), heights, color=FAINT, lw=0.8, **leader)
        axes.plot(1 + 0.13 * inch, heights[1], ms=5.5, ls="", **look, **leader)
        x = 1 + 0.22 * inch
        axes.text(x, heights[1], name, size=10.5, va="center", transform=axes.transAxes)


def _stacks(axes: Axes, cell: list[dict[str, Any]], *, named: bool) -> None:
    factor, unit = unit_for(row["split_total"] for row in cell)
    for place, row in enumerate(cell):
        left = 0.0
        for name, look in PARTS.items():
            axes.barh(place, row[name] * factor, left=left, height=0.66, **look)
            left += row[name] * factor
        label_end(axes, left, place, f"{left:.{1 if left < 100 else 0}f}")
    name_rows(axes, cell, named=named)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(title_of(cell[0]), loc="left", size=11.5)
    axes.set_xlabel(f"{unit} a step")


def _intervals(
    axes: Axes,
    cell: list[dict[str, Any]],
    limits: tuple[float, float],
    *,
    named: bool,
    last: bool,
) -> None:
    names = [row["variant"] for row in cell]
    axes.axvline(1, color=INK, lw=1, ls=(0, (4, 2)), zorder=0)
    for place, row in enumerate(cell):
        look = look_of_variant(row["variant"], names)
        same = row["verdict"] == NO_DIFFERENCE
        axes.plot(
            (row["speedup_low"], row["speedup_high"]), (place, place), lw=1.8, color=look["color"]
        )
        axes.plot(row["speedup"], place, ms=7, mfc=PAPER if same else None, mew=1.6, **look)
        words = NO_DIFFERENCE if same else f"{row['speedup']:.2f}x, {row['verdict']}"
        x = 1 + 0.1 / inches_wide(axes)
        axes.text(x, place, words, size=10, va="center", transform=axes.get_yaxis_transform())
    name_rows(axes, cell, named=named)
    room = (limits[1] - limits[0]) * 0.03
    axes.set_xlim(limits[0] - room, limits[1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(title_of(cell[0]), loc="left", size=11.5)
    axes.tick_params("x", labelbottom=last)
    if last:
        axes.set_xlabel(f"times as fast as {BASELINE}")
