"""Which variant is predicted fastest at how many tokens, with what others and oneself measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from stepmoe import published
from stepmoe.charts.overlay import draw_measured, draw_published
from stepmoe.charts.ribbon import draw_spans
from stepmoe.charts.runs import spread
from stepmoe.charts.style import COLOURS, FAINT, INK, MARKERS, new_figure, style
from stepmoe.comm.fusion import GATES
from stepmoe.comm.layer_cost import LayerTime, Machine, gate_tokens
from stepmoe.comm.sweep import Span, fastest, sweep
from stepmoe.errors import ConfigError

# Inches.
_WIDTH = 9.6
_LEFT, _RIGHT, _TOP, _CURVES, _RIBBON = 0.85, 1.95, 1.0, 3.15, 0.3
_LEGEND = 5.15  # its upper edge, from the top
_LEGEND_ROW = 0.21
_PUBLISHED_ROWS, _MEASURED_ROWS = 4, 2  # the most there are: a row a published series, or a phase
_ROW = 0.2  # between direct labels
_TOKENS = tuple(2**power for power in range(15))
# Curves that coincide stay visible through each other's gaps.
_DASHES = {
    "three_all_reduces": "-",
    "deferred": "-",
    "fused": (0, (4, 1.5)),
    "reduce_scatter": (0, (6, 1.5, 1.5, 1.5)),
}


class CrossoverPlot:
    """A figure that is drawn once and then updated in place: a slider moves it within a frame.

    Args:
        has_measured: leave room for what a measurement adds to the legend.

    Attributes:
        figure: the matplotlib figure; height: its height in inches.
        times: what is drawn: the predictions of every variant.
        spans: which variant is predicted fastest where.
    """

    def __init__(self, has_measured: bool = False) -> None:
        rows = _PUBLISHED_ROWS + (_MEASURED_ROWS if has_measured else 0)
        self.height = _LEGEND + 0.2 + rows * _LEGEND_ROW
        with style():
            self.figure = new_figure(_WIDTH, self.height)
            self.axes = self._add_axes(_TOP, _CURVES)
            self.ribbon = self._add_axes(_TOP + _CURVES + 0.08, _RIBBON)
            self._frame()
            self.curves = {
                name: self.axes.plot([], [], color=COLOURS[name], ls=_DASHES[name], lw=2.2)[0]
                for name in MARKERS
            }
            self.labels = {
                name: self.axes.annotate(
                    name, (1, 0), xycoords="axes fraction", color=COLOURS[name], weight="bold"
                )
                for name in MARKERS
            }
            self.gates = {
                name: (
                    self.axes.axvline(1, color=INK, lw=1, ls=":", zorder=1),
                    self.axes.text(
                        1, 1.01, "", transform=self.axes.get_xaxis_transform(), size=9.5
                    ),
                )
                for name in GATES
            }
            self.subtitle = self.figure.text(
                0.5, 1 - 0.53 / self.height, "", size=10.5, ha="center", va="center"
            )
        self.times: dict[str, Sequence[LayerTime]] = {}
        self.spans: list[Span] = []
        self._overlay: list[Artist] = []

    def update(
        self,
        tokens: Sequence[int],
        hidden: int,
        tp: int,
        dtype_bytes: int = 2,
        machine: Machine | None = None,
        attention: str = "tp",
        measured: Any = None,
        show_published: bool = True,
    ) -> None:
        """Draw another setting; arguments as in `crossover`."""
        numbers = sorted(set(tokens))
        if len(numbers) < 2:
            raise ConfigError(f"a curve needs at least two numbers of tokens, got {numbers}")
        machine = machine or Machine()
        self.times = sweep(numbers, hidden, tp, dtype_bytes, machine, attention)
        self.spans = fastest(self.times)
        with style():
            for artist in self._overlay:
                artist.remove()
            self._overlay = []
            for name, curve in self.curves.items():
                curve.set_data(numbers, [time.seconds * 1e6 for time in self.times[name]])
            points = published.layer_points(tp, hidden, dtype_bytes) if show_published else []
            inside = [point for point in points if numbers[0] <= point.tokens <= numbers[-1]]
            entries = draw_published(self.axes, inside)
            self._overlay += entries
            if measured is not None:
                shown = measured[measured["tokens"].between(numbers[0], numbers[-1])]
                lines, drawn = draw_measured(self.axes, shown)
                entries += lines
                self._overlay += drawn
            self._limits(numbers)
            self._place_labels()
            self._place_gates(numbers, hidden, dtype_bytes)
            self._overlay += draw_spans(self.ribbon, self.spans, numbers, _WIDTH - _LEFT - _RIGHT)
            self._draw_legend(entries)
        link = machine.link
        self.subtitle.set_text(
            f"hidden {hidden}, {dtype_bytes}-byte numbers, tp={tp}, attention={attention!r}; "
            f"{link.latency * 1e6:.3g} µs a step, {link.bandwidth / 1e9:.4g} GB/s, "
            f"{machine.algorithm}"
        )

    def _add_axes(self, top: float, height: float) -> Axes:
        width = _WIDTH - _LEFT - _RIGHT
        box = (_LEFT, self.height - top - height, width, height)
        sizes = (_WIDTH, self.height, _WIDTH, self.height)
        left, bottom, across, up = (part / size for part, size in zip(box, sizes, strict=True))
        return self.figure.add_axes((left, bottom, across, up))

    def _frame(self) -> None:
        self.figure.suptitle(
            "Predicted: communication, adds and norms of one MoE layer",
            weight="bold",
            size=13.5,
            y=1 - 0.22 / self.height,
        )
        self.axes.set(xscale="log", yscale="log", ylabel="µs a layer (lines: predicted)")
        self.axes.grid(axis="y", color=FAINT, alpha=0.25, lw=0.6)
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        self.axes.yaxis.set_minor_locator(NullLocator())
        self.axes.tick_params(axis="x", labelbottom=False)
        self.ribbon.set(xscale="log", ylim=(0, 1), yticks=[], xlabel="tokens (all ranks together)")
        self.ribbon.spines["left"].set_visible(False)
        self.ribbon.text(
            1.02, 0.5, "predicted fastest", transform=self.ribbon.transAxes, va="center", size=10.5
        )
        for axes in (self.axes, self.ribbon):
            axes.xaxis.set_minor_locator(NullLocator())

    def _limits(self, numbers: Sequence[int]) -> None:
        low, high = numbers[0], numbers[-1]
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        ticks = [2**power for power in powers][:: -(-len(powers) // 9)]
        for axes in (self.axes, self.ribbon):
            axes.set_xlim(low, high)
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        lines = [*self.curves.values(), *(a for a in self._overlay if isinstance(a, Line2D))]
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines])
        bottom, top = values.min() / 1.3, values.max() * 1.3
        self.axes.set_ylim(bottom, top)
        steps = (1, 2, 5) if top / bottom < 1500 else (1,)  # as many as fit
        self.axes.yaxis.set_major_locator(LogLocator(10, subs=steps, numticks=99))

    def _place_labels(self) -> None:
        """Beside the ends of the curves, moved apart where they are near."""
        bottom, top = (math.log(limit) for limit in self.axes.get_ylim())
        ends = {
            name: (math.log(times[-1].seconds * 1e6) - bottom) / (top - bottom) * _CURVES
            for name, times in self.times.items()
        }
        names = sorted(ends, key=lambda name: ends[name])
        middles = spread([ends[name] for name in names], [_ROW] * len(names), _CURVES)
        for name, middle in zip(names, middles, strict=True):
            self.labels[name].set(position=(1.02, middle / _CURVES), va="center")

    def _place_gates(self, numbers: Sequence[int], hidden: int, dtype_bytes: int) -> None:
        for name, (line, text) in self.gates.items():
            tokens = gate_tokens(GATES[name], hidden, dtype_bytes)
            inside = numbers[0] <= tokens <= numbers[-1]
            line.set_xdata([tokens, tokens])
            line.set_visible(inside)
            text.set(text=f"{name} gate: {tokens}", x=tokens, ha="center", visible=inside)
        shown = [text for _, text in self.gates.values() if text.get_visible()]
        if len(shown) == 2:  # near each other they would overlap: one to either side
            first, second = sorted(shown, key=lambda text: text.get_position()[0])
            first.set(ha="right")
            second.set(ha="left")

    def _draw_legend(self, entries: list[Line2D]) -> None:
        if not entries:
            return
        by_label = {str(line.get_label()): line for line in reversed(entries)}
        legend = self.figure.legend(
            by_label.values(),
            by_label.keys(),
            loc="upper left",
            bbox_to_anchor=(_LEFT / _WIDTH - 0.02, 1 - _LEGEND / self.height),
            frameon=False,
            fontsize=9.5,
            borderpad=0.2,
        )
        self._overlay.append(legend)


def crossover(
    tokens: Sequence[int] = _TOKENS,
    hidden: int = 4096,
    tp: int = 8,
    dtype_bytes: int = 2,
    machine: Machine | None = None,
    attention: str = "tp",
    measured: Any = None,
    show_published: bool = True,
) -> Figure:
    """Draw the predicted time of every variant against the tokens, and the fastest in a ribbon.

    Published times of as many ranks are hollow markers, doubled because a layer needs two sums;
    measured ones are filled. The caps of the fused kernel are dotted lines.

    Args:
        tokens: at least two numbers; hidden, tp, dtype_bytes, machine, attention: as in
            `stepmoe.comm.layer_cost.layer_time`.
        measured: a DataFrame with columns variant, tokens, phase, median, p10, p90 (seconds) and
            attrs["hardware"].
        show_published: draw the published times.

    Raises:
        ConfigError: fewer than two numbers of tokens, or impossible ones.
    """
    plot = CrossoverPlot(measured is not None)
    plot.update(tokens, hidden, tp, dtype_bytes, machine, attention, measured, show_published)
    return plot.figure
