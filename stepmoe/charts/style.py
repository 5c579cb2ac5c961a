"""How the pictures look: one colour for one thing in every chart, and never colour alone.

The colours are those of Okabe and Ito ("Color Universal Design", 2008) and greys, which people with
any of the common colour deficiencies can tell apart; hatches, markers and lines repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text

INK = "#222222"
FAINT = "#8A8A8A"
PAPER = "#FFFFFF"

# The variant and the collective that makes it special share a colour.
COLOURS = {
    "three_all_reduces": "#D55E00",
    "deferred": "#4D4D4D",
    "fused": "#CC79A7",
    "reduce_scatter": "#009E73",  # the variant and the collective
    "all_reduce": "#D55E00",
    "all_gather": "#0072B2",
    "all_reduce_add_rms_norm": "#CC79A7",
    "attention": "#56B4E9",
    "mlp": "#F0E442",
    "experts": "#F0E442",
    "share_expert": "#E69F00",
    "norm": "#C9C9C9",
    "add": "#C9C9C9",
    "Replicate": "#222222",
    "Shard": "#009E73",
    "Partial": "#D55E00",
}
OTHER = "#FFFFFF"  # a step of someone's own variant; it is named wherever it is drawn
# For lines that are no variant's: these colours mean none, and the markers repeat them.
SERIES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o"},
    {"color": "#E69F00", "marker": "s"},
    {"color": "#56B4E9", "marker": "^"},
    {"color": INK, "marker": "D"},
)

# Repeats the colour of a step: white lines on a collective, dark marks on local work.
HATCHES = {
    "all_reduce": "///",
    "reduce_scatter": "\\\\\\",
    "all_gather": "---",
    "all_reduce_add_rms_norm": "xxx",
    "experts": "..",
    "share_expert": "oo",
    "add": "||",
}
# For curves, one a variant.
MARKERS = {"three_all_reduces": "o", "deferred": "s", "fused": "^", "reduce_scatter": "D"}
# A placement's line, marker and how much of the marker is filled: whole, a part, a sum to be made.
PLACEMENTS = {
    "Replicate": ("-", "s", "full"),
    "Shard": ((0, (4, 1.5)), "s", "bottom"),
    "Partial": ((0, (1, 1)), "P", "full"),
}
# What a collective is called where its name does not fit.
CODES = {
    "all_reduce": "AR",
    "reduce_scatter": "RS",
    "all_gather": "AG",
    "all_reduce_add_rms_norm": "ARN",
}
NAMES = {"experts": "routed experts", "share_expert": "shared expert", "mlp": "dense MLP"}

LEGEND_COLUMNS = 4
_UNITS = ("B", "KiB", "MiB", "GiB")

_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same everywhere
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 11,
    "legend.fontsize": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "axes.prop_cycle": cycler(color=[look["color"] for look in SERIES]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.8,
    # Opaque, so that dark text stays on light ground on a dark page.
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "figure.dpi": 100,
}


def style() -> AbstractContextManager[None]:
    """The look of stepmoe's charts, for one's own plots: `with charts.style(): plt.plot(...)`."""
    return mpl.rc_context(_SETTINGS)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that a notebook shows once: where it is a cell's result.

    pyplot makes it, because that is what loads a notebook's image formatter; closing it keeps it
    from being shown a second time at the end of the cell.
    """
    figure = plt.figure(figsize=(width, height))
    plt.close(figure)
    return figure


def inch_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes whose data coordinates are inches from their own upper left corner, y downwards."""
    total_width, total_height = figure.get_size_inches()
    axes = figure.add_axes(
        (
            left / total_width,
            1 - (top + height) / total_height,
            width / total_width,
            height / total_height,
        )
    )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def text_width(text: Text) -> float:
    """Width of a text as it will be drawn, in inches."""
    figure = text.get_figure(root=True)
    assert figure is not None
    return text.get_window_extent().width / figure.dpi


def label_end(axes: Axes, x: float, y: float, words: str) -> None:
    """Words to the right of the end of a bar or line, in data coordinates."""
    axes.annotate(words, (x, y), (4, 0), textcoords="offset points", size=10, va="center")


def name_of(op: str) -> str:
    """A step's name in words."""
    return NAMES.get(op, op)


def look_of(op: str) -> dict[str, Any]:
    """Colour, hatch and outline of a step, as matplotlib's patches take them."""
    look = {"facecolor": COLOURS.get(op, OTHER), "hatch": HATCHES.get(op)}
    if op in CODES:
        return {**look, "edgecolor": PAPER, "linewidth": 0.0}
    return {**look, "edgecolor": INK, "linewidth": 0.5}


def legend_patches(ops: list[str]) -> list[Artist]:
    """One legend entry a step, with its colour, hatch and, for a collective, its short code."""
    return [
        Patch(
            **look_of(op),
            label=f"{CODES[op]} = {op}" if op in CODES else name_of(op),
        )
        for op in ops
    ]


def step_legend(figure: Figure, ops: list[str]) -> None:
    """The steps that occur, in LEGEND_COLUMNS columns at the foot of the figure."""
    figure.legend(
        handles=legend_patches(ops),
        loc="lower center",
        ncols=LEGEND_COLUMNS,
        frameon=False,
        borderpad=0,
        borderaxespad=0.4,
        handlelength=2.4,
        handleheight=1.2,
    )


def time_axis(axes: Axes, label: str) -> None:
    """Show the time axis below the lowest lanes."""
    axes.axis("on")
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_visible(False)
    axes.set_xlabel(label)


def in_order(ops: set[str]) -> list[str]:
    """Collectives, then local work, each in a fixed order; unknown steps behind."""
    known = [op for op in dict.fromkeys((*CODES, *COLOURS)) if op in ops]
    return known + sorted(ops.difference(known))


def readable_bytes(size: float) -> str:
    """A size in bytes with a binary unit: 73,728 is "72.0 KiB", 147,456 "144 KiB"."""
    return bytes_in_one_unit([size])[0]


def bytes_in_one_unit(sizes: Sequence[float]) -> list[str]:
    """Sizes to compare, in the unit of the smallest: "1,512 KiB" beside "792 KiB"."""
    power = 0
    while min(sizes) >= 1024 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    numbers = [size / 1024**power for size in sizes]
    whole = power == 0 or min(numbers) >= 100
    return [f"{number:,.{0 if whole else 1}f} {_UNITS[power]}" for number in numbers]
