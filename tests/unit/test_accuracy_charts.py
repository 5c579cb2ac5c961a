"""Charts of accuracy and of numerical error: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_charts import check_legible, words

import stepmoe as sm
from stepmoe import charts, published
from stepmoe.comm.summation import ORDERS
from stepmoe.measure.sample_size import questions_needed_paired
from stepmoe.measure.significance import paired_from_counts, wilson
from stepmoe.measure.task import Outcomes

ATTRS = {
    "recorded": False,
    "hardware": {"ranks": 2, "gpus": [], "backend": "gloo", "hosts": 1, "cores": 2, "cpu": "A CPU"},
    "versions": {},
    "dtype": "float32",
    "date": "2026-11-25T11:00:00+00:00",
    "parallel": {"tp": 2, "ep": 1, "attention": "tp"},
}
DRAW = np.random.default_rng()


def accuracies(questions: int, **attrs: object) -> pd.DataFrame:
    rows = []
    for variant in sm.VARIANTS:
        marks = "".join(DRAW.choice(list("10-"), questions, p=[0.88, 0.1, 0.02]))
        outcomes = Outcomes(marks, tuple(None if m == "-" else int(m) for m in marks))
        interval = outcomes.accuracy
        row = {"variant": variant, "dtype": "float32", "questions": questions}
        row |= {"right": outcomes.num_right, "accuracy": interval.value}
        row |= {"low": interval.low, "high": interval.high, **outcomes.to_row()}
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.attrs = {**ATTRS, **attrs}
    return frame


def test_accuracies_are_drawn_with_their_intervals_and_origins():
    live, recorded = accuracies(96), accuracies(1319, recorded=True)
    figure = charts.accuracy(live, recorded, published=published.SCORES, title="How many are right")
    check_legible(figure)
    shown = " ".join(words(figure))
    assert "published: sglang #22773, GSM8K, 1319 questions; intervals computed here" in shown
    assert "live: 2 CPU ranks on 2 cores (A CPU), gloo, float32, tp=2 ep=1" in shown
    assert "recorded 2026-11-25: 2 CPU ranks" in shown
    assert f"{live['right'][0]} of 96: {wilson(live['right'][0], 96)}" in shown
    for axes, frame in zip(figure.axes[1:], (live, recorded), strict=True):
        lines = axes.lines[::2]
        assert [tuple(line.get_xdata()) for line in lines] == list(
            zip(frame["low"], frame["high"], strict=True)
        )
    assert figure.axes[0].lines[0].get_xdata()[0] == wilson(1154, 1319).low
    check_legible(charts.accuracy(live))
    dp = accuracies(50, parallel={"tp": 4, "ep": 2, "attention": "dp"})
    assert "tp=4 ep=2 attention=dp" in " ".join(words(charts.accuracy(dp)))


def test_flips_are_drawn_to_both_sides():
    pairs = {"float32 to bfloat16": paired_from_counts(1100, 20, 25, 174)}
    pairs |= {"one": paired_from_counts(9, 0, 9, 0), "none": paired_from_counts(3, 0, 0, 1)}
    figure = charts.flips(pairs, label="recorded somewhere")
    check_legible(figure)
    widths = [patch.get_width() for bars in figure.axes[0].containers for patch in bars]
    assert widths == [-20, 25, 0, 9, 0, 0]
    shown = words(figure)
    assert "+5 net, p = 0.55: no difference seen" in shown
    assert "+9 net, p = 0.0039: better" in shown
    check_legible(charts.flips({"none": pairs["none"]}))


def test_questions_needed_are_those_of_the_tests():
    figure = charts.questions_needed(flip_rates=(0.1, 0.02))
    check_legible(figure)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    points, needed = lines["paired, 2% of the answers flip"].get_data()
    assert max(points) < 2  # a difference is no larger than the flips
    place = len(points) // 2
    difference = points[place] / 100
    expected = questions_needed_paired(0.01 - difference / 2, 0.01 + difference / 2)
    # The exact power moves up and down from one number of questions to the next.
    assert needed[place] == pytest.approx(expected, rel=0.01)


def errors(variants=sm.VARIANTS, dtypes=("float32", "bfloat16"), orders=("library",)):
    scale = {"float32": 1e-7, "bfloat16": 1e-2}
    rows = [
        {
            "variant": v, "dtype": d, "order": o, "logits": 5 * scale[d], "kl": scale[d] ** 2,
            "layers": list(scale[d] * np.arange(1, 6) * DRAW.uniform(0.9, 1.1)),
            "flips": int(300 * scale[d]), "positions": 640,
        }
        for d in dtypes for v in variants for o in orders
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs = {**ATTRS, "dtype": ", ".join(dtypes)}
    return frame


@pytest.mark.parametrize(
    ("frame", "first", "last"),
    [
        (errors(), "three_all_reduces, float32", "reduce_scatter, bfloat16"),
        (errors(["deferred"], ["bfloat16"], ORDERS), "library", "wide"),
        (errors(["deferred"], ["bfloat16"]), "deferred", "deferred"),
        (errors(["fused"], orders=["tree", "ring"]), "float32, tree", "bfloat16, ring"),
    ],
)
def test_errors_are_named_by_what_differs(frame, first, last):
    for figure in (charts.error_growth(frame), charts.logit_errors(frame)):
        check_legible(figure)
        assert "live: 2 CPU ranks" in " ".join(words(figure))
    lines = charts.error_growth(frame).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == frame["layers"].tolist()
    panels = charts.logit_errors(frame).axes
    for names in (
        [line.get_label() for line in lines],
        [label.get_text() for label in panels[0].get_yticklabels()],
    ):
        assert (names[0], names[-1], len(names)) == (first, last, len(frame))
    for axes, name in zip(panels, ("logits", "kl", "flips"), strict=True):
        assert [line.get_xdata()[0] for line in axes.lines] == frame[name].tolist()


def invariance(dtype: str, largest: float) -> pd.DataFrame:
    rows = [
        {"batch_size": n, "order": "library", "same_bits": 8 // n, "sequences": 8,
         "largest": largest * (n - 1)}
        for n in (1, 2, 8)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs = {**ATTRS, "dtype": dtype}
    return frame


def test_batch_invariance_shows_changes_and_what_is_unchanged():
    frames = invariance("float32", 1e-6), invariance("bfloat16", 1e-2)
    figure = charts.batch_invariance(*frames)
    check_legible(figure)
    left, right = figure.axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [np.nan, 1e-6, 7e-6])
    assert list(right.lines[1].get_ydata()) == [8, 4, 1]
    assert "bfloat16" in words(figure)
    assert any(text.endswith(", float32, bfloat16") for text in words(figure))  # the heading


def test_what_cannot_be_drawn_is_refused():
    other = pd.DataFrame({"variant": ["fused"], "dtype": ["float32"], "order": ["ring"]})
    with pytest.raises(sm.ConfigError, match="no accuracy to draw"):
        charts.accuracy()
    with pytest.raises(sm.ConfigError, match="not what compare_accuracy returned"):
        charts.accuracy(other)
    with pytest.raises(sm.ConfigError, match="no pair to draw"):
        charts.flips({})
    for draw in (charts.error_growth, charts.logit_errors):
        with pytest.raises(sm.ConfigError, match="1 rows without layers, kl"):
            draw(other)
    with pytest.raises(sm.ConfigError, match="no frame to draw"):
        charts.batch_invariance()
    with pytest.raises(sm.ConfigError, match=r"measure\.batch_invariance returned"):
        charts.batch_invariance(other)
