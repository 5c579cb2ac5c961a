"""The fit and the comparison with predictions, on synthetic results whose truth is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import stepmoe as sm
from stepmoe.comm.cost import LINKS, Link, collective_time
from stepmoe.measure import load, save
from stepmoe.multi_gpu.fit import collective_terms, fit_link, step_terms
from stepmoe.multi_gpu.report import recorded_compute, report, table
from stepmoe.predict import Compute, compute_of_run, pooled

RECORDED = Path(__file__).parents[2] / "notebooks/results/h100_prefill.json"
TRUTH = Link("synthetic", 1.3e-6, 310e9, "made up for this test")
TOKENS = [1, 8, 64, 512, 1024, 2048, 4096, 8192, 16384]


def synthetic_collectives(noise=0.02, seed=0):
    """What bench-fusion would write on 8 GPUs linked as TRUTH says; the noise is log-normal."""
    random, rows = np.random.default_rng(seed), []
    for tokens in TOKENS:
        size = tokens * 4096 * 2
        halves = [collective_time(op, size, 8, TRUTH, "pipelined")
                  for op in ("reduce_scatter", "all_gather")]  # fmt: skip
        times = {
            "all_reduce": collective_time("all_reduce", size, 8, TRUTH, "pipelined"),
            "reduce_scatter + all_gather": sum(halves),
        }
        times["unfused"] = times["all_reduce"] + 4e-6
        times["triton one-shot"] = times["unfused"] / 1.5
        for name, seconds in times.items():
            microseconds = seconds * 1e6 * random.lognormal(0, noise)
            row = {"tokens": tokens, "implementation": name, "median_us": microseconds}
            rows.append(row | {"error": 4e-3 - 1e-7 * tokens})
        rows.append({"tokens": tokens, "implementation": "flashinfer one-shot", "refusal": "none"})
    return {
        "format": "stepmoe fused operation 1",
        "synthetic": True,
        "hidden_size": 4096,
        "hardware": {"ranks": 8},
        "rows": rows,
    }


def test_the_truth_lies_in_the_intervals():
    """Each holds it 19 times of 20; fewer than 50 of 60 comes once in 1000."""
    latencies = bandwidths = 0
    for seed in range(60):
        found = fit_link(synthetic_collectives(seed=seed))
        latencies += found.latency[0] <= TRUTH.latency <= found.latency[1]
        bandwidths += found.bandwidth[0] <= TRUTH.bandwidth <= found.bandwidth[1]
        assert found.link.bandwidth == pytest.approx(TRUTH.bandwidth, rel=0.1)  # 2 % noise, 9 sizes
    assert latencies >= 50
    assert bandwidths >= 50


def test_terms_of_the_collectives():
    content = synthetic_collectives(noise=0)
    terms = {term.name: term for term in collective_terms(content, fit_link(content))}
    assert terms["bandwidth"].ratio == pytest.approx(
        TRUTH.bandwidth / LINKS["nccl_sm90"].bandwidth, rel=1e-6
    )
    assert terms["latency of a step"].measured == pytest.approx(1.3, rel=1e-6)
    assert len(terms) == 2 + 2 * len(TOKENS)
    largest = terms["all_reduce, 128 MiB"]
    before = collective_time("all_reduce", 2**27, 8, LINKS["nccl_sm90"], "pipelined")
    assert largest.predicted == pytest.approx(before * 1e6)
    for name, term in terms.items():
        if term.fitted is not None:
            assert term.fitted == pytest.approx(term.measured, rel=1e-6), name


def test_two_sizes_are_too_few():
    content = synthetic_collectives()
    content["rows"] = [row for row in content["rows"] if row["tokens"] in TOKENS[:2]]
    with pytest.raises(sm.ConfigError, match="needs three sizes of all_reduce, got 2"):
        fit_link(content)


def synthetic_prefill(compute=1.1, communication=1.5, waiting=0.01):
    """The recorded share of one rank, made into a run of 8: factors on what was predicted."""
    frame = load(RECORDED)
    one_rank = pooled(compute_of_run(frame))
    frame.attrs["parallel"] = frame.attrs["parallel"] | {"simulate_rank": None}
    frame.attrs["hardware"] = frame.attrs["hardware"] | {"gpus": ["synthetic"] * 8, "ranks": 8}
    frame.attrs |= {"method": "synthetic", "recorded": True}
    frame["compute"] = [one_rank[name].seconds * compute for name in frame["variant"]]
    link = LINKS["nccl_sm90"]
    frame["communication"] = [
        communication
        * sum(
            part["count"]
            * collective_time(
                part["op"].removesuffix("_add_rms_norm"), part["bytes"], 8, link, "pipelined"
            )
            for part in row["sent"]
        )
        for row in frame.to_dict("records")
    ]
    frame["waiting"] = waiting
    frame["median"] = frame["compute"] + frame["communication"] + waiting
    frame["tokens_per_second"] = frame["tokens"] / frame["median"]
    frame["speedup"] = frame["tokens_per_second"] / frame["tokens_per_second"].iloc[0]
    frame["speedup_low"], frame["speedup_high"] = frame["speedup"] - 0.01, frame["speedup"] + 0.01
    frame["verdict"] = "synthetic"
    return frame


def test_terms_of_a_step():
    frame = synthetic_prefill()
    compute, remark = recorded_compute(RECORDED, frame)
    assert "NVIDIA H100" in remark
    found = step_terms(frame, compute, fit_link(synthetic_collectives(noise=0)))
    terms = {term.name: term for term in found}
    assert len(terms) == 5 * len(sm.VARIANTS)
    for name in sm.VARIANTS:
        assert terms[f"{name}: compute"].ratio == pytest.approx(1.1)
        # The ledger of the recorded rank says how often each size was sent; predict counts itself.
        assert terms[f"{name}: communication"].ratio == pytest.approx(1.5)
        assert terms[f"{name}: waiting"].predicted is None
        assert terms[f"{name}: waiting"].measured == pytest.approx(10)
        parts = (terms[f"{name}: {part}"] for part in ("compute", "communication", "waiting"))
        assert terms[f"{name}: step"].measured == pytest.approx(sum(p.measured for p in parts))
        speed = terms[f"{name}: throughput"]
        assert speed.measured == pytest.approx(16384 / terms[f"{name}: step"].measured * 1e3)
    lines = table(found).splitlines()
    assert "1.50" in lines[2]
    assert "left out" in lines[3]


def test_another_share_is_not_compared():
    frame = synthetic_prefill()
    frame.attrs["layers"] = [0, 1, 2]
    compute, remark = recorded_compute(RECORDED, frame)
    assert compute == {}
    assert "is of layers None, this run of [0, 1, 2]: steps not compared" in remark
    terms = step_terms(frame, {"deferred": Compute(1, 1, 1, "")}, fit_link(synthetic_collectives()))
    assert [term.name for term in terms] == [
        f"deferred: {part}"
        for part in ("compute", "communication", "waiting", "step", "throughput")
    ]
    # Three of the 45 layers: dense ones, of two collectives each, and what comes once a step.
    link, size = LINKS["nccl_sm90"], 16384 * 4096 * 2
    one = collective_time("all_reduce", size, 8, link, "pipelined") * 1e3
    assert 6 * one < terms[1].predicted < 8 * one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(dtype="float16"), "is of dtype bfloat16, this run of float16"),
        (lambda a: a.update(quantization={"weights": "fp8"}), "is of quantization None, this run"),
        (lambda a: a["workload"].update(input_len=4096), "is of input_len 8192, this run of 4096"),
        (lambda a: a["workload"].update(chunk=8192), "is of chunk 16384, this run of 8192"),
        (lambda a: a["config"].update(num_experts=16), "config.num_experts 288, this run of 16"),
        (lambda a: a["parallel"].update(ep=2), "'ep': 4, 'attention': 'tp'}, this run of {'tp'"),
    ],
)
def test_other_steps_are_not_compared(change, message):
    frame = synthetic_prefill()
    change(frame.attrs)
    compute, remark = recorded_compute(RECORDED, frame)
    assert compute == {}
    assert message in remark


def test_times_that_nothing_fits_are_named(monkeypatch):
    def no_convergence(*_, **__):
        raise RuntimeError("maxfev = 600")

    monkeypatch.setattr("scipy.optimize.curve_fit", no_convergence)
    with pytest.raises(sm.ConfigError, match=r"no link fits the 9 times .*maxfev = 600"):
        fit_link(synthetic_collectives())
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(sm.ConfigError, match="needs scipy, which is not installed"):
        fit_link(synthetic_collectives())


def keep(folder, **contents):
    """A folder of finished steps."""
    for step, content in contents.items():
        if not isinstance(content, dict):
            save(content, folder / f"{step}.json")
            content = json.loads((folder / f"{step}.json").read_text())
        content["run"] = {
            "step": step,
            "status": "done",
            "seconds": 1.0,
            "date": "2026-11-25T12:00:00",
            "setting": {"ranks": 8, "device": "cuda", "shape": "flash", "gpu": "synthetic"},
            "rehearsal": False,
            "machine": {"links": ["NV18"]},
        }
        (folder / f"{step}.json").write_text(json.dumps(content))


def test_the_report_of_a_folder(tmp_path):
    frame, collectives = synthetic_prefill(), synthetic_collectives(noise=0)
    keep(tmp_path, prefill=frame, collectives=collectives)
    text = report(tmp_path, RECORDED)
    assert "8 ranks, synthetic, linked by NV18" in text
    assert "Fitted link: latency 1.30 µs (1.30 to 1.30), bandwidth 310 GB/s (310 to 310)." in text
    assert "Up to 64 tokens at least 1.50x. Largest relative error against float64: 4.0e-03" in text
    assert f"flashinfer one-shot did not run at {', '.join(map(str, TOKENS))} tokens" in text
    best = frame.loc[frame["tokens_per_second"].idxmax()]
    assert f"Best: {best['variant']}, {best['tokens_per_second']:,.0f} tokens/s (publ" in text
    assert "8 H200 in FP8: 63,213)" in text
    terms = step_terms(frame, recorded_compute(RECORDED, frame)[0], fit_link(collectives))
    assert len(terms) == 5 * len(sm.VARIANTS)
    assert text.endswith(table(terms))
    assert "not compared" not in text


def test_a_report_says_what_it_lacks(tmp_path):
    frame = synthetic_prefill()
    keep(tmp_path, prefill=frame)
    text = report(tmp_path, None)
    assert "No link is fitted: step collectives is not done." in text
    assert "not compared with their prediction without --compute FILE" in text
    compute, _ = recorded_compute(RECORDED, frame)
    text = report(tmp_path, RECORDED)
    assert "No link is fitted: step collectives is not done." in text
    assert text.endswith(table(step_terms(frame, compute, None)))
    keep(tmp_path, collectives=synthetic_collectives())
    text = report(tmp_path, None)
    assert "No link is fitted" not in text
    assert "not compared with their prediction without --compute FILE" in text
    frame.attrs["layers"] = [0, 1, 2, 3]
    frame.attrs["parallel"] = frame.attrs["parallel"] | {"tp": 2, "ep": 1}
    keep(tmp_path, prefill=frame)
    text = report(tmp_path, RECORDED)
    assert "4 of 45 layers on 2 GPUs: not comparable with the published figures" in text
    assert "63,213" not in text


def test_a_report_goes_on_without_a_fit_and_says_why(tmp_path, monkeypatch):
    """Too few sizes, no scipy: what was measured stands beside what was predicted all the same."""
    frame, collectives = synthetic_prefill(), synthetic_collectives(noise=0)
    fitted = step_terms(frame, recorded_compute(RECORDED, frame)[0], fit_link(collectives))
    collectives["rows"] = [row for row in collectives["rows"] if row["tokens"] in TOKENS[:2]]
    keep(tmp_path, prefill=frame, collectives=collectives)
    text = report(tmp_path, RECORDED)
    assert "No link is fitted: a fit with intervals needs three sizes of all_reduce, got 2." in text
    assert "Best fused implementation against all_reduce + add + norm" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("all_reduce, ")]
    assert [row[-2:] for row in rows] == [["-", "µs"]] * 2  # two sizes, none fitted
    link = LINKS["nccl_sm90"]
    before = collective_time("all_reduce", 8 * 4096 * 2, 8, link, "pipelined") * 1e6
    after = collective_time("all_reduce", 8 * 4096 * 2, 8, TRUTH, "pipelined") * 1e6
    assert [float(number) for number in rows[1][3:6]] == pytest.approx(
        [before, after, after / before],
        rel=0.01,  # printed to three digits
    )
    assert "latency of a step" not in text
    terms = step_terms(frame, recorded_compute(RECORDED, frame)[0], None)
    assert text.endswith(table(terms))
    assert all(term.fitted is None for term in terms)
    same = [(term.name, term.predicted, term.measured, term.unit) for term in terms]
    assert same == [(term.name, term.predicted, term.measured, term.unit) for term in fitted]
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert "No link is fitted: the fit needs scipy, which is not installed" in report(
        tmp_path, RECORDED
    )


def test_compute_of_another_kind_is_refused(tmp_path):
    keep(tmp_path, prefill=synthetic_prefill())
    latency = RECORDED.with_name("cpu_tiny_tp2.json")
    with pytest.raises(sm.ConfigError, match=r"cpu_tiny_tp2.json: is not what prefill --json wr"):
        report(tmp_path, latency)
