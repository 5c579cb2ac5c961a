"""A ribbon that says which variant is predicted fastest at how many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from stepmoe.charts.style import COLOURS, PAPER, text_width
from stepmoe.comm.sweep import Span


def draw_spans(
    axes: Axes, spans: Sequence[Span], numbers: Sequence[int], width: float
) -> list[Artist]:
    """A bar a span, half way up to the next number of tokens; variants that tie share its height.

    Args:
        axes: with tokens on a log scale, and 0 to 1 upwards.
        numbers: the numbers of tokens that were predicted, in order.
        width: of the axes in inches: a name that does not fit its bar is left out.
    """
    starts = [span.first for span in spans]
    before = [numbers[max(numbers.index(start) - 1, 0)] for start in starts]
    edges = [math.sqrt(a * b) for a, b in zip(before, starts, strict=True)] + [numbers[-1]]
    drawn: list[Artist] = []
    for span, left, right in zip(spans, edges, edges[1:], strict=False):
        height = 1 / len(span.variants)
        for row, name in enumerate(span.variants):
            bar = axes.barh(
                row * height, right - left, height, left, align="edge", color=COLOURS[name]
            )
            middle = math.sqrt(left * right), (row + 0.5) * height
            text = axes.text(
                *middle, name, color=PAPER, weight="bold", size=9.5, ha="center", va="center"
            )
            share = math.log(right / left) / math.log(numbers[-1] / numbers[0])
            text.set_visible(text_width(text) < share * width)
            drawn += [*bar.patches, text]
    return drawn
