"""Data-flow diagram of one decoder layer: what each operation reads and makes, and who holds it."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from stepmoe.charts.flow import Branches, LayerFlow, Node, Value, layer_flow
from stepmoe.charts.pen import BAR, BOX, BRANCH_BAR, LOW, TALL, Pen
from stepmoe.charts.style import FAINT, inch_axes, new_figure, style
from stepmoe.comm.ledger import Ledger

# Inches. The residual stream runs down on the left, everything else beside it.
_WIDTH, _HEAD, _FOOT = 8.2, 0.5, 1.12
_RESIDUAL, _MAIN, _COLUMNS = 1.3, 4.45, (3.05, 5.85)
_GAP = 0.5  # an arrow and its label

_MEANING = {
    "Replicate": "Replicate: whole, and equal on every rank",
    "Shard": "Shard: each rank holds its own tokens",
    "Partial": "Partial: the value is the sum of every rank's",
}


def dataflow(
    ledger: Ledger, layer: int, title: str | None = None, *, legend: bool = True
) -> Figure:
    """Draw the data flow of one decoder layer, as this rank's ledger recorded it.

    Operations follow each other downwards; the residual stream is the line on the left. An arrow
    carries the name of a tensor and its placement (colour, line and marker). A collective is a wide
    bar with hatched ends. What the ledger does not name (sums of branches, cuts to a rank's own
    tokens) follows from the placements before and after. Of several forward passes in the ledger
    the first is drawn.

    Args:
        ledger: recorded around a model call on at least two ranks.
        layer: index of the decoder layer.
        title: above the picture; None writes one.
        legend: say below it what the lines mean; off where several pictures share one.

    Raises:
        ConfigError: the ledger holds no collective, or nothing of this layer.
    """
    flow = layer_flow(ledger, layer)
    is_moe = any(node.op == "experts" for node in flow.nodes)
    title = title or f"Decoder layer {layer} ({'mixture of experts' if is_moe else 'dense'})"
    with style():
        figure = new_figure(_WIDTH, _height(flow) + (_FOOT if legend else 0.1))
        axes = inch_axes(figure, 0, 0, *figure.get_size_inches())
        axes.text(_WIDTH / 2, 0.25, title, weight="bold", size=13.5, ha="center", va="center")
        pen = Pen(axes)
        bottom = _Drawing(pen, flow).draw()
        if legend:
            axes.plot((0.3, _WIDTH - 0.3), (bottom + 0.2, bottom + 0.2), color=FAINT, lw=0.8)
            _legend(pen, bottom + 0.42)
    return figure


def placements(note: str) -> Figure:
    """The legend of `dataflow` alone, for several pictures, and a line in italics below it."""
    with style():
        figure = new_figure(_WIDTH, _FOOT + 0.4)
        axes = inch_axes(figure, 0, 0, *figure.get_size_inches())
        _legend(Pen(axes), 0.3)
        axes.text(0.4, 0.42 + 0.26 * len(_MEANING), note, size=10, va="center", style="italic")
    return figure


def _legend(pen: Pen, top: float) -> None:
    """What the lines and markers mean."""
    for row, (placement, meaning) in enumerate(_MEANING.items()):
        y = top + 0.26 * row
        pen.line([(0.4, y), (1.2, y)], placement)
        pen.marker(0.8, y, placement)
        pen.axes.text(1.4, y, meaning, size=10, va="center")


def _height(flow: LayerFlow) -> float:
    """What `_Drawing` uses: each item's own height, and an arrow into it or a line to the left."""
    height = _HEAD + _GAP + (_GAP if flow.residual is None else 0)
    for item in flow.items:
        if isinstance(item, Branches):
            rows = max(len(chain) for chain in item.chains)
            height += _GAP + LOW + rows * (TALL + _GAP)
        elif item.op == "norm":
            height += LOW + TALL
        elif item.op == "+":
            height += LOW
        else:
            height += _GAP + (LOW if item.op == "add" else TALL)
    return height


class _Drawing:
    """Goes down the items of a layer.

    Attributes:
        y: where the next item begins.
        value: what flows into it on the main line.
        residual: the residual stream; residual_from: down to where its line is drawn.
    """

    def __init__(self, pen: Pen, flow: LayerFlow) -> None:
        self.pen, self.flow = pen, flow
        self.y = self.residual_from = _HEAD
        self.value = flow.enters
        self.residual = flow.residual or replace(flow.enters, name="residual")

    def draw(self) -> float:
        """Returns how far down it came."""
        if self.flow.residual is None:  # the embedding is the beginning of the residual stream
            self.pen.label(_RESIDUAL, self.y + _GAP / 2, self.flow.enters)
            self.y += _GAP
        else:
            self.pen.label(_RESIDUAL, self.y + _GAP / 2, self.residual, left=True)
        for item in self.flow.items:
            if isinstance(item, Branches):
                self._branches(item)
            elif item.op == "add":
                self._add(item)
            elif item.op == "norm":
                self._norm(item)
            elif item.op == "+":
                self.pen.plus(_MAIN, self.y + LOW / 2)
                self._leave(item, LOW)
            else:
                self._in_line(item)
        bottom = self.y + _GAP
        self.pen.arrow(_MAIN, self.y, bottom, self.value)
        self._carry_residual(bottom, arrow=True)
        return bottom

    def _in_line(self, node: Node) -> None:
        """Entered from above, left below; the fused operation takes the residual stream along."""
        self.pen.arrow(_MAIN, self.y, self.y + _GAP, self.value)
        self.y += _GAP
        if node.op == "all_reduce_add_rms_norm" and node.entry is not None:
            self._carry_residual(self.y, arrow=True)
            left = _RESIDUAL - 0.25
            self.pen.bar(node.entry, left, _MAIN + BAR / 2 - left, self.y)
            self.residual_from = self.y + TALL
            self.residual = Value("residual", node.makes.placement)
            self.pen.label(_RESIDUAL, self.y + TALL + _GAP / 2, self.residual, left=True)
        else:
            self.pen.operation(node, _MAIN, self.y, BAR)
        self._leave(node, TALL)

    def _add(self, node: Node) -> None:
        """Down the main line, then left into the residual stream."""
        y, placement = self.y + _GAP + LOW / 2, self.value.placement
        self.pen.label(_MAIN, self.y + _GAP / 2, self.value)
        self.pen.line([(_MAIN, self.y), (_MAIN, y)], placement)
        self.pen.point((_MAIN, y), (_RESIDUAL + LOW / 2, y), placement)
        self._carry_residual(y)
        self.pen.plus(_RESIDUAL, y)
        self.residual = node.makes
        self.y += _GAP + LOW

    def _norm(self, node: Node) -> None:
        """Reads the residual stream, which goes on below."""
        y = self.y + LOW + TALL / 2
        self._carry_residual(y)
        self.pen.dot(_RESIDUAL, y)
        self.pen.words(_RESIDUAL, y, self.residual, left=True)
        left = _MAIN - BOX / 2
        self.pen.point((_RESIDUAL, y), (left, y), self.residual.placement)
        self.pen.marker((_RESIDUAL + left) / 2, y, self.residual.placement)
        self.pen.operation(node, _MAIN, y - TALL / 2, BAR)
        self._leave(node, LOW + TALL)

    def _branches(self, item: Branches) -> None:
        """One value, side by side through every chain, and to the sum that follows."""
        placement = self.value.placement
        fork = self.y + _GAP - 0.04
        columns = _spread(len(item.chains))
        self.pen.label(_MAIN, self.y + _GAP / 2 - 0.02, self.value)
        self.pen.line([(_MAIN, self.y), (_MAIN, fork)], placement)
        self.pen.line([(columns[0], fork), (columns[-1], fork)], placement)
        top = self.y + _GAP + LOW
        self.y = top + max(len(chain) for chain in item.chains) * (TALL + _GAP)
        for x, chain in zip(columns, item.chains, strict=True):
            self.pen.point((x, fork), (x, top), placement)
            self._chain(chain, x, top, end=self.y + LOW / 2)

    def _chain(self, chain: tuple[Node, ...], x: float, y: float, end: float) -> None:
        """The operations of one branch, then down to `end` and sideways to the sum."""
        for row, node in enumerate(chain):
            if row:
                self.pen.arrow(x, y, y + _GAP, chain[row - 1].makes)
                y += _GAP
            self.pen.operation(node, x, y, BRANCH_BAR)
            y += TALL
        made = chain[-1].makes
        self.pen.label(x, y + _GAP / 2, made)
        self.pen.line([(x, y), (x, end)], made.placement)
        side = 1 if x > _MAIN else -1
        self.pen.point((x, end), (_MAIN + side * LOW / 2, end), made.placement)

    def _leave(self, node: Node, height: float) -> None:
        self.y += height
        self.value = node.makes

    def _carry_residual(self, end: float, arrow: bool = False) -> None:
        """Carry the residual stream on from where its line stopped."""
        begin = (_RESIDUAL, self.residual_from)
        if arrow:
            self.pen.point(begin, (_RESIDUAL, end), self.residual.placement)
        else:
            self.pen.line([begin, (_RESIDUAL, end)], self.residual.placement)
        self.residual_from = end


def _spread(count: int) -> list[float]:
    """Where the branches run."""
    first, last = _COLUMNS
    return [first + i * (last - first) / (count - 1) for i in range(count)]
