"""How the numerical error grows from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from torch import Tensor

from stepmoe.charts.panels import look_of_variant
from stepmoe.charts.style import new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.measure.distance import relative_error

States = Mapping[int, Mapping[str, Tensor]]  # layer, name, value: as lesson.Pass.states


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
    layers = sorted(exact)
    for run, states in runs.items():
        missing = [layer for layer in layers if name not in states.get(layer, {})]
        if missing or any(name not in exact[layer] for layer in layers):
            raise ConfigError(f"run {run!r} has no {name!r} in layers {missing}: capture them all")
    with style():
        figure = new_figure(8.0, 3.6)
        axes = figure.subplots()
        for place, (run, states) in enumerate(runs.items()):
            errors = [relative_error(states[i][name], exact[i][name]) for i in layers]
            shown = [error if error > 0 else float("nan") for error in errors]
            look = look_of_variant(run, list(runs))
            size = 5 + 3 * (len(runs) - place)  # the first drawn stays visible around the others
            axes.plot(layers, shown, label=run, ms=size, mfc="none", mew=1.6, lw=1.4, **look)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(layers))
        axes.set_xlabel(f"layer  ({label})" if label else "layer")
        axes.set_ylabel(f"relative error of {name}")
        axes.set_title(title or "Error against the float64 model, by depth", loc="left")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.tight_layout()
    return figure
