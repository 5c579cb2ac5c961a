"""Charts of measurements: frames below each other, each a grid of panels under its provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepmoe.charts.style import COLOURS, INK, MARKERS, new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.measure.report import provenance
from stepmoe.measure.store import check_frame

if TYPE_CHECKING:
    import pandas as pd

# Inches.
WIDTH, NAMES, ROW, HEAD, AXIS = 10.0, 1.75, 0.28, 0.34, 0.62
_TITLE, _PROVENANCE = 0.45, 0.36

_OWN_MARKERS = "vPX*"  # for variants that are not sm.VARIANTS


@dataclass
class Grid:
    """A figure under way: panels side by side, and how far down it is filled, in inches."""

    figure: Figure
    y: float

    def axes(self, left: float, width: float, height: float) -> Axes:
        total_width, total_height = self.figure.get_size_inches()
        bottom = 1 - (self.y + height) / total_height
        box = (left / total_width, bottom, width / total_width, height / total_height)
        return self.figure.add_axes(box)

    def text(self, left: float, words: str, **look: Any) -> None:
        total_width, total_height = self.figure.get_size_inches()
        x, y = left / total_width, 1 - (self.y + 0.16) / total_height
        self.figure.text(x, y, words, va="center", **{"size": 10, **look})

    def legend(self, left: float, handles: list[Artist]) -> None:
        total_width, total_height = self.figure.get_size_inches()
        self.figure.legend(
            handles=handles,
            loc="center left",
            bbox_to_anchor=(left / total_width, 1 - (self.y + 0.16) / total_height),
            ncols=len(handles),
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.6,
            columnspacing=1.2,
        )


def figure_of(
    frames: Sequence[pd.DataFrame],
    title: str | None,
    height: Callable[[pd.DataFrame], float],
    draw: Callable[[Grid, pd.DataFrame], None],
) -> Figure:
    if not frames:
        raise ConfigError("no frame to draw: give what measure.compare_latency or load returned")
    top = _TITLE if title else 0.05
    with style():
        total = sum(height(check_frame(frame)) + _PROVENANCE for frame in frames)
        figure = new_figure(WIDTH, top + total + 0.05)
        if title:
            figure.suptitle(title, weight="bold", size=13.5, y=1 - 0.25 / figure.get_figheight())
        grid = Grid(figure, top)
        for frame in frames:
            grid.text(0.1, provenance(frame.attrs), size=10.5, style="italic")
            grid.y += _PROVENANCE
            draw(grid, frame)
    return figure


def by_tokens(frame: pd.DataFrame) -> list[list[list[dict[str, Any]]]]:
    """Rows of panels: one a number of tokens, in it one a phase, in it the variants' rows."""
    return [
        [cell.to_dict("records") for _, cell in same.groupby("phase", sort=False)]
        for _, same in frame.groupby("tokens")
    ]


def height_of(cells: list[list[dict[str, Any]]]) -> float:
    return ROW * max(map(len, cells))


def look_of_variant(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a variant; `names` are all those in the picture."""
    own = [other for other in names if other not in MARKERS]
    marker = MARKERS.get(name) or _OWN_MARKERS[own.index(name) % len(_OWN_MARKERS)]
    return {"color": COLOURS.get(name, INK), "marker": marker}


def name_rows(axes: Axes, cell: list[dict[str, Any]], *, named: bool) -> None:
    """A row a variant, the first on top, with its name and mark on the left."""
    axes.set_ylim(len(cell) - 0.5, -0.5)
    names = [row["variant"] for row in cell]
    axes.set_yticks(range(len(cell)), names if named else [""] * len(cell))
    axes.tick_params("y", length=0, pad=16 if named else 0)
    axes.spines["left"].set_visible(False)
    for place, name in enumerate(names if named else ()):
        look = look_of_variant(name, names)
        axes.plot(
            -0.09 / inches_wide(axes),
            place,
            transform=axes.get_yaxis_transform(),
            ls="",
            ms=6.5,
            clip_on=False,
            **look,
        )


def inches_wide(axes: Axes) -> float:
    """Width of Axes on the page."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return float(axes.get_position().width * figure.get_figwidth())
