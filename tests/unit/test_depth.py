"""The chart of errors by depth: its points are the errors."""

import numpy as np
import pytest
import torch

import stepmoe as sm
from stepmoe import charts
from stepmoe.charts.depth import relative_error


def states(*values: float) -> dict[int, dict[str, torch.Tensor]]:
    return {i: {"layer_output": torch.full((2, 3), value)} for i, value in enumerate(values)}


def test_relative_error_is_computed_in_float64():
    exact = torch.full((4,), 2.0, dtype=torch.float64)
    assert relative_error(torch.full((4,), 2.5), exact) == pytest.approx(0.25, abs=1e-15)


def test_each_line_shows_its_errors_and_leaves_zero_out():
    exact = states(1.0, 2.0, 4.0)
    figure = charts.error_by_depth(
        {"deferred": states(1.5, 2.0, 5.0), "fused": states(1.5, 2.5, 4.5)}, exact
    )
    axes = figure.axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(drawn["deferred"], [0.5, np.nan, 0.25])
    np.testing.assert_allclose(drawn["fused"], [0.5, 0.25, 0.125])
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    assert colours == {name: charts.COLOURS[name] for name in ("deferred", "fused")}
    assert axes.get_yscale() == "log"


def test_what_is_missing_is_named():
    with pytest.raises(sm.ConfigError, match="no run to draw"):
        charts.error_by_depth({}, states(1.0))
    with pytest.raises(sm.ConfigError, match=r"'deferred' has no 'layer_output' in layers \[1\]"):
        charts.error_by_depth({"deferred": states(1.0)}, states(1.0, 2.0))
