"""How many collectives a variant needs, and how much each rank sends in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepmoe.charts.style import (
    COLOURS,
    FAINT,
    INK,
    bytes_in_one_unit,
    in_order,
    legend_patches,
    look_of,
    new_figure,
    style,
)
from stepmoe.comm.ledger import Entry, Ledger
from stepmoe.errors import ConfigError

# Inches.
_WIDTH, _LEFT, _PANEL, _ROW = 10.0, 2.0, 3.55, 0.46
_TITLE, _HEADS, _LEGEND = 0.42, 0.62, 0.6


def collectives(by_variant: Mapping[str, Ledger], title: str | None = None) -> Figure:
    """Draw counts and bytes of one MoE layer, variant by variant; the whole pass in numbers beside.

    A bar is one MoE layer, cut by kind of collective. Bytes are the fewest that one rank must
    send (`Entry.bytes_sent`).

    Args:
        by_variant: a name, best one of sm.VARIANTS, to one rank's ledger of one model call.
        title: above the picture.

    Raises:
        ConfigError: no variant; a ledger without collectives or MoE layer, or of several passes.
    """
    if not by_variant:
        raise ConfigError("no variant to draw: give {'deferred': ledger, ...}")
    layers = {name: _moe_layer(ledger, name) for name, ledger in by_variant.items()}
    head = _TITLE if title else 0.12
    height = head + _HEADS + _ROW * len(by_variant) + _LEGEND
    ops = in_order({entry.op for ledger in by_variant.values() for entry in ledger.entries})
    with style():
        figure = new_figure(_WIDTH, height)
        if title:
            figure.suptitle(title, weight="bold", size=13.5, y=1 - 0.25 / height)
        for column, (heading, size, words) in enumerate(
            (
                ("collectives", lambda entry: 1.0, lambda totals: [f"{x:.0f}" for x in totals]),
                ("sent by each rank", lambda entry: entry.bytes_sent, bytes_in_one_unit),
            )
        ):
            left = _LEFT + column * (_PANEL + 0.55)
            axes = figure.add_axes(
                (
                    left / _WIDTH,
                    _LEGEND / height,
                    _PANEL / _WIDTH,
                    _ROW * len(by_variant) / height,
                )
            )
            _panel(axes, by_variant, layers, heading, size, words)
            if column == 0:
                _names(axes, list(by_variant))
        figure.legend(
            handles=legend_patches(ops),
            loc="lower center",
            ncols=len(ops),
            frameon=False,
            handlelength=2.4,
            handleheight=1.2,
        )
    return figure


def _moe_layer(ledger: Ledger, name: str) -> int:
    """The first layer with experts."""
    if not ledger.entries:
        raise ConfigError(
            f"the ledger of {name} holds no collective: record it around a model call on at least "
            "two ranks, `with sm.Ledger() as ledger: model(input_ids)`"
        )
    moe = (step.layer for step in ledger.steps if step.op == "experts")
    layers = [layer for layer in moe if layer is not None]
    if not layers:
        raise ConfigError(f"the ledger of {name} holds no MoE layer: record it around a model call")
    if layers.count(layers[0]) > 1:
        raise ConfigError(
            f"the ledger of {name} holds {layers.count(layers[0])} forward passes, which would be "
            "counted together: record it around one model call"
        )
    return layers[0]


def _panel(
    axes: Axes,
    by_variant: Mapping[str, Ledger],
    layers: Mapping[str, int],
    heading: str,
    size: Callable[[Entry], float],
    words: Callable[[Sequence[float]], list[str]],
) -> None:
    """Bars of one MoE layer with their totals; the whole pass as a column of numbers."""
    totals = []
    for row, (name, ledger) in enumerate(by_variant.items()):
        entries, begin = ledger.of_layer(layers[name]), 0.0
        for op in in_order({entry.op for entry in entries}):
            length = sum(size(entry) for entry in entries if entry.op == op)
            axes.barh(row, length, left=begin, height=0.6, **look_of(op))
            begin += length
        totals.append(begin)
    room = max(totals) or 1.0  # bars take half of the panel, numbers the rest
    axes.set(xlim=(0, room / 0.5), ylim=(len(by_variant) - 0.5, -0.5), yticks=[], xticks=[])
    axes.spines["bottom"].set_visible(False)
    wholes = [sum(map(size, ledger.entries)) for ledger in by_variant.values()]
    for row, (total, text) in enumerate(zip(totals, words(totals), strict=True)):
        axes.text(total + room * 0.03, row, text, weight="bold", va="center")
    for row, text in enumerate(words(wholes)):
        axes.text(room / 0.5, row, text, va="center", ha="right")
    held = set(layers.values())
    layer = f" (layer {held.pop()})" if len(held) == 1 else ""
    for x, inches, text, look in (
        (0.0, 0.34, heading, {"weight": "bold", "size": 12}),
        (0.0, 0.06, f"a MoE layer{layer}", {"size": 10.5}),
        (1.0, 0.06, "whole pass", {"size": 10.5, "ha": "right"}),
    ):
        above = 1 + inches / (_ROW * len(by_variant))
        axes.text(x, above, text, transform=axes.transAxes, va="bottom", **look)


def _names(axes: Axes, names: list[str]) -> None:
    for y, name in enumerate(names):
        axes.plot(
            -0.03,
            y,
            marker="s",
            markersize=9,
            color=COLOURS.get(name.partition(",")[0], INK),  # 'reduce_scatter, attention="dp"'
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )
        axes.text(
            -0.075,
            y,
            name,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            color=INK,
        )
    axes.spines["left"].set_color(FAINT)
