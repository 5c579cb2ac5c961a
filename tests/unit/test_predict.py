"""The prediction for eight GPUs: its counts against ledgers, its arithmetic by hand."""

import pandas as pd
import pytest
import torch
from test_charts import check_legible

import stepmoe as sm
from stepmoe import charts
from stepmoe.attribution import attribute, explaining_bandwidth
from stepmoe.comm.cost import LINKS, Link
from stepmoe.comm.cost_check import check_on_published
from stepmoe.measure import load_each, save
from stepmoe.predict import (
    MODEL_ERROR,
    Assumptions,
    Compute,
    collectives,
    compute_of_run,
    pooled,
    predict,
    sensitivity,
)

FLASH = sm.Step3p5Config.flash()
COMPUTE = Compute(0.17, 0.16, 0.18, "made up")
UNIT = Assumptions(link=Link("unit", 0.0, 1e9, ""), algorithm="ring")


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_the_collectives_are_those_of_a_ledger(variant):
    config = sm.Step3p5Config.tiny()
    parallel = sm.ParallelConfig(4, 2, simulate_rank=0)
    model = sm.Step3p5ForCausalLM.from_config(config, variant, parallel, dtype=torch.bfloat16)
    with sm.Ledger() as ledger:
        model(torch.ones(2, 8, dtype=torch.int64))
    found = {}
    for entry in ledger.entries:
        op = "all_reduce" if entry.op.startswith("all_reduce") else entry.op
        found[op, entry.bytes] = found.get((op, entry.bytes), 0) + 1
    nbytes = 16 * config.hidden_size * 2
    assert {(op, size): n for op, size, n in collectives(config, variant, nbytes)} == found


def test_a_step_by_hand():
    # 8 ranks: a ring all_reduce sends 2 x 7/8 of 16384 x 4096 x 2 bytes, at 1e9 bytes/s.
    one = 1.75 * 16384 * 4096 * 2 / 1e9
    step = predict(FLASH, "deferred", COMPUTE, UNIT)
    assert step.communication == pytest.approx(90 * one)
    assert step.seconds == pytest.approx(0.17 + 90 * one)
    assert step.low == pytest.approx(0.16 + 90 * one * (1 - MODEL_ERROR))
    assert step.high == pytest.approx(0.18 + 90 * one * (1 + MODEL_ERROR))
    assert step.tokens_per_second == pytest.approx(16384 / step.seconds)
    three = predict(FLASH, "three_all_reduces", COMPUTE, UNIT)
    assert three.communication - step.communication == pytest.approx(42 * one)
    waiting = Assumptions(UNIT.link, "ring", 0.5, imbalance=1.4, expert_share=0.5, idle=0.2)
    slow = predict(FLASH, "deferred", COMPUTE, waiting)
    assert slow.compute == pytest.approx(0.17 * 0.5 * 1.2)
    assert slow.idle / slow.seconds == pytest.approx(0.2)
    assert slow.low < slow.seconds < slow.high


def test_the_interval_covers_the_model_s_error_on_unfitted_sizes():
    assert check_on_published((1, 128), algorithm="pipelined").worst() <= MODEL_ERROR


def test_the_parts_of_the_gain_add_up():
    shares = attribute(FLASH)
    before, after = 16384 / 46e3, 16384 / 56e3
    assert sum(share.seconds for share in shares) == pytest.approx(before - after)
    by_name = {share.name: share for share in shares}
    # FACTS of the source: 42 all-reduces of 128 MiB at 0.561 ms.
    assert by_name["fewer all-reduces"].seconds == pytest.approx(42 * 0.561e-3, rel=0.01)
    assert by_name["not explained"].seconds > by_name["fewer all-reduces"].seconds
    assert by_name["fused all-reduce"].seconds == by_name["reduce-scatter"].seconds == 0


def test_the_bandwidth_that_would_explain_it_does():
    link = Link("slow", 0.0, explaining_bandwidth(FLASH), "")
    shares = attribute(FLASH, Assumptions(link, "ring"))
    assert shares[0].seconds == pytest.approx(16384 / 46e3 - 16384 / 56e3)
    assert link.bandwidth < LINKS["nvlink4"].bandwidth / 2


def test_compute_is_taken_from_what_was_measured():
    row = {"variant": "deferred", "phase": "prefill", "median": 5.0, "p10": 4.0, "p90": 7.0}
    row |= {"stand_in": 1.0, "steps": 3}
    frame = pd.DataFrame([row, row | {"phase": "decode", "median": 99.0}])
    frame.attrs = {"hardware": {"gpus": ["X"]}, "dtype": "bfloat16", "parallel": {"tp": 8}}
    found = compute_of_run(frame)["deferred"]
    assert (found.seconds, found.low, found.high) == (4, 3, 6)
    assert found.source == "X, bfloat16, one rank of 8, 3 steps"
    frame.attrs["quantization"] = {"weights": "fp8"}
    assert "FP8 weights" in compute_of_run(frame)["deferred"].source


def test_what_computes_the_same_is_pooled():
    names = ("three_all_reduces", "deferred", "fused", "reduce_scatter")
    times = ((6, 5, 7), (8, 7, 30), (5, 4, 6), (3, 2, 9))
    computes = {name: Compute(*time, "X") for name, time in zip(names, times, strict=True)}
    found = pooled(computes)
    assert {found[name] for name in names[:3]} == {Compute(6, 4, 30, "X a variant")}
    assert list(found) == list(names)
    assert found["reduce_scatter"] == computes["reduce_scatter"]
    assert pooled({"reduce_scatter": computes["reduce_scatter"]})["reduce_scatter"].seconds == 3
    assert pooled({"fused": computes["fused"]}) == {"fused": computes["fused"]}


def test_every_recorded_gpu_is_found(tmp_path):
    found = load_each("notebooks/results", "prefill")
    assert {"h100", "h200"} <= set(found)
    for frame in found.values():
        assert frame.attrs["parallel"]["simulate_rank"] is not None
        assert set(pooled(compute_of_run(frame))) == set(sm.VARIANTS)
    # A file more is a row more, without another line of code.
    for name in ("h100", "h200"):
        save(found["h100"], tmp_path / f"{name}_prefill.json")
    save(found["h100"], tmp_path / "h200_prefill_skewed.json")
    assert list(load_each(tmp_path, "prefill")) == ["h100", "h200"]


def test_every_assumption_moves_the_prediction():
    speeds = sensitivity(FLASH, COMPUTE)
    assert all(low < high for low, high in speeds.values())
    widths = [high - low for low, high in speeds.values()]
    assert widths == sorted(widths, reverse=True)


def test_pictures_say_what_is_recorded_modelled_and_published():
    predictions = [predict(FLASH, v, COMPUTE) for v in sm.VARIANTS]
    steps = charts.predicted_steps({"made up": predictions, "another": predictions})
    check_legible(steps)
    words = " ".join(
        text.get_text() for text in steps.findobj(match=lambda a: hasattr(a, "get_text"))
    )
    for needed in ("recorded", "modelled", "published", "ms a step", "before", "another"):
        assert needed in words
    fall = charts.gain_waterfall(attribute(FLASH))
    words = " ".join(
        text.get_text() for text in fall.findobj(match=lambda a: hasattr(a, "get_text"))
    )
    assert "explained\n(unknown)" in words
    assert "not exercised" in words
    charts.assumptions_matter(sensitivity(FLASH, COMPUTE)).canvas.draw()


def test_a_slider_moves_the_prediction():
    from stepmoe.widgets import PredictionExplorer

    fast = Compute(0.1, 0.1, 0.1, "made up")
    gpus = {"X": dict.fromkeys(sm.VARIANTS, COMPUTE), "Y": dict.fromkeys(sm.VARIANTS, fast)}
    explorer = PredictionExplorer(FLASH, gpus)
    before, picture = explorer.predictions, explorer.picture.value
    explorer.bandwidth.value = 150
    assert explorer.picture.value != picture
    assert all(a.seconds > b.seconds for a, b in zip(explorer.predictions, before, strict=True))
    explorer.idle.value = 0.4
    assert "150 GB/s" in explorer.summary()
    assert "idle 40%" in explorer.summary()
    before = explorer.predictions
    explorer.gpu.value = "Y"
    assert all(a.seconds < b.seconds for a, b in zip(explorer.predictions, before, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Compute(1.0, 2.0, 3.0, ""), "between 2.0 and"),
        (lambda: Assumptions(imbalance=0.5), "imbalance=0.5"),
        (lambda: Assumptions(idle=1.0), "idle=1.0"),
        (lambda: collectives(FLASH, "ring", 1), "variant 'ring'"),
        (lambda: explaining_bandwidth(FLASH, 5.0, 4.0), "below after=4.0"),
        (lambda: charts.predicted_steps({}), "no prediction"),
        (lambda: charts.predicted_steps({"X": []}), "no prediction"),
        (lambda: load_each("tests", "prefill"), "tests holds no file"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(sm.ConfigError, match=message):
        call()
