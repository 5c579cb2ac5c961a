"""From what ranks recorded to a frame, to a file and back, to a table and to pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_charts import check_legible, words

import stepmoe as sm
from stepmoe import charts
from stepmoe.measure.environment import Place
from stepmoe.measure.frame import build_frame
from stepmoe.measure.plan import Plan
from stepmoe.measure.report import provenance, table, where
from stepmoe.measure.rounds import CaseRecord, RankRecord, Split
from stepmoe.measure.speedup import NO_DIFFERENCE
from stepmoe.measure.timeline import Profile
from stepmoe.measure.traces import Event, events_of, merged

PLACE = Place(
    host="node7",
    device="cpu",
    gpu="",
    cpu="A CPU",
    cores=2,
    threads=1,
    backend="gloo",
    cache_bytes=2**25,
    cache_source="made up",
    versions={"stepmoe": "0.1.0", "torch": "2.13.0"},
)
ROUNDS = 8
# Seconds of a round; fused is as fast as the baseline, deferred faster.
BASE = {"three_all_reduces": 8e-3, "deferred": 6e-3, "fused": 8e-3, "reduce_scatter": 9e-3}


def made_up(tokens=(1, 64), variants=sm.VARIANTS, tp=2, phases=("prefill", "decode")):
    """What two ranks might have measured; rank 1 is 10 % slower in its computation."""
    plan = Plan.of(
        sm.Step3p5Config.tiny(), variants, tokens, sm.ParallelConfig(tp), phases, 8, 1, None, 0
    )
    records = []
    for rank in range(tp):
        cases = []
        for case in plan.cases:
            record = CaseRecord(case, 4, 1000)
            for turn in range(ROUNDS):
                record.order.append(plan.order(turn))
                for number, name in enumerate(plan.variants):
                    wobble = 1 + 0.01 * ((turn * 5 + number * 3) % ROUNDS)
                    total = BASE.get(name, 8e-3) * wobble * (1 + 0.1 * rank) * case.tokens**0.2
                    record.plain.setdefault(name, []).append(total)
                    split = Split(1.1 * total, 0.3 * total, 0.2 * total)
                    record.split.setdefault(name, []).append(split)
                    record.counts[name] = {"all_reduce": 10, "all_gather": 1}
                    record.bytes_sent[name] = 1536.0 * case.tokens
            cases.append(record)
        records.append(RankRecord(PLACE, 1e-4, cases))
    return plan, records


@pytest.fixture
def frame():
    return build_frame(*made_up())


def test_a_row_a_variant_phase_and_count(frame):
    assert len(frame) == 4 * 2 * 2
    assert list(frame["phase"].unique()) == ["prefill", "decode"]
    first = frame.iloc[0]
    assert (first["variant"], first["tokens"], first["repeats"]) == ("three_all_reduces", 1, ROUNDS)
    assert (first["collectives"], first["counts"]) == (11, {"all_reduce": 10, "all_gather": 1})
    # The slowest rank's time: 8 ms, 10 % more on rank 1, a wobble of 0 to 7 %.
    assert first["median"] == pytest.approx(8e-3 * 1.1 * 1.035, rel=1e-9)
    assert first["p10"] < first["median"] < first["p90"]


def test_the_parts_are_the_mean_rank_s_and_add_up(frame):
    for row in frame.to_dict("records"):
        # Every round has the same proportions, so that medians add up but for rounding.
        parts = row["compute"] + row["communication"] + row["waiting"]
        assert parts == pytest.approx(row["split_total"], rel=1e-12)
        assert row["split_total"] == pytest.approx(row["median"] / 1.1 * 1.05 * 1.1, rel=1e-9)
        assert row["split_overhead"] == pytest.approx(0.1, rel=1e-9)
        assert row["communication"] == pytest.approx(0.3 / 1.1 * row["split_total"], rel=1e-9)


def test_verdicts(frame):
    verdicts = {row["variant"]: row["verdict"] for row in frame.to_dict("records")}
    assert verdicts == {
        "three_all_reduces": "the baseline",
        "deferred": "faster",
        "fused": NO_DIFFERENCE,
        "reduce_scatter": "slower",
    }
    fused = frame[frame["variant"] == "fused"]
    assert (fused["speedup_low"] <= 1).all()
    assert (fused["speedup_high"] >= 1).all()
    alone = build_frame(*made_up(variants=["deferred"]))
    assert alone["speedup"].isna().all()
    assert set(alone["verdict"]) == {"three_all_reduces was not measured"}


def test_attributes_say_what_it_was_measured_on(frame):
    attrs = frame.attrs
    assert attrs["hardware"]["ranks"] == 2
    assert attrs["hardware"]["cpu"] == "A CPU"
    assert attrs["versions"] == PLACE.versions
    assert (attrs["dtype"], attrs["seed"], attrs["recorded"]) == ("float32", 0, False)
    assert attrs["parallel"] == sm.ParallelConfig(2).__dict__
    assert attrs["config"]["num_experts"] == 16
    assert "compare_latency(config, ['three_all_reduces'" in attrs["command"]
    assert attrs["order"][1] == [*sm.VARIANTS[1:], "three_all_reduces"]
    assert attrs["meeting"] == 1e-4
    assert not attrs["inputs"][0]["exceed_cache"]
    assert len(attrs["samples"][0]["seconds"]) == ROUNDS
    assert "node7" not in json.dumps(attrs)  # host names tell ranks apart, and go no further


@pytest.mark.parametrize("variants", [sm.VARIANTS, ["deferred"]])
def test_json_gives_back_every_digit(tmp_path: Path, variants):
    frame = build_frame(*made_up(variants=variants))
    file = tmp_path / "latency.json"
    sm.measure.save(frame, file)
    again = sm.measure.load(file)
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    assert again.attrs == {**frame.attrs, "recorded": True}
    sm.measure.save(again, file)
    pd.testing.assert_frame_equal(sm.measure.load(file), frame, check_exact=True)
    # pandas alone reads the rows; to 15 digits.
    alone = pd.read_json(file, orient="table")
    assert list(alone.columns) == list(frame.columns)
    assert alone["median"].tolist() == pytest.approx(frame["median"].tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not JSON"),
        ('{"format": "other"}', "no measurement.*'other'"),
        ("[1, 2]", "no measurement"),
        ('{"format": "stepmoe latency 1"}', "damaged"),
        ('{"format": "stepmoe latency 1", "attrs": {}, "schema": {"fields": []}, "data": []}', "."),
    ],
)
def test_loading_something_else_says_so(tmp_path: Path, content, message):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(sm.ConfigError, match=message):
        sm.measure.load(file)


def test_files_that_cannot_be(tmp_path: Path, frame):
    with pytest.raises(sm.ConfigError, match=r"nowhere\.json cannot be read"):
        sm.measure.load(tmp_path / "nowhere.json")
    with pytest.raises(sm.ConfigError, match="no folder"):
        sm.measure.save(frame, tmp_path / "no" / "latency.json")
    with pytest.raises(sm.ConfigError, match="not what compare_latency returned"):
        sm.measure.save(pd.DataFrame({"a": [1]}), tmp_path / "a.json")


def test_where():
    hardware = {"ranks": 4, "gpus": [], "hosts": 1, "cores": 2, "cpu": "A CPU", "backend": "gloo"}
    assert where(hardware) == "4 CPU ranks on 2 cores (A CPU), gloo"
    gpus = {**hardware, "gpus": ["H200"] * 4, "backend": "nccl"}
    assert where(gpus) == "4 ranks on 4 x H200, nccl"
    assert where({**gpus, "gpus": ["H200"]}) == "4 ranks taking turns on 1 x H200, nccl"
    assert where({**gpus, "hosts": 2}) == "4 ranks on 4 x H200, nccl, 2 hosts"
    assert where({**gpus, "gpus": ["H200"], "ranks": 1}) == "1 rank on 1 x H200"


def test_the_table_has_units_spread_and_verdict(frame):
    text = table(frame)
    assert "prefill, 64 tokens (1 x 64 new)" in text
    assert "decode, 64 tokens (64 x 1 new, 16 cached each)" in text
    line = next(line for line in text.splitlines() if line.startswith("deferred"))
    assert "faster" in line
    assert "1.5" in line  # KiB sent
    assert "median ms" in text
    assert "live: 2 CPU ranks on 2 cores (A CPU), gloo, float32" in text
    assert "A meeting takes 100 µs" in text
    assert "smaller together for prefill 1, prefill 64, decode 1, decode 64" in text


def recorded_of(frame, tmp_path):
    sm.measure.save(frame, tmp_path / "r.json")
    return sm.measure.load(tmp_path / "r.json")


@pytest.mark.parametrize("draw", [charts.latency, charts.where_the_time_goes, charts.speedup])
def test_charts_are_legible_and_say_live_or_recorded(draw, frame, tmp_path: Path):
    figure = draw(frame, recorded_of(frame, tmp_path), title="Live and recorded")
    check_legible(figure)
    shown = " ".join(words(figure))
    assert provenance(frame.attrs) in shown
    assert "live: 2 CPU ranks on 2 cores (A CPU), gloo, float32" in shown
    assert f"recorded {frame.attrs['date'][:10]}: 2 CPU ranks" in shown
    check_legible(draw(frame[frame["phase"] == "prefill"]))
    check_legible(draw(frame[frame["tokens"] == 64]))
    check_legible(draw(build_frame(*made_up(tokens=(1, 8, 64, 1024)))))


def test_latency_draws_medians_with_their_spread(frame):
    axes = charts.latency(frame).axes[0]
    line = axes.containers[0].lines[0]
    rows = frame[(frame["variant"] == "three_all_reduces") & (frame["phase"] == "prefill")]
    assert list(line.get_ydata()) == pytest.approx((rows["median"] * 1e3).tolist())
    reach = axes.containers[0].lines[2][0].get_segments()[0]
    assert reach[:, 1].tolist() == pytest.approx((rows.iloc[0][["p10", "p90"]] * 1e3).tolist())


def test_stacks_are_as_long_as_the_parts(frame):
    axes = charts.where_the_time_goes(frame).axes[0]
    drawn = [patch.get_width() for container in axes.containers for patch in container]
    row = frame.iloc[0]
    parts = [row[name] * 1e3 for name in ("compute", "communication", "waiting")]
    assert drawn[:3] == pytest.approx(parts)
    assert len(drawn) == 12


def test_speedup_names_what_it_does_not_see(frame):
    shown = words(charts.speedup(frame))
    assert shown.count(NO_DIFFERENCE) == 4  # fused, in every panel
    assert sum("faster" in text for text in shown) == 4
    with pytest.raises(sm.ConfigError, match="against three_all_reduces"):
        charts.speedup(frame[frame["variant"] == "fused"])


def test_charts_refuse_what_they_cannot_draw(frame):
    for draw in (charts.latency, charts.where_the_time_goes, charts.speedup):
        with pytest.raises(sm.ConfigError, match="no frame"):
            draw()
        with pytest.raises(sm.ConfigError, match="not what compare_latency returned"):
            draw(pd.DataFrame({"variant": ["fused"]}))
        with pytest.raises(sm.ConfigError, match="no row"):
            draw(frame[frame["tokens"] == 3])


def test_variants_of_one_s_own_are_drawn_apart():
    from stepmoe.variants import DeferredLayer

    own = [type(name, (DeferredLayer,), {}) for name in ("Mine", "Yours")]
    frame = build_frame(*made_up(variants=["three_all_reduces", *own]))
    figure = charts.latency(frame)
    assert {"Mine", "Yours"} <= set(words(figure))
    markers = {container.lines[0].get_marker() for container in figure.axes[0].containers}
    assert len(markers) == 3


def trace(base=1_000_000, shift=0.0):
    """A step of 100 µs: attention with a nested operation, then an all_reduce."""

    def event(cat, name, ts, dur, tid=5):
        return {
            "ph": "X", "cat": cat, "name": name, "ts": ts + shift, "dur": dur, "pid": 77, "tid": tid
        }  # fmt: skip

    return {
        "baseTimeNanoseconds": base,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 77, "args": {"name": "python"}, "ts": 0},
            event("Trace", "PyTorch Profiler", 0, 500) | {"pid": "Spans"},
            event("cpu_op", "aten::before", 1, 2),
            event("user_annotation", "stepmoe forward", 10, 100),
            event("user_annotation", "stepmoe::attention, layer 0", 20, 30),
            event("cpu_op", "aten::linear", 22, 10),
            event("cpu_op", "aten::mm", 23, 8),
            event("cpu_op", "aten::add", 40, 5),
            event("user_annotation", "stepmoe::all_reduce, layer 0, o_proj", 60, 30),
            event("cpu_op", "c10d::allreduce_", 61, 3),
            event("user_annotation", "gloo:all_reduce", 62, 25, tid=6),
            event("cpu_op", "aten::linear", 95, 4),
            {"ph": "s", "id": 3, "pid": 77, "tid": 5, "ts": 61 + shift, "name": "x", "cat": "c"},
        ],
    }


def test_events_are_steps_and_outermost_operations():
    found = list(events_of(trace(), "cpu", ["all_reduce"]))
    zero = 1e-3
    assert [(event.kind, event.name, event.op) for event in found] == [
        ("step", "attention, layer 0", "attention"),
        ("op", "aten::linear", "attention"),
        ("op", "aten::add", "attention"),
        ("collective", "all_reduce, layer 0, o_proj", "all_reduce"),
        ("op", "aten::linear", ""),
    ]
    assert found[3] == Event(
        "collective", "all_reduce, layer 0, o_proj", "all_reduce",
        pytest.approx(zero + 60e-6), pytest.approx(30e-6),
    )  # fmt: skip


def gpu_trace(collective_stream):
    """The GPU is behind the host; its collective runs on a stream of its own, or with the rest."""

    def event(cat, name, ts, dur, tid):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid}

    reduce = "stepmoe::all_reduce, layer 0, o_proj"
    return {
        "baseTimeNanoseconds": 0,
        "traceEvents": [
            event("user_annotation", "stepmoe forward", 0, 60, 99),
            event("user_annotation", "stepmoe::attention, layer 0", 2, 8, 99),
            event("cpu_op", "aten::linear", 3, 2, 99),
            event("user_annotation", reduce, 12, 40, 99),
            event("gpu_user_annotation", "stepmoe forward", 10, 60, 7),
            event("gpu_user_annotation", "stepmoe forward", 30, 5, collective_stream),
            event("gpu_user_annotation", "stepmoe::attention, layer 0", 10, 15, 7),
            event("kernel", "gemm", 11, 3, 7),
            event("gpu_user_annotation", reduce, 30, 5, collective_stream),
            event("kernel", "nccl", 30, 5, collective_stream),
        ],
    }


@pytest.mark.parametrize("stream", [7, 101])
def test_on_a_gpu_events_are_the_gpu_s_but_for_what_the_host_waits_in(stream):
    found = list(events_of(gpu_trace(stream), "cuda", ["all_reduce"]))
    assert [(event.kind, event.op, round(event.start * 1e6)) for event in found] == [
        ("step", "attention", 10),
        ("op", "attention", 11),
        ("collective", "all_reduce", 30),
    ]
    over_gloo = list(events_of(gpu_trace(101), "cuda", ["all_reduce"], host_waits=True))
    assert [(event.kind, round(event.seconds * 1e6)) for event in over_gloo] == [
        ("step", 15),
        ("op", 3),
        ("collective", 40),
    ]


def test_merged_traces_are_on_one_clock_with_the_rank_as_pid():
    # The second rank's trace counts from 5 µs later, and so from 5 µs less.
    both = merged([trace(), trace(base=1_005_000, shift=-5.0)])["traceEvents"]
    for pid in (0, 1):
        own = [event for event in both if event["pid"] == pid]
        assert {"name": f"rank {pid}"} in [event.get("args") for event in own]
        starts = [event["ts"] for event in own if event["name"] == "stepmoe forward"]
        assert starts == pytest.approx([9.0])
    assert {event["pid"] for event in both} == {0, 1}
    assert {event["id"] for event in both if "id" in event} == {"0.3", "1.3"}
    assert "python" not in json.dumps(both)


def test_profile_is_drawn_a_lane_a_rank(tmp_path: Path):
    rows = [
        {"rank": rank, **vars(event)}
        for rank in range(2)
        for event in events_of(trace(), "cpu", ["all_reduce"])
    ]
    frame = pd.DataFrame(rows)
    frame["start"] -= frame["start"].min()
    hardware = build_frame(*made_up()).attrs["hardware"]
    attrs = {
        "variant": "deferred", "hardware": hardware, "dtype": "float32", "recorded": False,
        "date": "2026-01-01",
    }  # fmt: skip
    profile = Profile(frame, attrs, [trace(), trace()])
    figure = charts.profile_timeline(profile, "One step")
    check_legible(figure)
    shown = words(figure)
    assert {"rank 0", "rank 1", "attention", "AR = all_reduce"} <= set(shown)
    assert any("of deferred, profiled  (live: 2 CPU ranks" in text for text in shown)
    assert len([p for c in figure.axes[0].containers for p in c]) == len(frame)
    profile.save_chrome_trace(tmp_path / "trace.json")
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
    with pytest.raises(sm.ConfigError, match="no folder"):
        profile.save_chrome_trace(tmp_path / "no" / "trace.json")


def test_one_process_measures_itself(tmp_path: Path):
    frame = sm.measure.compare_latency(
        sm.Step3p5Config.tiny(), ["three_all_reduces", "fused"], [2], repeats=6, warmup=1,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert (frame["collectives"] == 0).all()
    assert (frame["waiting"] == 0).all()
    assert (frame["median"] > 0).all()
    assert frame.attrs["dtype"] == "bfloat16"
    assert "1 CPU rank on" in provenance(frame.attrs)
