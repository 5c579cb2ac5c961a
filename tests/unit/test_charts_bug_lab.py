"""The bug lab's pictures show what they are given."""

import pandas as pd
import pytest
import torch

import stepmoe as sm
from stepmoe import charts
from stepmoe.charts import Signature

HARDWARE = {"ranks": 4, "gpus": [], "cpu": "test", "cores": 2, "backend": "gloo", "hosts": 1}
ATTRS = {"recorded": True, "date": "2026-11-25", "hardware": HARDWARE, "dtype": "float32"}


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def test_a_panel_marks_ranks_only_where_they_differ():
    right = torch.linspace(-1, 1, 40).view(5, 8)
    same = Signature("twice", "mlp_output of layer 0", right, {0: 4 * right, 1: 4 * right})
    apart = Signature("half", "logits", right, {0: 0 * right, 1: right})
    nothing = Signature("hangs", "logits", None, {})
    figure = charts.signatures([same, apart, nothing])
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["twice", "half", "hangs"]
    assert [len(axes.lines) for axes in panels] == [2, 3, 0]  # the dashed line, and the marks
    assert max(panels[0].lines[1].get_ydata()) == pytest.approx(4)
    assert {"off by 3", "off by 1", "nothing arrived"} <= set(texts(figure))
    with pytest.raises(sm.ConfigError, match="no panel"):
        charts.signatures([])


def test_the_matrix_has_a_square_a_finding_and_a_ring_a_fault():
    fired = {"a": {"ledger", "oracle"}, "b": set()}
    figure = charts.guard_matrix(fired, ("ledger", "oracle", "vote"), {"a": "ledger"})
    lines = figure.axes[0].lines
    squares = [(*line.get_xdata(), *line.get_ydata()) for line in lines if line.get_marker() == "s"]
    rings = [(*line.get_xdata(), *line.get_ydata()) for line in lines if line.get_marker() == "o"]
    assert squares == [(0, 0), (1, 0)]
    assert rings == [(0, 0)]
    with pytest.raises(sm.ConfigError, match=r"without a column: \['vote'\]"):
        charts.guard_matrix({"a": {"vote"}}, ("ledger",), {})


def test_accuracy_beside_what_was_published():
    row = {"low": 0.1, "high": 0.9}
    frame = pd.DataFrame(
        [{"fault": "twice", "accuracy": 0.2, **row}, {"fault": "none", "accuracy": 0.8, **row}]
    )
    frame.attrs = ATTRS
    figure = charts.accuracy_under_faults(frame, {"twice": (0.002, 0.951), "other": (0.5, None)})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["no fault", "twice"]
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == [0.002]
    assert any("recorded 2026-11-25" in text for text in texts(figure))
    with pytest.raises(sm.ConfigError, match="no row"):
        charts.accuracy_under_faults(frame[:0])
