"""Marks of a data-flow diagram: boxes, bars, arrows that carry a tensor and its placement.

Coordinates are inches, y downwards, as `style.inch_axes` sets them up.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from stepmoe.charts.flow import Node, Value
from stepmoe.charts.style import (
    COLOURS,
    HATCHES,
    INK,
    OTHER,
    PAPER,
    PLACEMENTS,
    name_of,
    readable_bytes,
)
from stepmoe.comm.ledger import Entry

TALL, LOW = 0.46, 0.26  # heights of a box and of a sum
BOX, BAR, BRANCH_BAR = 2.5, 5.4, 2.6  # widths; a branch's bar has half the room
_CAP = 0.24  # the hatched end of a bar
_OFFSET = 0.16  # from a line to its label

Point = tuple[float, float]


class Pen:
    """Draws on one Axes."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes

    def operation(self, node: Node, x: float, y: float, bar: float) -> None:
        """A collective as a bar of width `bar`, anything else as a box; middle at x, top at y."""
        entry = node.entry
        if entry is not None and entry.kind == "collective":
            self.bar(entry, x - bar / 2, bar, y)
            return
        pad = 0.08
        box = FancyBboxPatch(
            (x - BOX / 2 + pad, y + pad),
            BOX - 2 * pad,
            TALL - 2 * pad,
            boxstyle=f"round,pad={pad}",
            facecolor=COLOURS.get(node.op, OTHER),
            edgecolor=INK,
            linewidth=1.1,
            zorder=3,
        )
        self.axes.add_patch(box)
        if entry is None:
            self._two_lines(node.op.replace("_", " "), "nothing is sent", x, y)
        else:
            self._two_lines(name_of(node.op), entry.site, x, y)

    def bar(self, entry: Entry, left: float, width: float, y: float) -> None:
        """A collective: hatched ends, its name, and what each rank sends."""
        colour = COLOURS.get(entry.op, INK)
        frame = Rectangle(
            (left, y), width, TALL, facecolor=PAPER, edgecolor=colour, lw=2.4, zorder=3
        )
        self.axes.add_patch(frame)
        for x in (left, left + width - _CAP):
            cap = Rectangle(
                (x, y),
                _CAP,
                TALL,
                facecolor=colour,
                edgecolor=PAPER,
                hatch=HATCHES.get(entry.op),
                lw=0,
                zorder=3.1,
            )
            self.axes.add_patch(cap)
        sends = f"each rank sends {readable_bytes(entry.bytes_sent)}"
        if width >= BAR:
            sends = f"{entry.site}: {entry.group_size} ranks, {sends}"
        self._two_lines(entry.op, sends, left + width / 2, y)

    def plus(self, x: float, y: float) -> None:
        """A sum, its middle at (x, y)."""
        circle = Circle((x, y), LOW / 2, facecolor=COLOURS["add"], edgecolor=INK, lw=1.1, zorder=4)
        self.axes.add_patch(circle)
        self.axes.plot(x, y, marker="+", markersize=9, markeredgewidth=2, color=INK, zorder=5)

    def dot(self, x: float, y: float) -> None:
        """Where a line goes on and is read as well."""
        self.axes.add_patch(Circle((x, y), 0.05, color=INK, zorder=4))

    def line(self, points: list[Point], placement: str) -> None:
        """A line in a placement's colour and dashes."""
        dashes, _, _ = PLACEMENTS[placement]
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=COLOURS[placement], lw=2, ls=dashes, zorder=2)

    def point(self, begin: Point, end: Point, placement: str) -> None:
        """A line that ends in an arrow head."""
        self.line([begin, end], placement)
        head = {
            "arrowstyle": "-|>,head_width=0.28,head_length=0.5",
            "color": COLOURS[placement],
            "lw": 0,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 14,
        }
        self.axes.annotate("", end, begin, arrowprops=head, zorder=2.5)

    def arrow(self, x: float, top: float, bottom: float, value: Value) -> None:
        """Down from one operation to the next, with what it carries."""
        self.label(x, (top + bottom) / 2, value)
        self.point((x, top), (x, bottom), value.placement)

    def label(self, x: float, y: float, value: Value, left: bool = False) -> None:
        """Beside a line: a tensor's name over its placement; on the line the placement's marker."""
        self.marker(x, y, value.placement)
        self.words(x, y, value, left)

    def words(self, x: float, y: float, value: Value, left: bool = False) -> None:
        """A tensor's name over its placement, beside a line at x."""
        x, align = (x - _OFFSET, "right") if left else (x + _OFFSET, "left")
        self.axes.text(x, y - 0.09, value.name, size=10, va="center", ha=align, zorder=5)
        self.axes.text(
            x,
            y + 0.09,
            value.placement,
            size=9.5,
            weight="bold",
            color=COLOURS[value.placement],
            va="center",
            ha=align,
            zorder=5,
        )

    def marker(self, x: float, y: float, placement: str) -> None:
        """A filled square, a partly filled one, or a plus: whole, a part, to be summed."""
        _, marker, fill = PLACEMENTS[placement]
        self.axes.plot(
            x,
            y,
            marker=marker,
            fillstyle=fill,
            markersize=10,
            color=COLOURS[placement],
            markerfacecoloralt=PAPER,
            zorder=4,
        )

    def _two_lines(self, first: str, second: str, x: float, y: float) -> None:
        """Centred in a box whose top is y; the second line may be empty."""
        middle = y + TALL / 2
        at = middle - 0.09 if second else middle
        self.axes.text(x, at, first, size=11, weight="bold", ha="center", va="center", zorder=5)
        if second:
            self.axes.text(x, middle + 0.1, second, size=9.5, ha="center", va="center", zorder=5)
