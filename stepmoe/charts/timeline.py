"""Timelines: what every rank did when, one lane a rank, from the ledgers of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepmoe.charts.runs import Run, spread
from stepmoe.charts.style import (
    CODES,
    COLOURS,
    FAINT,
    INK,
    LEGEND_COLUMNS,
    in_order,
    inch_axes,
    look_of,
    new_figure,
    step_legend,
    style,
    text_width,
    time_axis,
)
from stepmoe.comm.ledger import Entry, Ledger
from stepmoe.errors import ConfigError

# Inches.
_WIDTH, _LEFT, _RIGHT, _TITLE, _AXIS, _LEGEND_ROW = 10.0, 0.95, 0.25, 0.5, 0.62, 0.28
_LAYERS, _CODES, _LEADER, _NAME = 0.24, 0.24, 0.16, 0.34  # strips above the lanes


def timeline(
    ledgers: Sequence[Ledger],
    title: str | None = None,
    layers: Iterable[int] | None = None,
    label: str = "",
) -> Figure:
    """Draw one run: a lane for each rank, a bar for each step.

    Each ledger counts from the moment it was opened, which differs from rank to rank. The lanes are
    aligned at the end of the first collective: nobody leaves one before everybody has entered it,
    and then its last message is on its way, so the ranks leave within one message of each other.
    Where ranks outnumber the cores the scheduler's turns come on top: up to 4 ms with 4 ranks on 2.

    Args:
        ledgers: of all ranks of one run, rank order; `[ledger]` for one rank alone.
        title: above the picture.
        layers: only steps that the ledger books under these decoder layers; None means all steps.
        label: what was measured, for the axis ("4 CPU ranks on 2 cores").

    Raises:
        ConfigError: there is nothing to draw or to align by, or more collectives than fit.
    """
    run = Run.of(ledgers, layers)
    return _draw({"": run}, title, label, lane=0.36)


def timelines(
    by_variant: Mapping[str, Sequence[Ledger]],
    title: str | None = None,
    layers: Iterable[int] | None = None,
    label: str = "",
) -> Figure:
    """Draw runs of several variants below each other on one time axis.

    Args:
        by_variant: a name, best one of sm.VARIANTS, to the ledgers of all ranks.
        title, layers, label: as in `timeline`.

    Raises:
        ConfigError: as `timeline`, with the variant's name.
    """
    if not by_variant:
        raise ConfigError("no variant to draw: give {'deferred': ledgers of all ranks, ...}")
    chosen = None if layers is None else list(layers)
    runs = {name: Run.of(ledgers, chosen, name) for name, ledgers in by_variant.items()}
    return _draw(runs, title, label, lane=0.22)


def _draw(runs: Mapping[str, Run], title: str | None, label: str, lane: float) -> Figure:
    ops = in_order(set().union(*(run.ops for run in runs.values())))
    legend = _LEGEND_ROW * -(-len(ops) // LEGEND_COLUMNS)
    heights = [
        _LAYERS + _CODES + _LEADER + lane * len(run.ranks) + (_NAME if name else 0)
        for name, run in runs.items()
    ]
    head = _TITLE if title else 0.1
    end = max(run.end for run in runs.values())
    scale, unit = (1e3, "ms") if end >= 1e-3 else (1e6, "µs")
    with style():
        figure = new_figure(_WIDTH, head + sum(heights) + _AXIS + legend + 0.1)
        if title:
            figure.suptitle(title, weight="bold", size=13.5, y=1 - 0.25 / figure.get_figheight())
        top, axes = head, None
        for (name, run), height in zip(runs.items(), heights, strict=True):
            axes = inch_axes(figure, _LEFT, top, _WIDTH - _LEFT - _RIGHT, height)
            _Panel(axes, run, scale, end * scale, lane).draw(name)
            top += height
        assert axes is not None
        time_axis(axes, f"{unit} since the first step" + (f"  ({label})" if label else ""))
        step_legend(figure, ops)
    return figure


class _Panel:
    """One run. x is time, y inches downwards from the panel's top."""

    def __init__(self, axes: Axes, run: Run, scale: float, end: float, lane: float) -> None:
        self.axes, self.run, self.scale, self.lane = axes, run, scale, lane
        self.inches = axes.get_xlim()[1]
        self.height = axes.get_ylim()[0]
        self.lanes_top = self.height - lane * len(run.ranks)
        self.per_inch = end / self.inches
        axes.set_xlim(0, end)

    def draw(self, name: str) -> None:
        if name:
            self._name(name)
        for row, (rank, steps) in enumerate(zip(self.run.ranks, self.run.steps, strict=True)):
            middle = self.lanes_top + (row + 0.5) * self.lane
            self.axes.text(
                -0.1 * self.per_inch, middle, f"rank {rank}", size=10.5, ha="right", va="center"
            )
            self.axes.axhline(middle, color=FAINT, lw=0.5, zorder=0)
            for start, step in steps:
                self._bar(start, step, middle)
        self._layers()
        self._codes()

    def _name(self, name: str) -> None:
        """The variant, and what its run comes to."""
        collectives = sum(step.kind == "collective" for _, step in self.run.steps[0])
        self.axes.plot(
            -0.8 * self.per_inch,
            0.2,
            marker="s",
            markersize=9,
            color=COLOURS.get(name, INK),
            clip_on=False,
        )
        self.axes.text(-0.66 * self.per_inch, 0.2, name, size=11.5, weight="bold", va="center")
        self.axes.text(
            self.inches * self.per_inch,
            0.2,
            f"{collectives} collectives",
            size=10.5,
            ha="right",
            va="center",
        )

    def _bar(self, start: float, step: Entry, middle: float) -> None:
        collective = step.kind == "collective"
        self.axes.barh(
            middle,
            step.seconds * self.scale,
            left=start * self.scale,
            height=self.lane * (0.78 if collective else 0.56),
            zorder=3 if collective else 2,
            **look_of(step.op),
        )

    def _layers(self) -> None:
        """Where each layer begins and ends on the first lane, and its number if it fits."""
        y = self.lanes_top - _LEADER - _CODES - _LAYERS / 2
        for layer, group in groupby(self.run.steps[0], key=lambda pair: pair[1].layer):
            pairs = list(group)
            begin = pairs[0][0] * self.scale
            end = (pairs[-1][0] + pairs[-1][1].seconds) * self.scale
            if layer is None:
                continue
            self.axes.plot((begin, begin), (y, self.height), color=FAINT, lw=0.7, ls=":", zorder=1)
            inset = min(0.03 * self.per_inch, (end - begin) / 4)
            self.axes.plot(
                (begin + inset, end - inset), (y + 0.1, y + 0.1), color=FAINT, lw=2, zorder=1
            )
            text = self.axes.text(
                (begin + end) / 2, y - 0.02, "", size=10, ha="center", va="center"
            )
            for words in (f"layer {layer}", str(layer), ""):
                text.set_text(words)
                if text_width(text) + 0.06 <= (end - begin) / self.per_inch:
                    break

    def _codes(self) -> None:
        """Over the first lane the name of every collective, moved apart where they are near."""
        bars = [(start, step) for start, step in self.run.steps[0] if step.kind == "collective"]
        if not bars:
            return
        y = self.lanes_top - _LEADER - _CODES / 2
        texts = [
            self.axes.text(0, y, f"{step.op} {step.site}", size=10, ha="center", va="center")
            for _, step in bars
        ]
        widths = [text_width(text) + 0.15 for text in texts]
        if sum(widths) > self.inches:  # the full names do not fit
            for text, (_, step) in zip(texts, bars, strict=True):
                text.set(text=CODES.get(step.op, step.op), weight="bold")
            widths = [text_width(text) + 0.08 for text in texts]
        if sum(widths) > self.inches:
            raise ConfigError(
                f"{len(bars)} collectives do not fit on one time axis: draw fewer layers, "
                "layers=range(3)"
            )
        middles = [(start + step.seconds / 2) * self.scale / self.per_inch for start, step in bars]
        for text, middle, x in zip(
            texts, middles, spread(middles, widths, self.inches), strict=True
        ):
            text.set_x(x * self.per_inch)
            self.axes.plot(
                (x * self.per_inch, middle * self.per_inch),
                (y + _CODES / 2, self.lanes_top + 0.02),
                color=FAINT,
                lw=0.8,
                zorder=1,
            )
