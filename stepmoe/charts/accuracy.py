"""Accuracies with their intervals, flips between paired runs, and how many questions it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stepmoe.charts.panels import AXIS, HEAD, ROW, WIDTH, Grid, look_of_variant
from stepmoe.charts.style import FAINT, INK, PAPER, new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.measure.report import provenance
from stepmoe.measure.sample_size import questions_needed_independent, questions_needed_paired
from stepmoe.measure.significance import Interval, Paired, wilson
from stepmoe.measure.store import check_frame
from stepmoe.published import Score

if TYPE_CHECKING:
    import pandas as pd

_WORDS = 3.0  # inches, for the numbers behind a row
_LABELS = 2.6  # inches, for names that are longer than a variant's
_EDGE: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.5}
_FIRST = {"facecolor": "#56B4E9", "hatch": "///", **_EDGE}
_SECOND = {"facecolor": "#E69F00", "hatch": "..", **_EDGE}


def accuracy(
    *frames: pd.DataFrame, published: Sequence[Score] = (), title: str | None = None
) -> Figure:
    """Accuracies with Wilson's 95 % intervals on one axis: published ones first, then ours.

    Args:
        frames: of `measure.compare_accuracy`, live or loaded; each says which it is.
        published: of stepmoe.published.SCORES, all of one source.

    Raises:
        ConfigError: nothing to draw, or another kind of frame.
    """
    blocks = [_published_block(published)] if published else []
    blocks += [_measured_block(check_frame(frame, "accuracy")) for frame in frames]
    if not blocks:
        raise ConfigError("no accuracy to draw: give what measure.compare_accuracy returned")
    intervals = [interval for _, rows in blocks for _, interval, _, _ in rows]
    limits = min(i.low for i in intervals) - 0.005, max(i.high for i in intervals) + 0.005
    height = sum(HEAD + 0.12 + ROW * len(rows) for _, rows in blocks)
    top = 0.45 if title else 0.05
    with style():
        figure = new_figure(WIDTH, top + height + AXIS)
        if title:
            figure.text(0.01, 1 - 0.22 / figure.get_figheight(), title, weight="bold", size=13.5)
        grid = Grid(figure, top)
        for number, (origin, rows) in enumerate(blocks):
            grid.text(0.1, origin, size=10.5, style="italic")
            grid.y += HEAD
            axes = grid.axes(_LABELS, WIDTH - _LABELS - _WORDS, ROW * len(rows))
            _forest(axes, rows, limits, last=number == len(blocks) - 1)
            grid.y += ROW * len(rows) + 0.12
    return figure


def flips(pairs: Mapping[str, Paired], title: str | None = None, label: str = "") -> Figure:
    """Questions that one of two runs alone got right: to the left the first, to the right the
    second; behind them McNemar's verdict.

    Args:
        pairs: name of the comparison to what `measure.paired` returned.
        label: what was run on, written below the title.

    Raises:
        ConfigError: no pair.
    """
    if not pairs:
        raise ConfigError("no pair to draw: give {'deferred to fused': measure.paired(...)}")
    most = max(max(pair.only_first, pair.only_second) for pair in pairs.values()) or 1
    with style():
        figure = new_figure(WIDTH, 0.1 + 3 * HEAD + ROW * len(pairs) + AXIS)
        grid = Grid(figure, 0.05)
        grid.text(0.1, title or "The same questions, answered otherwise", weight="bold", size=13.5)
        grid.y += HEAD
        grid.text(0.1, label, size=10.5, style="italic")
        grid.y += HEAD
        axes = grid.axes(_LABELS, WIDTH - _LABELS - _WORDS, ROW * len(pairs))
        for place, pair in enumerate(pairs.values()):
            axes.barh(place, -pair.only_first, height=0.66, **_FIRST)
            axes.barh(place, pair.only_second, height=0.66, **_SECOND)
            words = f"{pair.only_second - pair.only_first:+d} net, p = {pair.p_value:.2g}"
            _behind(axes, place, f"{words}: {pair.verdict}")
        axes.axvline(0, color=INK, lw=1)
        _named(axes, list(pairs))
        axes.set_xlim(-1.1 * most, 1.1 * most)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
        axes.set_xlabel("questions")
        grid.y += ROW * len(pairs) + AXIS
        looks = {"only the first run right": _FIRST, "only the second": _SECOND}
        grid.legend(_LABELS, [Patch(**look, label=name) for name, look in looks.items()])
    return figure


def questions_needed(
    accuracy: float = 0.875,
    flip_rates: Sequence[float] = (0.2, 0.05, 0.01),
    there: int = 1319,
    seen: float = 0.004,
    title: str | None = None,
) -> Figure:
    """Questions a test needs to see a true difference four times in five, against the difference.

    Args:
        accuracy: of the first run; the second is better by the difference.
        flip_rates: shares of the questions that two paired runs answer differently, a line each.
        there: questions there are, drawn as a line.
        seen: a difference, drawn as a line.
    """
    differences = np.geomspace(0.002, 0.1, 18)
    with style():
        figure = new_figure(9.0, 4.6)
        axes = figure.subplots()
        needed = [questions_needed_independent(accuracy, accuracy + d) for d in differences]
        axes.plot(100 * differences, needed, color=INK, lw=2, label="independent runs")
        for rate, look in zip(flip_rates, _PAIRED, strict=False):
            reach = differences[differences < rate]
            needed = [questions_needed_paired((rate - d) / 2, (rate + d) / 2) for d in reach]
            name = f"paired, {rate:.0%} of the answers flip"
            axes.plot(100 * reach, needed, lw=2, label=name, **look)
        axes.axhline(there, color=FAINT, lw=1.2, ls=(0, (4, 2)))
        axes.text(10, there * 1.08, f"{there} questions", ha="right", size=10.5)
        axes.axvline(100 * seen, color=FAINT, lw=1.2, ls=(0, (4, 2)))
        axes.text(104 * seen, 120, f"{100 * seen:.1f} points", size=10.5)
        axes.set(xscale="log", yscale="log", ylim=(100, None))
        axes.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("true difference of the accuracies, percentage points")
        axes.set_ylabel("questions of each run")
        axes.legend(frameon=False)
        axes.set_title(title or "Questions needed to see a difference, 4 times in 5", loc="left")
        figure.tight_layout()
    return figure


_PAIRED: tuple[dict[str, Any], ...] = (
    {"color": "#E69F00", "ls": (0, (5, 1.5))},
    {"color": "#0072B2", "ls": (0, (3, 1, 1, 1))},
    {"color": "#56B4E9", "ls": (0, (1, 1))},
)
_Row = tuple[str, Interval, str, dict[str, Any]]  # name, accuracy, numbers in words, look


def _published_block(scores: Sequence[Score]) -> tuple[str, list[_Row]]:
    rows: list[_Row] = []
    for score in scores:
        right = round(score.accuracy * score.questions)
        look = {"color": INK, "marker": "s", "mfc": PAPER}
        rows.append((score.what, wilson(right, score.questions), "", look))
    first = scores[0]
    origin = f"published: {first.source}, {first.benchmark}, {first.questions} questions"
    return f"{origin}; intervals computed here", rows


def _measured_block(frame: pd.DataFrame) -> tuple[str, list[_Row]]:
    attrs, names = frame.attrs, list(frame["variant"])
    parallel = attrs["parallel"]
    layout = f"tp={parallel['tp']} ep={parallel['ep']}"
    layout += " attention=dp" if parallel["attention"] == "dp" else ""
    rows: list[_Row] = []
    for row in frame.to_dict("records"):
        interval = Interval(row["accuracy"], row["low"], row["high"])
        words = f"{row['right']} of {row['questions']}: "
        rows.append((row["variant"], interval, words, look_of_variant(row["variant"], names)))
    return f"{provenance(attrs)}, {layout}", rows


def _forest(axes: Axes, rows: list[_Row], limits: tuple[float, float], *, last: bool) -> None:
    for place, (_, interval, words, look) in enumerate(rows):
        axes.plot((interval.low, interval.high), (place, place), lw=1.8, color=look["color"])
        axes.plot(interval.value, place, ms=7, mew=1.6, **look)
        _behind(axes, place, f"{words}{interval}")
    _named(axes, [name for name, _, _, _ in rows])
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", color=FAINT, alpha=0.3)
    axes.tick_params("x", labelbottom=last)
    if last:
        axes.set_xlabel("share of right answers, with 95 % interval (Wilson)")


def _named(axes: Axes, names: Sequence[str]) -> None:
    """A row a name, the first on top."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), list(names))
    axes.tick_params("y", length=0)
    axes.spines["left"].set_visible(False)


def _behind(axes: Axes, place: int, words: str) -> None:
    """Words to the right of a row."""
    axes.text(1.02, place, words, size=10, va="center", transform=axes.get_yaxis_transform())
