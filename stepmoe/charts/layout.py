"""Who holds what: each rank's part of one decoder layer's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stepmoe.charts.style import FAINT, inch_axes, look_of, new_figure, style
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig, TensorLayout, tensor_layouts

# Inches.
_LEFT, _RIGHT, _HEAD, _COLUMN_HEAD, _FOOT = 1.75, 0.15, 0.55, 0.34, 0.5
_STRIP, _TALL_STRIP, _WORDS, _SPACE = 0.24, 0.5, 0.2, 0.16
_MOST_RANKS = 16


def layout(config: Step3p5Config, parallel: ParallelConfig, layer: int) -> Figure:
    """Draw which slice of one decoder layer each rank holds, a column a rank.

    The frame in a cell is the whole tensor, the filled part is what this rank holds; for the
    experts the frame runs over experts to the right and over the intermediate size downwards.

    Args:
        config: the model's shape.
        parallel: how it is cut; up to 16 ranks.
        layer: index of the decoder layer.

    Raises:
        ConfigError: the shape cannot be cut this way, no such layer, or too many ranks to draw.
    """
    if parallel.tp > _MOST_RANKS:
        raise ConfigError(f"tp={parallel.tp} columns do not fit on a page: {_MOST_RANKS} at most")
    rows = _rows(config, parallel, layer)
    column = max(1.16, 4.4 / parallel.tp)
    width = _LEFT + column * parallel.tp + _RIGHT
    height = _HEAD + _COLUMN_HEAD + sum(row.height for row in rows) + _FOOT
    settings = config.layer(layer)
    kind = settings.attention_type.replace("_", " ")
    name = f"Layer {layer}: {kind}, {'mixture of experts' if settings.is_moe else 'dense MLP'}"
    cut = f"tp={parallel.tp}, ep={parallel.ep}, attention={parallel.attention!r}"
    with style():
        figure = new_figure(width, height)
        axes = inch_axes(figure, 0, 0, width, height)
        axes.text(width / 2, 0.18, name, weight="bold", size=13, ha="center", va="center")
        axes.text(width / 2, 0.42, cut, size=11, ha="center", va="center")
        for rank in range(parallel.tp):
            x = _LEFT + (rank + 0.5) * column
            axes.text(
                x, _HEAD + 0.2, f"rank {rank}", weight="bold", size=11, ha="center", va="center"
            )
        y = _HEAD + _COLUMN_HEAD
        for row in rows:
            row.draw(axes, y, column)
            y += row.height
        axes.text(
            _LEFT,
            y + 0.2,
            "frame: the whole; filled: what the rank holds",
            size=10,
            va="center",
        )
    return figure


@dataclass(frozen=True)
class _Row:
    """One kind of tensor: its parts on each rank, in units that have a name.

    Attributes:
        across: for each rank the part along the frame's width, (start, stop).
        down: for each rank the part along its height; None where that is not cut.
        size: of the whole frame, (width, height).
    """

    name: str
    unit: str
    op: str
    across: list[tuple[int, int]]
    size: tuple[int, int]
    down: list[tuple[int, int]] | None = None

    @property
    def strip(self) -> float:
        return _TALL_STRIP if self.down else _STRIP

    @property
    def height(self) -> float:
        return self.strip + _WORDS * (2 if self.down else 1) + _SPACE

    def draw(self, axes: Axes, y: float, column: float) -> None:
        axes.text(_LEFT - 0.15, y + 0.02, self.name, weight="bold", size=11, ha="right", va="top")
        axes.text(_LEFT - 0.15, y + 0.22, self.unit, size=10, ha="right", va="top")
        for rank, across in enumerate(self.across):
            self._cell(axes, rank, across, y, _LEFT + rank * column + 0.07, column - 0.14)

    def _cell(
        self, axes: Axes, rank: int, across: tuple[int, int], y: float, x: float, width: float
    ) -> None:
        down = self.down[rank] if self.down else (0, 1)
        frame_width, frame_height = self.size
        left, right = (x + width * part / frame_width for part in across)
        top, bottom = (y + self.strip * part / frame_height for part in down)
        frame = Rectangle((x, y), width, self.strip, facecolor="#F4F4F4", edgecolor=FAINT, lw=0.8)
        held = Rectangle(
            (left, top),
            right - left,
            bottom - top,
            **look_of(self.op),
        )
        axes.add_patch(frame)
        axes.add_patch(held)
        lines = [_interval(across, frame_width)]
        if self.down:
            lines.append(_interval(down, frame_height, "rows"))
        for row, words in enumerate(lines):
            at = y + self.strip + _WORDS * (row + 0.55)
            axes.text(x + width / 2, at, words, size=10, ha="center", va="center")


def _interval(part: tuple[int, int], size: int, what: str = "") -> str:
    """The first and the last; "all" for the whole."""
    start, stop = part
    if stop - start == size > 1:
        return f"all {size} {what}".rstrip()
    numbers = str(start) if stop == start + 1 else f"{start}\u2013{stop - 1}"  # an en dash
    return f"{what} {numbers}".lstrip()


def _rows(config: Step3p5Config, parallel: ParallelConfig, layer: int) -> list[_Row]:
    """Every kind of tensor that is cut, as tensor_layouts cuts it."""
    settings = config.layer(layer)
    prefix = f"model.layers.{layer}."
    held = [tensor_layouts(config, parallel, rank) for rank in range(parallel.tp)]

    def parts(name: str, dim: int, unit: int = 1) -> list[tuple[int, int]]:
        slices = [layouts[prefix + name].slices[dim] for layouts in held]
        return [(part.start // unit, part.stop // unit) for part in slices]

    def whole(name: str) -> TensorLayout:
        return held[0][prefix + name]

    def rows() -> Iterator[_Row]:
        dim = settings.head_dim
        for title, tensor, count in (
            ("query heads", "self_attn.q_proj.weight", settings.num_heads),
            ("key-value heads", "self_attn.k_proj.weight", settings.num_kv_heads),
        ):
            yield _Row(
                title,
                f"{count} of size {dim}",
                "attention",
                parts(tensor, 0, dim),
                (count, 1),
            )
        if not settings.is_moe:
            name = "mlp.gate_proj.weight"
            size = whole(name).shape[0]
            yield _Row("dense MLP", f"{size} rows", "mlp", parts(name, 0), (size, 1))
            return
        name = "moe.gate_proj.weight"
        experts, size, _ = whole(name).shape
        yield _Row(
            "routed experts",
            f"{experts} × {size} rows",
            "experts",
            parts(name, 0),
            (experts, size),
            parts(name, 1),
        )
        name = "share_expert.gate_proj.weight"
        size = whole(name).shape[0]
        yield _Row("shared expert", f"{size} rows", "share_expert", parts(name, 0), (size, 1))

    return list(rows())
