"""Data-flow diagram of one decoder layer: what each operation reads and makes, and who holds it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from stepmoe.charts.flow import Branches, LayerFlow, Node, Value, layer_flow
from stepmoe.charts.style import (
    COLOURS,
    FAINT,
    HATCHES,
    INK,
    OTHER,
    PAPER,
    PLACEMENTS,
    inch_axes,
    name_of,
    new_figure,
    readable_bytes,
    style,
)
from stepmoe.comm.ledger import Ledger

# Inches. The residual stream runs down on the left, everything else beside it.
_WIDTH, _HEAD, _FOOT = 8.2, 0.5, 1.12
_RESIDUAL, _MAIN, _COLUMNS = 1.3, 4.45, (3.15, 6.0)
_BOX, _BAR, _BRANCH_BAR = 2.5, 5.4, 2.6
_TALL, _LOW, _GAP = 0.46, 0.26, 0.5

_MEANING = {
    "Replicate": "Replicate: whole, and equal on every rank",
    "Shard": "Shard: each rank holds its own tokens",
    "Partial": "Partial: the value is the sum of every rank's",
}


def dataflow(ledger: Ledger, layer: int, title: str | None = None) -> Figure:
    """Draw the data flow of one decoder layer, as this rank's ledger recorded it.

    Operations follow each other downwards; the residual stream is the line on the left. An arrow
    carries the name of a tensor and its placement (colour, line and marker). A collective is a wide
    bar with hatched ends. What the ledger does not name (sums of branches, cuts to a rank's own
    tokens) follows from the placements before and after. Of several forward passes in the ledger the
    first is drawn.

    Args:
        ledger: recorded around a model call on at least two ranks.
        layer: index of the decoder layer.
        title: above the picture; None writes one.

    Raises:
        ConfigError: the ledger holds no collective, or nothing of this layer.
    """
    flow = layer_flow(ledger, layer)
    with style():
        figure = new_figure(_WIDTH, _height(flow))
        axes = inch_axes(figure, 0, 0, *figure.get_size_inches())
        kind = "mixture of experts" if any(n.op == "experts" for n in flow.nodes) else "dense"
        axes.text(
            _WIDTH / 2,
            0.25,
            title or f"Decoder layer {layer} ({kind})",
            weight="bold",
            size=13.5,
            ha="center",
            va="center",
        )
        _Drawing(axes, flow).draw()
    return figure


def _height(flow: LayerFlow) -> float:
    """What `_Drawing` will use, counted from the same pieces."""
    height = _HEAD + _GAP + _FOOT
    for item in flow.items:
        if isinstance(item, Branches):
            height += _LOW + max(len(chain) for chain in item.chains) * (_TALL + _GAP)
        else:
            height += _size(item) + (_LOW if item.op == "add" else _GAP)
    return height


def _size(node: Node) -> float:
    return _LOW if node.op in ("add", "+") else _TALL


class _Drawing:
    """Keeps the pen: `y` is where the next operation begins, `residual_from` where its line does."""

    def __init__(self, axes: Axes, flow: LayerFlow) -> None:
        self.axes, self.flow = axes, flow
        self.y = _HEAD
        self.residual = flow.residual
        self.residual_from = _HEAD

    def draw(self) -> None:
        if self.flow.residual is None:  # the embedding is the residual stream's beginning
            self.residual = Value("residual", self.flow.enters.placement)
            self._label(_RESIDUAL, self.y + _GAP / 2, self.flow.enters)
            self.y += _GAP
            self.pending = None
        else:
            self.pending = self.flow.enters
            self._label_residual(self.y + _GAP / 2)
        for item in self.flow.items:
            if isinstance(item, Branches):
                self._branches(item)
            else:
                self._node(item)
        if self.pending is not None:
            self._arrow(_MAIN, self.y, self.y + _GAP, self.pending)
        self._residual_line(self.y + _GAP, arrow=True)
        self.y += _GAP
        self._legend(self.y + 0.2)

    def _node(self, node: Node) -> None:
        if node.op == "add":
            self._add(node)
        elif node.op == "norm":
            self._norm(node)
        elif node.op == "all_reduce_add_rms_norm":
            self._fused(node)
        elif node.op == "+":
            self._circle(_MAIN, self.y + _LOW / 2, "+")
            self._leave(node, _LOW)
        else:
            self._enter(node)
            self._operation(node, _MAIN, self.y, _BAR)
            self._leave(node, _TALL)

    def _enter(self, node: Node) -> None:
        """The arrow into a node on the main line; branches that meet in "+" have drawn theirs."""
        assert self.pending is not None
        self._arrow(_MAIN, self.y, self.y + _GAP, self.pending)
        self.y += _GAP

    def _leave(self, node: Node, height: float) -> None:
        self.y += height
        self.pending = node.makes

    def _add(self, node: Node) -> None:
        """Down the main line, then left into the residual stream."""
        assert self.pending is not None
        value, y = self.pending, self.y + _GAP + _LOW / 2
        self._label(_MAIN, self.y + _GAP / 2, value)
        self._line([(_MAIN, self.y), (_MAIN, y)], value)
        self._point((_MAIN, y), (_RESIDUAL + _LOW / 2, y), value)
        self._residual_line(y)
        self._circle(_RESIDUAL, y, "+")
        self.residual = node.makes
        self.y += _GAP + _LOW
        self.pending = None

    def _norm(self, node: Node) -> None:
        """Reads the residual stream, which goes on below."""
        assert self.residual is not None
        y = self.y + _LOW + _TALL / 2
        self._residual_line(y)
        self._point((_RESIDUAL, y), (_MAIN - _BOX / 2, y), self.residual)
        self.axes.add_patch(Circle((_RESIDUAL, y), 0.045, color=INK, zorder=4))
        self._label_residual(y)
        self._operation(node, _MAIN, y - _TALL / 2, _BAR)
        self.y += _LOW
        self._leave(node, _TALL)

    def _fused(self, node: Node) -> None:
        """One bar over both lines: takes the partial sum and the residual, returns both."""
        self._enter(node)
        self._residual_line(self.y, arrow=True)
        left = _RESIDUAL - 0.25
        self._bar(node, left, _MAIN + _BAR / 2 - left, self.y)
        self.residual_from = self.y + _TALL
        self.residual = Value("residual", node.makes.placement)
        self._leave(node, _TALL)
        self._label_residual(self.y + _GAP / 2)

    def _branches(self, item: Branches) -> None:
        """One value, side by side through every chain."""
        assert self.pending is not None
        value, columns = self.pending, self._columns(len(item.chains))
        fork = self.y + _GAP - 0.04
        self._label(_MAIN, self.y + _GAP / 2 - 0.02, value)
        self._line([(_MAIN, self.y), (_MAIN, fork)], value)
        self._line([(columns[0], fork), (columns[-1], fork)], value)
        rows = max(len(chain) for chain in item.chains)
        top = self.y + _GAP + _LOW
        bottom = top + rows * (_TALL + _GAP) - _GAP
        end = bottom + _GAP + _LOW / 2  # the height of the "+" that follows
        for column, chain in zip(columns, item.chains, strict=True):
            self._point((column, fork), (column, top), value)
            y = top
            for row, node in enumerate(chain):
                if row:
                    self._arrow(column, y, y + _GAP, chain[row - 1].makes)
                    y += _GAP
                self._operation(node, column, y, _BRANCH_BAR)
                y += _TALL
            made = chain[-1].makes
            self._label(column, bottom + _GAP / 2, made)
            self._line([(column, y), (column, end)], made)
            side = -1 if column < _MAIN else 1
            self._point((column, end), (_MAIN + side * _LOW / 2, end), made)
        self.y = end - _LOW / 2

    def _columns(self, count: int) -> list[float]:
        first, last = _COLUMNS
        return [first + i * (last - first) / (count - 1) for i in range(count)]

    def _operation(self, node: Node, x: float, y: float, bar: float) -> None:
        """A collective as a bar, everything else as a box, its middle at x and its top at y."""
        if node.entry is not None and node.entry.kind == "collective":
            self._bar(node, x - bar / 2, bar, y)
            return
        width = min(_BOX, bar)
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2 + 0.08, y + 0.08),
                width - 0.16,
                _TALL - 0.16,
                boxstyle="round,pad=0.08",
                facecolor=COLOURS.get(node.op, OTHER),
                edgecolor=INK,
                linewidth=1.1,
                zorder=3,
            )
        )
        if node.entry is None:
            lines = ["keep own tokens", "nothing is sent"]
        else:
            lines = [name_of(node.op), node.entry.site]
        self._text_in(lines, x, y)

    def _bar(self, node: Node, left: float, width: float, y: float) -> None:
        colour, entry = COLOURS.get(node.op, OTHER), node.entry
        assert entry is not None
        cap = 0.24
        self.axes.add_patch(
            Rectangle((left, y), width, _TALL, facecolor=PAPER, edgecolor=colour, lw=2.4, zorder=3)
        )
        for x in (left, left + width - cap):
            self.axes.add_patch(
                Rectangle(
                    (x, y),
                    cap,
                    _TALL,
                    facecolor=colour,
                    edgecolor=PAPER,
                    hatch=HATCHES.get(node.op),
                    lw=0,
                    zorder=3.1,
                )
            )
        sends = f"each rank sends {readable_bytes(entry.bytes_sent)}"
        if width < _BAR:
            lines = [f"{node.op}", sends]
        else:
            where = f"{entry.site}: " if entry.site else ""
            lines = [node.op, f"{where}{entry.group_size} ranks, {sends}"]
        self._text_in(lines, left + width / 2, y)

    def _text_in(self, lines: list[str], x: float, y: float) -> None:
        first, second = lines
        middle = y + _TALL / 2
        at = middle - 0.085 if second else middle
        common = {"ha": "center", "va": "center", "zorder": 5}
        self.axes.text(x, at, first, size=11, weight="bold", **common)
        if second:
            self.axes.text(x, middle + 0.1, second, size=9.5, **common)

    def _circle(self, x: float, y: float, text: str) -> None:
        self.axes.add_patch(
            Circle((x, y), _LOW / 2, facecolor=COLOURS["add"], edgecolor=INK, lw=1.1, zorder=4)
        )
        self.axes.text(x, y, text, size=12, weight="bold", ha="center", va="center_baseline", zorder=5)

    def _arrow(self, x: float, top: float, bottom: float, value: Value) -> None:
        self._label(x, (top + bottom) / 2, value)
        self._point((x, top), (x, bottom), value)

    def _line(self, points: list[tuple[float, float]], value: Value) -> None:
        dashes, _, _ = PLACEMENTS[value.placement]
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=COLOURS[value.placement], lw=2, ls=dashes, zorder=2)

    def _point(self, begin: tuple[float, float], end: tuple[float, float], value: Value) -> None:
        """A line that ends in an arrow head."""
        self._line([begin, end], value)
        self.axes.annotate(
            "",
            end,
            begin,
            arrowprops={
                "arrowstyle": "-|>,head_width=0.28,head_length=0.5",
                "color": COLOURS[value.placement],
                "lw": 0,
                "shrinkA": 0,
                "shrinkB": 0,
                "mutation_scale": 14,
            },
            zorder=2.5,
        )

    def _label(self, x: float, y: float, value: Value) -> None:
        """Marker on the line; beside it the tensor's name over its placement."""
        self._marker(x, y, value.placement)
        self.axes.text(x + 0.16, y - 0.09, value.name, size=10, va="center", zorder=5)
        self.axes.text(
            x + 0.16,
            y + 0.09,
            value.placement,
            size=9.5,
            weight="bold",
            color=COLOURS[value.placement],
            va="center",
            zorder=5,
        )

    def _label_residual(self, y: float) -> None:
        assert self.residual is not None
        self._marker(_RESIDUAL, y, self.residual.placement) if False else None
        self.axes.text(_RESIDUAL - 0.16, y - 0.09, "residual", size=10, va="center", ha="right")
        self.axes.text(
            _RESIDUAL - 0.16,
            y + 0.09,
            self.residual.placement,
            size=9.5,
            weight="bold",
            color=COLOURS[self.residual.placement],
            va="center",
            ha="right",
        )

    def _marker(self, x: float, y: float, placement: str) -> None:
        _, marker, fill = PLACEMENTS[placement]
        self.axes.plot(
            x,
            y,
            marker=marker,
            fillstyle=fill,
            markersize=10,
            color=COLOURS[placement],
            markerfacecoloralt=PAPER,
            markeredgecolor=COLOURS[placement],
            zorder=4,
        )

    def _residual_line(self, end: float, arrow: bool = False) -> None:
        """Carry the residual stream on from where its line stopped."""
        assert self.residual is not None
        begin = (_RESIDUAL, self.residual_from)
        (self._point if arrow else self._line_to)(begin, (_RESIDUAL, end), self.residual)
        self.residual_from = end

    def _line_to(self, begin: tuple[float, float], end: tuple[float, float], value: Value) -> None:
        self._line([begin, end], value)

    def _legend(self, y: float) -> None:
        self.axes.plot((0.3, _WIDTH - 0.3), (y, y), color=FAINT, lw=0.8)
        for row, (placement, meaning) in enumerate(_MEANING.items()):
            at = y + 0.24 + 0.26 * row
            self._line([(0.4, at), (1.2, at)], Value("", placement))
            self._marker(0.8, at, placement)
            self.axes.text(1.4, at, meaning, size=10, va="center")
