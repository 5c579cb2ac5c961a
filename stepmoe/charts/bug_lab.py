"""Pictures of the bug lab: what a fault does to a value and to answers, and who catches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from stepmoe.charts.style import FAINT, INK, PAPER, new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.measure.distance import relative_error
from stepmoe.measure.report import provenance

if TYPE_CHECKING:
    import pandas as pd

# No variant's colours; the mark repeats them.
_RANKS = (("#0072B2", "o"), ("#E69F00", "^"), ("#56B4E9", "s"), (FAINT, "D"))
_PUBLISHED = _FIRST = "#E69F00"
_POINTS = 120  # of each rank: more hide each other
_COLUMNS = 4


@dataclass(frozen=True)
class Signature:
    """One panel.

    Attributes:
        title: name of the fault.
        value: which value is shown, "mlp_output of layer 1".
        right: what it should be, any shape; None where no value came (the ranks hung).
        arrived: what it is on each rank shown: rank to a tensor of that shape.
    """

    title: str
    value: str
    right: Tensor | None
    arrived: Mapping[int, Tensor]


def signatures(panels: Sequence[Signature], title: str | None = None) -> Figure:
    """What arrived against what should have, a panel a fault, a point a number.

    On the dashed line a number is right; a steeper line is a sum counted several times, a cloud
    one that lacks addends or has foreign ones.

    Raises:
        ConfigError: no panel.
    """
    if not panels:
        raise ConfigError("no panel to draw: give at least one Signature")
    rows = -(-len(panels) // _COLUMNS)
    with style():
        figure = new_figure(10.5, 2.75 * rows + 0.75)
        grid = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            _signature(axes, panel)
        for axes in grid[len(panels) :]:
            axes.axis("off")
        ranks = sorted({rank for panel in panels for rank in panel.arrived})
        handles = [_mark(None, "the same on all"), *(_mark(r, f"rank {r}") for r in ranks)]
        handles.append(Line2D([], [], color=INK, ls="--", lw=1, label="right"))
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
        figure.supylabel("what arrived", size=11)
        figure.suptitle(
            title or "What arrived against what should have (horizontal)", weight="bold", size=13.5
        )
        figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _signature(axes: Axes, panel: Signature) -> None:
    axes.set_title(panel.title, size=9.5, loc="left")
    axes.set_xlabel(panel.value, size=9.5)
    axes.tick_params(labelsize=9)
    if panel.right is None:
        axes.text(0.5, 0.5, "nothing arrived", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    right = panel.right.double().flatten()
    chosen = torch.linspace(0, len(right) - 1, min(_POINTS, len(right))).long()
    x = right[chosen]
    ends = [float(x.min()), float(x.max())]
    axes.plot(ends, ends, "--", color=INK, lw=1)
    for rank, value in _told_apart(panel).items():
        colour, marker = _look(rank)
        y = value.double().flatten()[chosen]
        axes.plot(x, y, marker, ms=3.2, mfc=colour, mec=PAPER, mew=0.2, alpha=0.85)
    errors = [relative_error(value, panel.right) for value in panel.arrived.values()]
    words = f"off by {max(errors):.2g}" if max(errors) > 1e-4 else "right"
    axes.text(0.03, 0.97, words, va="top", transform=axes.transAxes, size=9.5)


def _told_apart(panel: Signature) -> dict[int | None, Tensor]:
    """By rank; None stands for all, where they hold the same."""
    values = list(panel.arrived.values())
    if all(torch.equal(value, values[0]) for value in values):
        return {None: values[0]}
    return {rank: value for rank, value in panel.arrived.items()}


def _look(rank: int | None) -> tuple[str, str]:
    return (INK, "o") if rank is None else _RANKS[rank % len(_RANKS)]


def _mark(rank: int | None, label: str) -> Line2D:
    colour, marker = _look(rank)
    return Line2D([], [], color=colour, marker=marker, ls="", ms=5, label=label)


def guard_matrix(
    fired: Mapping[str, set[str]], guards: Sequence[str], first: Mapping[str, str]
) -> Figure:
    """Which guard finds which fault: a filled square, with a ring where all guards are on.

    Args:
        fired: fault to the guards that found it, each for itself.
        guards: the columns, from left to right.
        first: fault to the guard that stops it when all are on.

    Raises:
        ConfigError: no fault, or a guard that has no column.
    """
    unknown = set().union(*fired.values(), first.values()) - set(guards)
    if not fired or unknown:
        raise ConfigError(f"{len(fired)} faults, guards without a column: {sorted(unknown)}")
    faults = list(fired)
    with style():
        figure = new_figure(8.0, 0.36 * len(faults) + 1.3)
        axes = figure.subplots()
        for row, fault in enumerate(faults):
            for column, guard in enumerate(guards):
                found = guard in fired[fault]
                size, colour = (11, INK) if found else (3, FAINT)
                axes.plot(column, row, "s" if found else ".", color=colour, ms=size)
                if first.get(fault) == guard:
                    axes.plot(column, row, "o", ms=20, mfc="none", mec=_FIRST, mew=1.8)
        axes.set_yticks(range(len(faults)), faults)
        axes.set_xticks(range(len(guards)), guards)
        axes.set(xlim=(-0.6, len(guards) - 0.4), ylim=(len(faults) - 0.4, -0.6))
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        handles = [
            Line2D([], [], color=INK, marker="s", ls="", ms=9, label="finds it"),
            Line2D([], [], color=_FIRST, marker="o", mfc="none", ls="", ms=12, label="first"),
        ]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        figure.tight_layout()
    return figure


def accuracy_under_faults(
    frame: pd.DataFrame, published: Mapping[str, tuple[float, float | None]] | None = None
) -> Figure:
    """Accuracy with each fault in the model, with Wilson's interval, beside published figures.

    Args:
        frame: what `faults.answers.accuracy_under` returned; the row "none" is the line to compare
            with.
        published: fault to (accuracy with it, accuracy without it or None), of other models.

    Raises:
        ConfigError: the frame has no row.
    """
    if not len(frame):
        raise ConfigError("the frame has no row: leave some in")
    published = published or {}
    rows = frame.sort_values("accuracy", ascending=False, kind="stable").reset_index(drop=True)
    with style():
        figure = new_figure(9.5, 0.38 * len(rows) + 1.9)
        axes = figure.subplots()
        for y, row in rows.iterrows():
            reach = [[row.accuracy - row.low], [row.high - row.accuracy]]
            axes.errorbar(row.accuracy, y, xerr=reach, fmt="o", color=INK, ms=6, capsize=3, lw=1.4)
            if row.fault in published:
                _published(axes, float(y) + 0.28, *published[row.fault])
        right = rows[rows.fault == "none"]
        if len(right):
            axes.axvline(right.accuracy.iloc[0], color=FAINT, ls=":", lw=1.2, zorder=0)
        axes.set_yticks(range(len(rows)), ["no fault" if f == "none" else f for f in rows.fault])
        axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.3, -0.7))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("share of right answers")
        axes.set_title("Accuracy with a fault in the model, the check off", loc="left", pad=22)
        axes.text(
            0, 1.02, provenance(frame.attrs), transform=axes.transAxes, size=9.5, style="italic"
        )
        handles = [
            Line2D([], [], color=INK, marker="o", ls="", label="mini model, 95 % interval"),
            Line2D(
                [], [], color=_PUBLISHED, marker="D", mfc="none", ls="-", label="published, GSM8K"
            ),
        ]
        figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def _published(axes: Axes, y: float, wrong: float, right: float | None) -> None:
    """A hollow diamond where it fell to, a line from where it fell."""
    axes.plot(wrong, y, "D", color=_PUBLISHED, mfc="none", ms=6)
    if right is not None:
        arrow = {"arrowstyle": "->", "color": _PUBLISHED, "lw": 1.1, "shrinkA": 0, "shrinkB": 4}
        axes.annotate("", xy=(wrong, y), xytext=(right, y), arrowprops=arrow)
