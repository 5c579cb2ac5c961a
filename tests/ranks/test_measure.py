"""Measuring on real ranks. Times are noisy here: what is asserted holds on a loaded machine too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import stepmoe as sm
from stepmoe.comm.ledger import split_waiting
from stepmoe.variants import DeferredLayer

ROOT = Path(__file__).parents[2]
TINY = sm.Step3p5Config.tiny()


def calls_of_one_step(splits, records):
    """How many all_reduces torch carries out in a step, and what the ledger says of it."""
    model = sm.Step3p5ForCausalLM.from_config(TINY, "deferred", sm.ParallelConfig(4))
    ids = torch.arange(8).view(1, 8)
    real, calls = dist.all_reduce, []
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    ledger = sm.Ledger()
    try:
        if splits and records:
            with ledger, split_waiting():
                model(ids)
        elif splits:
            with split_waiting():
                model(ids)
        else:
            with ledger:
                model(ids)
    finally:
        dist.all_reduce = real
    waited = [entry.waited for entry in ledger.entries]
    inside = all(0 <= entry.waited <= entry.seconds for entry in ledger.entries)
    return {"calls": len(calls), "counts": ledger.counts(), "waited": waited, "inside": inside}


def test_only_the_measuring_mode_makes_the_ranks_meet(ranks4):
    """deferred has 2 all_reduces in each of 5 layers; a meeting is one more before each."""
    for plain in ranks4.run(calls_of_one_step, False, True):
        assert plain["calls"] == 10
        assert plain["counts"] == {"all_reduce": 10}
        assert plain["waited"] == [0.0] * 10
    for without_ledger in ranks4.run(calls_of_one_step, True, False):
        assert without_ledger["calls"] == 10
    for split in ranks4.run(calls_of_one_step, True, True):
        assert split["calls"] == 20
        assert split["counts"] == {"all_reduce": 10}
        assert all(seconds > 0 for seconds in split["waited"])
        assert split["inside"]


def waiting_for_a_late_rank(seconds):
    """Rank 3 comes late to every MLP sum; what each rank waited in all."""

    class Late(DeferredLayer):
        def forward(self, hidden_states, residual, step):
            if dist.get_rank() == 3:
                time.sleep(seconds)
            return super().forward(hidden_states, residual, step)

    model = sm.Step3p5ForCausalLM.from_config(TINY, Late, sm.ParallelConfig(4))
    with sm.Ledger() as ledger, split_waiting():
        model(torch.arange(8).view(1, 8))
    return sum(entry.waited for entry in ledger.entries)


def test_waiting_is_seen_in_the_ranks_that_wait(ranks4):
    """5 layers x 0.1 s: three ranks wait that long, the late one is waited for."""
    *early, late = ranks4.run(waiting_for_a_late_rank, 0.1)
    # A rank that was itself kept from its core for a while waits that much less.
    assert min(early) > 0.35
    assert late < min(early) - 0.2


class Delayed(DeferredLayer):
    """Slower than any noise: each of the 5 layers sleeps."""

    def forward(self, hidden_states, residual, step):
        time.sleep(0.05)
        return super().forward(hidden_states, residual, step)


def test_compare_latency(ranks4):
    variants = ["three_all_reduces", "fused", Delayed]
    frame = sm.measure.compare_latency(
        TINY, variants, [3], parallel=sm.ParallelConfig(4, 2), ranks=ranks4,
        phases=["prefill"], repeats=9, warmup=1,
    )  # fmt: skip
    names = ["three_all_reduces", "fused", "Delayed"]
    assert frame["variant"].tolist() == names
    rows = {row["variant"]: row for row in frame.to_dict("records")}
    # Two sums in the dense layer and three in each of 4 MoE layers.
    assert rows["three_all_reduces"]["counts"] == {"all_reduce": 14}
    assert rows["fused"]["counts"] == {"all_reduce_add_rms_norm": 9, "all_reduce": 1}
    # 3 tokens x 128 x 4 bytes, 2 x 3/4 of them for each of the 10 sums of deferred.
    assert rows["Delayed"]["bytes_sent"] == 3 * 128 * 4 * 1.5 * 10
    assert [order[0] for order in frame.attrs["order"]] == names * 3
    assert all(sorted(order) == sorted(names) for order in frame.attrs["order"])
    for row in rows.values():
        parts = row["compute"] + row["communication"] + row["waiting"]
        # In each round they add up exactly; the medians of 9 noisy rounds do so within a third.
        assert parts == pytest.approx(row["split_total"], rel=0.33)
        assert min(row["compute"], row["communication"], row["waiting"]) > 0
        assert row["p10"] <= row["median"] <= row["p90"]
    # Of 9 rounds the interval leaves out the fastest and the slowest: one may go wrong.
    assert rows["Delayed"]["verdict"] == "slower"
    assert rows["Delayed"]["speedup_high"] < 1
    assert rows["Delayed"]["median"] > 0.25  # it sleeps that long
    assert rows["Delayed"]["compute"] > 0.25
    assert frame.attrs["meeting"] > 0
    assert frame.attrs["hardware"]["ranks"] == 4
    assert frame.attrs["hardware"]["backend"] == "gloo"


def test_decode_under_dp_with_fewer_sequences_than_ranks(ranks4):
    """Ranks 2 and 3 hold no sequence, and an empty cache."""
    frame = sm.measure.compare_latency(
        TINY, ["three_all_reduces", "reduce_scatter"], [2],
        parallel=sm.ParallelConfig(4, 1, "dp"), ranks=ranks4, phases=["decode"], repeats=6,
        warmup=1,
    )  # fmt: skip
    assert frame[["batch", "length", "context"]].to_numpy().tolist() == [[2, 1, 16]] * 2
    assert (frame["median"] > 0).all()


def test_ranks_and_tp_must_agree(ranks4):
    with pytest.raises(sm.ConfigError, match="tp=2 and 4 ranks"):
        sm.measure.compare_latency(
            TINY, sm.VARIANTS, [1], parallel=sm.ParallelConfig(2), ranks=ranks4
        )


def test_profile(ranks4, tmp_path: Path):
    profile = sm.measure.profile(TINY, "three_all_reduces", ranks=ranks4)
    events = profile.events
    for rank in range(4):
        own = events[events["rank"] == rank]
        collectives = own[own["kind"] == "collective"]
        assert collectives["op"].tolist() == ["all_reduce"] * 14
        steps = own[own["kind"] == "step"]
        assert steps["op"].tolist().count("attention") == 5
        inside = own[(own["kind"] == "op") & (own["op"] == "attention")]["name"]
        assert "aten::scaled_dot_product_attention" in set(inside)
    # One clock: an all_reduce ends in no rank before it has begun in all of them.
    for number in range(14):
        same = events[events["kind"] == "collective"].groupby("rank").nth(number)
        assert (same["start"] + same["seconds"]).min() > same["start"].max()
    profile.save_chrome_trace(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in saved} == {0, 1, 2, 3}


BENCH = ["-m", "stepmoe", "bench", "--repeats", "6", "--warmup", "1", "--tokens", "2"]
BENCH += ["--phase", "prefill", "--variants", "three_all_reduces", "fused"]


def bench(*arguments, launcher=()):
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=120,
        cwd=ROOT, env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "torchrun"])
def test_bench(tmp_path: Path, launcher):
    files = tmp_path / "b.json", tmp_path / "b.csv"
    tp = ("--tp", "2", "--device", "cpu", "--json", str(files[0]), "--csv", str(files[1]))
    code, out, err = bench(*BENCH, *tp, launcher=launcher)
    assert code == 0, err
    assert out.count("prefill, 2 tokens") == 1  # rank 0 alone speaks
    assert "2 CPU ranks on" in out
    frame = sm.measure.load(files[0])
    assert frame["counts"].tolist()[0] == {"all_reduce": 14}
    begin = "torchrun --nproc-per-node 2 -m" if launcher else "python -m"
    assert frame.attrs["command"].startswith(f"{begin} stepmoe bench --shape tiny --tp 2")
    assert len(files[1].read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench --ep 3 --device cpu", "ep=3 does not divide tp=2"),
        ("bench-fusion --tokens 0", "--tokens must be a whole number of at least 1, got 0"),
    ],
)
def test_two_ranks_refuse_in_one_line(words, message):
    """Whichever of them torchrun sees ended first."""
    code, _, err = bench("-m", "stepmoe", *words.split(), launcher=TORCHRUN)
    assert code != 0
    said = [line for line in err.splitlines() if "python -m stepmoe" in line]
    assert len(said) == 1
    assert said[0].startswith(f"python -m stepmoe {words.split()[0]}: {message}")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tp", "3"], "tp=3"),
        (["--tokens", "0"], "a token count must be a whole number of at least 1, got 0"),
        (["--variants", "four"], "'four'"),
        (["--shape", "huge"], "--shape huge"),
        (["--shape", "flash", "--tp", "8", "--dtype", "float64"], "GiB"),
        (["--json", "/no/such/folder/b.json"], "/no/such/folder"),
        (["--repeats", "2"], "repeats must be a whole number of at least 6, got 2"),
        (["--timeout", "0"], "timeout=0.0: give seconds"),
    ],
)
def test_bench_names_a_bad_argument_and_starts_nothing(arguments, named, capsys, monkeypatch):
    from stepmoe import command
    from stepmoe.__main__ import main

    monkeypatch.setattr(command, "Ranks", None)  # starting them would fail
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_bench_under_torchrun_wants_torchrun_s_ranks(capsys, monkeypatch):
    from stepmoe.__main__ import main

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "--tp", "4"]) == 2
    assert "--tp 4: torchrun started 2 ranks" in capsys.readouterr().err
