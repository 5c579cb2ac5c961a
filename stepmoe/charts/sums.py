"""Which ranks each sum of a decoder layer must span."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stepmoe.charts.style import COLOURS, FAINT, HATCHES, INK, inch_axes, new_figure, style
from stepmoe.config import Step3p5Config
from stepmoe.parallel import ParallelConfig

# Inches; the columns are those of charts.layout, under which this stands.
_LEFT, _RIGHT, _HEAD, _ROW, _CELL, _FOOT = 1.75, 0.15, 0.5, 0.5, 0.26, 0.1


@dataclass(frozen=True)
class Sum:
    """One partial output of a layer.

    Attributes:
        name: of the sub-layer that leaves it.
        op: whose colour it has.
        groups: the ranks that must be summed together; empty where each rank's output is whole.
        why: in a few words.
    """

    name: str
    op: str
    groups: tuple[tuple[int, ...], ...]
    why: str


def layer_sums(config: Step3p5Config, parallel: ParallelConfig, layer: int) -> list[Sum]:
    """Every sum of one decoder layer and the ranks it spans, as the variants compute it.

    Raises:
        ConfigError: the shape cannot be cut this way, or no such layer.
    """
    parallel.check(config)
    every = (tuple(range(parallel.tp)),) if parallel.tp > 1 else ()
    alone = "one rank holds everything"
    if parallel.tp == 1:
        attention = Sum("attention", "attention", (), alone)
    elif parallel.attention == "dp":
        attention = Sum("attention", "attention", (), "each rank has all heads for its own tokens")
    else:
        attention = Sum("attention", "attention", every, "the heads are cut over all ranks")
    if not config.layer(layer).is_moe:
        why = "its rows are cut over all ranks" if every else alone
        return [attention, Sum("dense MLP", "mlp", every, why)]
    routed = "a token's experts can be on any rank" if parallel.ep > 1 else "every expert is cut"
    return [
        attention,
        Sum("routed experts", "experts", every, routed if every else alone),
        Sum(
            "shared expert",
            "share_expert",
            every,
            "its rows are cut over all ranks" if every else alone,
        ),
    ]


def sums(config: Step3p5Config, parallel: ParallelConfig, layer: int) -> Figure:
    """Draw the ranks of each sum as a bar across their columns.

    Args and errors: as `layer_sums`.
    """
    rows = layer_sums(config, parallel, layer)
    column = max(1.16, 4.4 / parallel.tp)
    width = _LEFT + column * parallel.tp + _RIGHT
    height = _HEAD + _ROW * len(rows) + _FOOT
    with style():
        figure = new_figure(width, height)
        axes = inch_axes(figure, 0, 0, width, height)
        axes.text(
            width / 2,
            0.2,
            "Which ranks each sum must span",
            weight="bold",
            size=12,
            ha="center",
            va="center",
        )
        for number, row in enumerate(rows):
            y = _HEAD + number * _ROW
            axes.text(
                _LEFT - 0.15,
                y + _CELL / 2,
                row.name,
                weight="bold",
                size=11,
                ha="right",
                va="center",
            )
            middle = _LEFT + column * parallel.tp / 2
            if not row.groups:
                axes.text(
                    middle, y + _CELL / 2, f"no sum: {row.why}", size=10, ha="center", va="center"
                )
            for group in row.groups:
                x, across = _LEFT + group[0] * column + 0.07, len(group) * column - 0.14
                bar = Rectangle(
                    (x, y),
                    across,
                    _CELL,
                    facecolor=COLOURS[row.op],
                    edgecolor=INK,
                    lw=0.8,
                    hatch=HATCHES.get(row.op),
                )
                axes.add_patch(bar)
                axes.text(
                    x + across / 2,
                    y + _CELL / 2,
                    f"all {len(group)} ranks: {row.why}",
                    size=10,
                    ha="center",
                    va="center",
                    bbox={"facecolor": "#FFFFFF", "edgecolor": FAINT, "lw": 0.5, "pad": 1.5},
                )
    return figure
