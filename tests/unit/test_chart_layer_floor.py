"""The picture of a recorded layer: every operation with its time, its floor and their ratio."""

import random

import pytest
from test_charts import check_legible, words

import stepmoe as sm
from stepmoe import charts

NAMES = ["add + norm", "q, k, v, gate projection", "attention", "o_proj", "experts: gate, up"]


def a_record():
    """Two layers in two phases, as `python -m stepmoe layer-floor --json` writes them."""

    def layer(attention, phase, batch, names):
        rows = [{"operation": name, "floor": random.uniform(1e-6, 5e-4)} for name in names]
        for row in rows:
            row["ratio"] = random.uniform(1.0, 3.0)
            row["seconds"] = row["floor"] * row["ratio"]
        floor = sum(row["floor"] for row in rows)
        seconds = sum(row["seconds"] for row in rows) * 1.1
        own = {"attention": attention, "phase": phase, "batch": batch, "operations": rows}
        times = {"seconds": seconds, "other": 0.01 * seconds}
        return own | times | {"floor": floor, "ratio": seconds / floor}

    return {
        "date": "2026-11-25T12:00:00+00:00",
        "hardware": {"gpus": ["NVIDIA H100 80GB HBM3"]},
        "versions": {"torch": "2.11.0+cu130"},
        "layers": [
            layer("full", "prefill", 2, NAMES),
            layer("full", "decode", 16, NAMES[:-1]),
            layer("sliding", "prefill", 2, NAMES[1:] + NAMES[:1]),
            layer("sliding", "decode", 16, NAMES[:-1]),
        ],
    }


@pytest.mark.parametrize(("phase", "batch"), [("prefill", None), ("decode", 16)])
def test_every_operation_is_drawn_with_its_ratio(phase, batch):
    record = a_record()
    figure = charts.layer_floor(record, phase, batch)
    check_legible(figure)
    shown = words(figure)
    assert any("recorded 2026-11-25 on one NVIDIA H100" in text for text in shown)
    layers = [layer for layer in record["layers"] if layer["phase"] == phase]
    for axes, layer in zip(figure.axes, layers, strict=True):
        names = [row["operation"] for row in layers[0]["operations"]]
        rows = {row["operation"]: row for row in layer["operations"]}
        assert f"{layer['attention']}: {layer['seconds'] * 1e6:,.0f} µs" in axes.get_title()
        kernels = (1 / 1.1 + 0.01) * layer["seconds"]
        assert f"its kernels: {kernels * 1e6:,.0f} µs" in axes.get_title()
        bars = [bar for container in axes.containers for bar in container]
        lengths = [bar.get_width() for bar in bars]
        wanted = [rows[name][key] * 1e6 for name in names for key in ("seconds", "floor")]
        assert lengths == pytest.approx(wanted)
        assert [text.get_text() for text in axes.texts] == [
            f"{rows[name]['ratio']:.2f}" for name in names
        ]


def test_a_step_that_was_not_recorded_is_named():
    with pytest.raises(sm.ConfigError, match=r"no decode of batch 3; it holds .*'decode', 16"):
        charts.layer_floor(a_record(), "decode", 3)
