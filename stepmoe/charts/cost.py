"""Pictures of the cost model against published times, and of the roofline."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from stepmoe.charts.runs import spread
from stepmoe.charts.style import (
    COLOURS,
    FAINT,
    HATCHES,
    INK,
    OTHER,
    PAPER,
    label_end,
    new_figure,
    readable_bytes,
    style,
)
from stepmoe.comm.cost import collective_time
from stepmoe.comm.cost_check import PublishedCheck
from stepmoe.errors import ConfigError
from stepmoe.roofline import Chip, SubLayer

_OPS = {  # whose colour and hatch a sub-layer has
    "attention projections": "attention",
    "attention scores": "attention",
    "routed experts": "experts",
    "shared expert": "share_expert",
    "dense MLP": "mlp",
    "norms": "norm",
    "residual adds": "add",
}


def cost_fit(check: PublishedCheck, title: str | None = None) -> Figure:
    """Draw published times, the curve fitted on some of them, and its error on each of the others.

    Args:
        check: of `stepmoe.comm.cost_check.check_on_published()`.
        title: above the picture; None writes one.
    """
    kind = "curve" if check.algorithm == "pipelined" else "line"
    with style():
        figure = new_figure(8.4, 4.9)
        axes = figure.add_axes((0.1, 0.2, 0.86, 0.66))
        figure.suptitle(
            title or f"All-reduce of 8 GPUs: published, and predicted by one fitted {kind}",
            weight="bold",
            size=13.5,
            y=0.965,
        )
        _curve(axes, check)
        _published_points(axes, check)
        _bytes_and_time(axes, check)
        axes.legend(loc="upper left", frameon=False)
    return figure


def _curve(axes: Axes, check: PublishedCheck) -> None:
    first, last = check.predictions[0].nbytes, check.predictions[-1].nbytes
    sizes = [first * (last / first) ** (i / 100) for i in range(101)]
    times = [
        collective_time("all_reduce", size, 8, check.link, check.algorithm) * 1e6 for size in sizes
    ]
    axes.plot(sizes, times, color=COLOURS["all_reduce"], lw=2.2, label=_name_of(check))


def _published_points(axes: Axes, check: PublishedCheck) -> None:
    """A dot each, full where the curve was fitted on it, else with the prediction's error."""
    for fitted, face, words in (
        (True, INK, "published, used for the fit"),
        (False, PAPER, "published, not used; error of the prediction beside it"),
    ):
        rows = [row for row in check.predictions if row.fitted == fitted]
        sizes, times = [row.nbytes for row in rows], [row.published * 1e6 for row in rows]
        axes.plot(sizes, times, "o", ms=8, mfc=face, mec=INK, mew=1.8, label=words, zorder=4)
    for row in check.predictions:
        if row.fitted:
            continue
        at, time = row.nbytes, row.published * 1e6
        axes.plot((at, at), (time, row.predicted * 1e6), color=FAINT, lw=1, zorder=1)
        axes.annotate(
            f"{row.error:+.0%}",
            (at, time),
            (0, -11),
            textcoords="offset points",
            size=10,
            ha="center",
            va="top",
        )


def _bytes_and_time(axes: Axes, check: PublishedCheck) -> None:
    """Logarithmic axes, marked at the published sizes."""
    sizes = [row.nbytes for row in check.predictions]
    axes.set(xscale="log", yscale="log", xlabel="bytes of the tensor", ylabel="µs")
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axes.set_ylim(min(row.published for row in check.predictions) * 0.55e6)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _short(size)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=99))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())


def _name_of(check: PublishedCheck) -> str:
    link = check.link
    constants = f"{link.latency * 1e6:.2g} µs a step, {link.bandwidth / 1e9:.0f} GB/s"
    return f"predicted: {constants}, {check.algorithm}"


def _short(size: float) -> str:
    return readable_bytes(size).replace(".0 ", " ")


def roofline(
    sub_layers: Sequence[SubLayer], chip: Chip, title: str | None = None, label: str = ""
) -> Figure:
    """Draw each sub-layer under the chip's roof, and the least time that follows from it.

    Left: operations a byte against operations a second; the roof is what the chip can do. Right:
    the floor of each sub-layer, with what makes it.

    Args:
        sub_layers: of `stepmoe.roofline.layer_roofline`.
        chip: one of `stepmoe.roofline.CHIPS`.
        title: above the picture; None writes one.
        label: what was computed ("prefill, 16384 tokens, tp=8").

    Raises:
        ConfigError: nothing to draw.
    """
    if not sub_layers:
        raise ConfigError("no sub-layer to draw: give what layer_roofline returns")
    with style():
        figure = new_figure(10.4, 4.6)
        figure.suptitle(
            title or "The least time each sub-layer can take", weight="bold", size=13.5, y=0.965
        )
        figure.text(
            0.5, 0.875, f"{label + '; ' if label else ''}{chip.name}", size=10.5, ha="center"
        )
        _roof(figure.add_axes((0.075, 0.155, 0.38, 0.64)), sub_layers, chip)
        _floors(figure.add_axes((0.68, 0.155, 0.16, 0.64)), sub_layers, chip)
    return figure


def _roof(axes: Axes, sub_layers: Sequence[SubLayer], chip: Chip) -> None:
    reach = [sub.intensity for sub in sub_layers]
    low, high = min(*reach, 1) / 2.5, max(*reach, chip.balance) * 3
    roof = [chip.bandwidth * low, chip.rate, chip.rate]
    axes.plot((low, chip.balance, high), [rate / 1e12 for rate in roof], color=INK, lw=2)
    heights = [min(chip.rate, chip.bandwidth * x) / 1e12 for x in reach]
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(roof[0] / 1e12 / 1.5, chip.rate / 1e12 * 6)
    axes.set(xlabel="operations a byte", ylabel="TFLOP/s at most")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    order = sorted(range(len(reach)), key=lambda i: reach[i])
    width = axes.get_window_extent().width / axes.figure.dpi
    inches = [
        axes.transAxes.inverted().transform(axes.transData.transform((x, 1)))[0] * width
        for x in reach
    ]
    places = spread([inches[i] for i in order], [0.2] * len(order), width)
    for i, place in zip(order, places, strict=True):
        colour = COLOURS.get(_OPS.get(sub_layers[i].name, ""), OTHER)
        axes.plot(reach[i], heights[i], "o", ms=9, mfc=colour, mec=INK, zorder=4)
        axes.annotate(
            str(i + 1),
            (reach[i], heights[i]),
            (place / width, 0.97),
            textcoords="axes fraction",
            weight="bold",
            size=10.5,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.8, "shrinkB": 5},
        )


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _floors(axes: Axes, sub_layers: Sequence[SubLayer], chip: Chip) -> None:
    floors = [sub.floor(chip) * 1e6 for sub in sub_layers]
    for row, (sub, floor) in enumerate(zip(sub_layers, floors, strict=True)):
        op = _OPS.get(sub.name, "")
        axes.barh(
            row,
            floor,
            height=0.62,
            facecolor=COLOURS.get(op, OTHER),
            hatch=HATCHES.get(op),
            edgecolor=INK,
            lw=0.6,
        )
        label_end(axes, floor, row, f"{_three(floor)} µs, {sub.bound(chip)}")
    names = [f"{sub.name}  {row + 1}" for row, sub in enumerate(sub_layers)]
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    axes.set(xlabel="floor, µs", xlim=(0, max(floors)), xticks=[0, float(f"{max(floors):.1g}")])
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"sum {sum(floors):,.0f} µs", size=11)
