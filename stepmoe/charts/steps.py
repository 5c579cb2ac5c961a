"""One decoder layer step by step: which tensors exist after an operation, and who holds what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stepmoe.charts.flow import Branches, LayerFlow, Node, Value, layer_flow
from stepmoe.charts.style import (
    CODES,
    COLOURS,
    FAINT,
    INK,
    PAPER,
    inch_axes,
    name_of,
    new_figure,
    readable_bytes,
    style,
)
from stepmoe.comm.ledger import Ledger
from stepmoe.errors import ConfigError

# Inches.
_LIST, _NAMES, _CELL, _GAP, _HEAD, _ROW, _LINE = 2.75, 1.95, 0.62, 0.2, 0.95, 0.9, 0.3
_MOST_RANKS = 8
_FUSED = "all_reduce_add_rms_norm"


@dataclass(frozen=True)
class Moment:
    """What exists once an operation is done.

    Attributes:
        node: the operation; None before the first.
        live: every tensor that a later operation reads, or that leaves the layer.
        new: those of them that the operation made.
    """

    node: Node | None
    live: tuple[Value, ...]
    new: tuple[Value, ...]


def layer_steps(ledger: Ledger, layer: int) -> list[Moment]:
    """The moments of decoder layer `layer` in the ledger's first forward pass, the first before it.

    Raises:
        ConfigError: the ledger holds no collective, or nothing of this layer.
    """
    return list(_walk(layer_flow(ledger, layer)))


def _walk(flow: LayerFlow) -> Iterator[Moment]:
    """`main` flows from operation to operation, `residual` beside it."""
    main: tuple[Value, ...] = (flow.enters,)
    residual = flow.residual
    yield Moment(None, _both(main, residual), ())
    for item in flow.items:
        if isinstance(item, Branches):
            done: tuple[Value, ...] = ()  # ends of the branches before this one
            for number, chain in enumerate(item.chains):
                waiting = main if number + 1 < len(item.chains) else ()
                for node in chain:
                    live = (*waiting, *done, node.makes)
                    yield Moment(node, _both(live, residual), (node.makes,))
                done = (*done, chain[-1].makes)
            main = done
            continue
        new: tuple[Value, ...] = (item.makes,)
        if item.op == "add":
            main, residual = (), item.makes
        elif item.op == "norm" and residual is None:  # what entered is the residual from here on
            residual = replace(flow.enters, name="residual")
            main, new = (item.makes,), (item.makes, residual)
        elif item.op == _FUSED:
            residual = Value("residual", item.makes.placement)
            main, new = (item.makes,), (item.makes, residual)
        else:
            main = (item.makes,)
        yield Moment(item, _both(main, residual), new)


def _both(main: tuple[Value, ...], residual: Value | None) -> tuple[Value, ...]:
    return main if residual is None else (*main, residual)


def steps(ledger: Ledger, layer: int, index: int, title: str | None = None) -> Figure:
    """Draw one moment of a layer: the operations on the left, the tensors on the right.

    A cell is a rank. Replicate: every rank has all of it. Shard: each has its own tokens, a band of
    the frame. Partial: every rank has an addend, and the value is the sum over the row.

    Args:
        ledger: recorded around a model call on 2 to 8 ranks.
        layer: index of the decoder layer.
        index: 0 is before the first operation, k after the k-th.
        title: above the picture; None writes one.

    Raises:
        ConfigError: as `layer_steps`; no such moment; too many ranks to draw.
    """
    moments = layer_steps(ledger, layer)
    if not 0 <= index < len(moments):
        raise ConfigError(
            f"moment {index} does not exist: layer {layer} has 0 to {len(moments) - 1}"
        )
    ranks = max(entry.group_size for entry in ledger.entries)
    if ranks > _MOST_RANKS:
        raise ConfigError(f"{ranks} ranks do not fit on a page: {_MOST_RANKS} at most")
    tallest = max(len(moment.live) for moment in moments)
    width = _LIST + _NAMES + ranks * (_CELL + _GAP) + 0.2
    height = max(_HEAD + tallest * _ROW + 0.55, _HEAD + len(moments) * _LINE + 0.1)
    with style():
        figure = new_figure(width, height)
        axes = inch_axes(figure, 0, 0, width, height)
        heading = title or f"Layer {layer}, operation {index} of {len(moments) - 1}"
        axes.text(width / 2, 0.25, heading, weight="bold", size=13.5, ha="center", va="center")
        axes.text(width / 2, 0.55, _sentence(moments[index]), size=11, ha="center", va="center")
        _operations(axes, moments, index)
        _tensors(axes, moments[index], ranks, height)
    return figure


def _sentence(moment: Moment) -> str:
    node = moment.node
    if node is None:
        return "what the layer before hands over"
    entry = node.entry
    if entry is not None and entry.kind == "collective":
        sends = (
            f"each of {entry.group_size} ranks sends at least {readable_bytes(entry.bytes_sent)}"
        )
        return f"{node.op}: {sends}"
    return f"{_words(node)}: nothing is sent"


def _words(node: Node) -> str:
    if node.op == "+":
        return "shared + routed"
    return name_of(node.op).replace("keep_own_tokens", "keep own tokens")


def _operations(axes: Axes, moments: list[Moment], index: int) -> None:
    """The list, the current one marked, what is still to come in grey."""
    for row, moment in enumerate(moments):
        y = _HEAD + (row + 0.5) * _LINE
        text = "(enters)" if moment.node is None else _words(moment.node)
        if moment.node is not None and moment.node.op == _FUSED:
            text = f"{CODES[_FUSED]}: reduce, add, norm"
        if row == index:
            mark = Rectangle((0.15, y - 0.14), _LIST - 0.35, 0.28, facecolor=INK, lw=0)
            axes.add_patch(mark)
        colour = PAPER if row == index else INK if row < index else FAINT
        weight = "bold" if row == index else "normal"
        axes.text(0.25, y, f"{row}  {text}", size=10.5, va="center", color=colour, weight=weight)


def _tensors(axes: Axes, moment: Moment, ranks: int, height: float) -> None:
    first = _LIST + _NAMES
    for rank in range(ranks):
        x = first + rank * (_CELL + _GAP) + _CELL / 2
        axes.text(x, _HEAD - 0.02, f"rank {rank}", size=10, ha="center", va="center")
    for row, value in enumerate(moment.live):
        y = _HEAD + 0.15 + row * _ROW
        colour = COLOURS[value.placement]
        weight = "bold" if value in moment.new else "normal"
        lines = value.name.replace(" + ", "\n+ ")
        axes.text(first - 0.2, y + 0.2, lines, size=10.5, ha="right", va="center", weight=weight)
        at = y + 0.52
        axes.text(first - 0.2, at, value.placement, size=10, ha="right", va="center", color=colour)
        for rank in range(ranks):
            _cell(axes, value.placement, first + rank * (_CELL + _GAP), y, rank, ranks)
    meaning = "black: all of it    green: own tokens    orange +: an addend    bold: just made"
    axes.text(first - _NAMES + 0.35, height - 0.22, meaning, size=9.5, va="center")


def _cell(axes: Axes, placement: str, x: float, y: float, rank: int, ranks: int) -> None:
    """A frame for the whole tensor, tokens downwards, filled where this rank holds it."""
    colour = COLOURS[placement]
    axes.add_patch(Rectangle((x, y), _CELL, _CELL, facecolor="#F4F4F4", edgecolor=FAINT, lw=0.8))
    if placement == "Shard":
        band = _CELL / ranks
        axes.add_patch(Rectangle((x, y + rank * band), _CELL, band, facecolor=colour, lw=0))
        return
    hatch = "////" if placement == "Partial" else None
    face = PAPER if hatch else colour
    axes.add_patch(
        Rectangle((x, y), _CELL, _CELL, facecolor=face, edgecolor=colour, hatch=hatch, lw=1.2)
    )
    if placement == "Partial" and rank + 1 < ranks:
        axes.text(
            x + _CELL + _GAP / 2,
            y + _CELL / 2,
            "+",
            size=13,
            weight="bold",
            color=colour,
            ha="center",
            va="center",
        )
