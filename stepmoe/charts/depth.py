"""How the numerical error grows from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from torch import Tensor

from stepmoe.charts.error import looks_of_cases
from stepmoe.charts.panels import look_of_variant
from stepmoe.charts.style import new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.measure.distance import relative_error
from stepmoe.measure.report import provenance

if TYPE_CHECKING:
    import pandas as pd

States = Mapping[int, Mapping[str, Tensor]]  # layer, name, value: as lesson.Pass.states
Look = Mapping[str, Any]  # as matplotlib's plot takes it


def error_by_depth(
    runs: Mapping[str, States],
    exact: States,
    name: str = "layer_output",
    title: str | None = None,
    label: str = "",
) -> Figure:
    """Relative error of one captured value against the layer, a line a run, logarithmic.

    Runs that agree bit for bit lie on top of each other: marks are hollow and of different size.
    An error of exactly zero has no place on the axis and is left out.

    Args:
        runs: a variant's name, or another label, to its states.
        exact: the float64 states of the unsharded model.
        name: which of the captured values.
        label: what was run on, written on the axis.

    Raises:
        ConfigError: no run, or a layer or value that a run lacks.
    """
    if not runs:
        raise ConfigError("no run to draw: give {'deferred': passes[0].states, ...}")
    layers, lines = sorted(exact), {}
    for run, states in runs.items():
        missing = [layer for layer in layers if name not in states.get(layer, {})]
        if missing or any(name not in exact[layer] for layer in layers):
            raise ConfigError(f"run {run!r} has no {name!r} in layers {missing}: capture them all")
        errors = [relative_error(states[i][name], exact[i][name]) for i in layers]
        lines[run] = errors, look_of_variant(run, list(runs))
    return _drawn(layers, lines, name, title, label)


def error_growth(frame: pd.DataFrame, title: str | None = None) -> Figure:
    """The same for every row of `measure.numerical_error`: what leaves each layer.

    Raises:
        ConfigError: another kind of frame.
    """
    looks = looks_of_cases(frame)
    rows = zip(looks.items(), frame["layers"], strict=True)
    lines = {run: (errors, look) for (run, look), errors in rows}
    layers = range(len(frame["layers"].iloc[0]))
    return _drawn(layers, lines, "layer_output", title, provenance(frame.attrs))


def _drawn(
    layers: Sequence[int],
    lines: Mapping[str, tuple[Sequence[float], Look]],
    name: str,
    title: str | None,
    label: str,
) -> Figure:
    with style():
        figure = new_figure(8.0, 3.6)
        axes = figure.subplots()
        for place, (run, (errors, look)) in enumerate(lines.items()):
            shown = [error if error > 0 else float("nan") for error in errors]
            size = 5 + 3 * (-place % 4 or 4)  # the first drawn stays visible around the others
            axes.plot(layers, shown, label=run, ms=size, mfc="none", mew=1.6, lw=1.4, **look)
        axes.set_yscale("log")
        axes.margins(y=0.12)
        axes.xaxis.set_major_locator(FixedLocator(list(layers)))
        axes.set_xlabel(f"layer  ({label})" if label else "layer")
        axes.set_ylabel(f"relative error of {name}")
        axes.set_title(title or "Error against the float64 model, by depth", loc="left")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.tight_layout()
    return figure
