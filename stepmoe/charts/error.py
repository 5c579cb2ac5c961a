"""How far logits are from the float64 model's, and a sequence's in a batch from the same alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from stepmoe.charts.panels import look_of_variant
from stepmoe.charts.style import FAINT, SERIES, new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.measure.report import provenance

if TYPE_CHECKING:
    import pandas as pd

# Orders of summation, where only they differ; and dtypes, in every chart of errors.
_ORDERS = dict(zip(("ring", "wide", "tree", "library"), SERIES, strict=True))
_LINES = {"float32": "-", "bfloat16": (0, (4, 1.5)), "float16": (0, (2, 1)), "float64": (0, (1, 1))}
_ROW = 0.3  # inches


def looks_of_cases(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Name and look of every row of `measure.numerical_error`: what all rows share is not named.

    Raises:
        ConfigError: another kind of frame.
    """
    columns = ("variant", "dtype", "order")
    missing = [name for name in (*columns, "layers", "kl") if name not in frame.columns]
    if missing or not len(frame):
        raise ConfigError(
            f"a frame of {len(frame)} rows without {', '.join(missing) or 'any'}: give what "
            "measure.numerical_error returned"
        )
    told = [name for name in columns if frame[name].nunique() > 1] or ["variant"]
    variants = list(dict.fromkeys(frame["variant"]))
    looks = {}
    for row in frame.to_dict("records"):
        by_order = len(variants) == 1 and "order" in told
        look = _ORDERS[row["order"]] if by_order else look_of_variant(row["variant"], variants)
        looks[", ".join(str(row[name]) for name in told)] = {**look, "ls": _LINES[row["dtype"]]}
    return looks


def logit_errors(frame: pd.DataFrame, title: str | None = None) -> Figure:
    """Relative error, divergence and changed first choices of the logits, a row a case.

    Raises:
        ConfigError: another kind of frame.
    """
    looks = looks_of_cases(frame)
    rows = frame.to_dict("records")
    panels: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
        ("relative error", "log", lambda row: row["logits"]),
        ("KL divergence, nats", "log", lambda row: row["kl"]),
        (f"other first choice, of {rows[0]['positions']}", "linear", lambda row: row["flips"]),
    )
    with style():
        figure = new_figure(10.0, 1.5 + _ROW * len(rows))
        for place, (axes, (name, scale, value)) in enumerate(
            zip(figure.subplots(1, len(panels)), panels, strict=True)
        ):
            _dots(axes, [value(row) for row in rows], looks.values(), scale)
            axes.set_yticks(range(len(rows)), list(looks) if not place else [""] * len(rows))
            axes.set_title(name, loc="left", size=11.5)
        _head(figure, title or "Logits against the float64 model", provenance(frame.attrs))
    return figure


def _dots(axes: Axes, values: list[float], looks: Iterable[dict[str, Any]], scale: str) -> None:
    for place, (value, look) in enumerate(zip(values, looks, strict=True)):
        axes.plot(value, place, ms=8, color=look["color"], marker=look["marker"], ls="")
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="y", color=FAINT, alpha=0.3)
    axes.tick_params("y", length=0)
    axes.set_xscale(scale)
    if scale == "log":
        powers = np.log10([value for value in values if value > 0] or [1.0])
        axes.set_xlim(10 ** np.floor(powers.min() - 0.1), 10 ** np.ceil(powers.max() + 0.1))
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(-0.04 * max(*values, 1), 1.1 * max(*values, 1))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def batch_invariance(*frames: pd.DataFrame, title: str | None = None) -> Figure:
    """The largest change of a logit, and the sequences whose bits are unchanged, by batch size.

    Args:
        frames: of `measure.batch_invariance`; each becomes a line, named by its dtype, and by its
            order of summation where one was chosen.

    Raises:
        ConfigError: no frame, or another kind.
    """
    for frame in frames:
        if "same_bits" not in frame.columns:
            raise ConfigError("give what measure.batch_invariance returned")
    if not frames:
        raise ConfigError("no frame to draw: give what measure.batch_invariance returned")
    dtypes = ", ".join(dict.fromkeys(frame.attrs["dtype"] for frame in frames))
    with style():
        figure = new_figure(10.0, 3.4)
        left, right = figure.subplots(1, 2)
        for place, frame in enumerate(frames):
            look, order = SERIES[place % len(SERIES)], frame["order"].iloc[0]
            name = frame.attrs["dtype"] + ("" if order == "library" else f", order {order}")
            sizes = list(range(len(frame)))
            changes = [value if value > 0 else float("nan") for value in frame["largest"]]
            left.plot(sizes, changes, label=name, mfc="none", ms=10 - 2 * place, **look)
            right.plot(sizes, frame["same_bits"], label=name, mfc="none", ms=10 - 2 * place, **look)
        left.set_yscale("log")
        left.set_title("largest change of a logit", loc="left", size=11.5)
        total = frames[0]["sequences"].iloc[0]
        right.set_title(f"sequences with the same bits, of {total}", loc="left", size=11.5)
        right.set_ylim(-0.05 * total, 1.05 * total)
        right.legend(frameon=False, loc="center right")
        for axes in (left, right):
            axes.set_xticks(range(len(frames[0])), frames[0]["batch_size"])
            axes.set_xlabel("sequences computed together")
        made = provenance({**frames[0].attrs, "dtype": dtypes})
        _head(figure, title or "A sequence alone and in a batch", made)
    return figure


def _head(figure: Figure, title: str, origin: str) -> None:
    """Title and provenance above the panels, which take the rest."""
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.22 / height, title, weight="bold", size=13, va="center")
    figure.text(0.01, 1 - 0.5 / height, origin, style="italic", size=10.5, va="center")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / height))
