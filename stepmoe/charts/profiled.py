"""A profile as a picture: one lane a rank, compute and collectives, from torch.profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepmoe.charts.style import (
    FAINT,
    LEGEND_COLUMNS,
    in_order,
    inch_axes,
    look_of,
    new_figure,
    step_legend,
    style,
    time_axis,
)
from stepmoe.measure.report import provenance, unit_for

if TYPE_CHECKING:
    import pandas as pd

    from stepmoe.measure import Profile

# Inches.
_WIDTH, _LEFT, _RIGHT, _LANE, _AXIS, _LEGEND_ROW = 10.0, 0.95, 0.25, 0.55, 0.62, 0.28


def profile_timeline(profile: Profile, title: str | None = None) -> Figure:
    """Draw what `measure.profile` recorded on one clock.

    In each lane a collective is a high bar. Below it a low bar is a step of the ledger, and the
    bars standing on it are the torch operations (on a GPU: the kernels) that ran in it. What stays
    empty between them is the interpreter, the profiler itself and the launching of kernels.

    Args:
        profile: what `measure.profile` returned.
        title: above the picture.
    """
    events = profile.events
    ops = in_order(set(events.loc[events["kind"] != "op", "op"]))
    ranks = sorted(events["rank"].unique())
    legend = _LEGEND_ROW * -(-len(ops) // LEGEND_COLUMNS)
    head = 0.5 if title else 0.1
    end = (events["start"] + events["seconds"]).max()
    factor, unit = unit_for([end])
    with style():
        height = head + _LANE * len(ranks) + _AXIS + legend + 0.1
        figure = new_figure(_WIDTH, height)
        if title:
            figure.suptitle(title, weight="bold", size=13.5, y=1 - 0.25 / height)
        axes = inch_axes(figure, _LEFT, head, _WIDTH - _LEFT - _RIGHT, _LANE * len(ranks))
        axes.set_xlim(0, end * factor)
        for lane, rank in enumerate(ranks):
            _lane(axes, events[events["rank"] == rank], lane * _LANE, factor)
            axes.text(
                -0.01,
                (lane + 0.5) * _LANE,
                f"rank {rank}",
                size=10.5,
                ha="right",
                va="center",
                transform=axes.get_yaxis_transform(),
            )
        where = provenance(profile.attrs)
        time_axis(axes, f"{unit} of {profile.attrs['variant']}, profiled  ({where})")
        step_legend(figure, ops)
    return figure


def _lane(axes: Axes, events: pd.DataFrame, top: float, factor: float) -> None:
    """One rank: y in inches from the top, and the height, of each kind of bar."""
    places = {"collective": (0.06, 0.43), "op": (0.16, 0.23), "step": (0.39, 0.10)}
    axes.axhline(top + _LANE, color=FAINT, lw=0.5, zorder=0)
    for (kind, op), group in events.groupby(["kind", "op"]):
        down, height = places[kind]
        look = look_of(op)
        if kind == "op":  # too narrow for an outline
            look = {"facecolor": look["facecolor"], "linewidth": 0}
        axes.barh(
            [top + down + height / 2] * len(group),
            group["seconds"] * factor,
            left=group["start"] * factor,
            height=height,
            zorder=3 if kind == "collective" else 2,
            **look,
        )
