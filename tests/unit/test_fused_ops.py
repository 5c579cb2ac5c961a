"""Timings of the fused operation: the floor, the file, the table, the picture, the command."""

import json
import math
import subprocess
import sys

import pytest
import torch

import stepmoe as sm
from stepmoe import charts, measure
from stepmoe.__main__ import main
from stepmoe.comm.groups import RankGroup
from stepmoe.kernels.norm import add_gemma_rms_norm
from stepmoe.measure import fused_ops, recovery
from stepmoe.measure.environment import look_around
from stepmoe.measure.fused_calls import TOLERANCE, error_of, make_inputs
from stepmoe.measure.fused_ops import Timing, wire_floor
from stepmoe.measure.fused_ops_file import with_provenance

TIMINGS = [
    Timing(1, "unfused", (21.0, 20.0, 24.0), error=2e-3),
    Timing(1, "triton one-shot", (9.5, 10.0, 10.5), error=2e-3),
    Timing(1, "flashinfer two-shot", refusal="force('flashinfer two-shot'): needs more tokens"),
    Timing(64, "unfused", (30.0, 31.0, 32.0), error=2e-3),
    Timing(64, "triton one-shot", (15.0, 15.5, 16.5), error=2e-3),
    Timing(64, "flashinfer two-shot", (15.0, 15.0, 15.0), error=2e-3),
]


@pytest.fixture
def content():
    place = look_around(torch.device("cpu"))
    return with_provenance(TIMINGS, [place, place], 4096, torch.bfloat16, "torchrun ...")


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rounded_sum_is_right_and_one_without_an_addend_is_not(ranks, monkeypatch):
    """A ring's sum: every rank adds its share to what came, and rounds to bfloat16."""
    monkeypatch.setattr("stepmoe.measure.fused_calls.rank_device", lambda: torch.device("cpu"))
    group = RankGroup("tp", tuple(range(ranks)))
    inputs = make_inputs(group, 33, 512, torch.bfloat16, 1)

    def error(addends):
        total = addends[0].clone()
        for addend in addends[1:]:
            total += addend
        normed, total = add_gemma_rms_norm(total, inputs.residual.clone(), inputs.weight, 1e-5)
        return error_of(inputs, total, normed)

    assert 0.002 < error(inputs.every) < TOLERANCE / 3
    assert error(inputs.every[1:]) > 10 * TOLERANCE


@pytest.mark.parametrize("error", [0.3, math.nan, math.inf])
def test_what_is_wrong_is_not_timed(error, monkeypatch):
    monkeypatch.setattr(fused_ops, "_slowest", lambda values: tuple(values))
    assert fused_ops._checked("triton one-shot", 0.004) == 0.004
    with pytest.raises(sm.ConfigError, match=r"triton one-shot: .* off by .*: not timed"):
        fused_ops._checked("triton one-shot", error)


class Revived:
    """Ranks of which one was lost, and that then give these errors."""

    def __init__(self, *errors):
        self.errors = errors

    def run(self, fn, name, tokens, hidden_size, how="", mark="", timeout=0.0):
        if how:
            raise sm.RankTimeout("made up", waiting={0: "all_reduce"})
        return list(self.errors)


def test_a_wrong_sum_after_a_loss_is_refused():
    known = recovery.Loss("unfused", "absent")
    assert recovery._lose(Revived(0.004, 0.004), known, 3, 8).ended.startswith("RankTimeout")
    with pytest.raises(RuntimeError, match=r"the next sum was off by 0.004, nan"):
        recovery._lose(Revived(0.004, math.nan), known, 3, 8)


def test_the_floor_is_the_ring_s_share_over_the_link():
    """16384 tokens of 4096 in bfloat16 are 128 MiB; two ranks send all of it, eight 1.75 times."""
    size = 128 * 2**20
    assert wire_floor(16384, 4096, torch.bfloat16, 2) == pytest.approx(size / 450e9 * 1e6)
    assert wire_floor(16384, 4096, torch.bfloat16, 8) == pytest.approx(1.75 * size / 450e9 * 1e6)


def test_a_file_gives_back_what_was_measured_and_says_that_it_was_recorded(content, tmp_path):
    file = tmp_path / "timings.json"
    file.write_text(json.dumps(content))
    loaded = measure.load_fused_ops(file)
    assert loaded == {**content, "recorded": True}
    first, _, refused, *_ = loaded["rows"]
    assert (first["median_us"], first["p10_us"], first["p90_us"]) == (21.0, 20.0, 24.0)
    # nccl-tests: 2 (n - 1) / n bytes over the time; one token of 4096 in bfloat16, 21 µs, 2 ranks.
    assert first["bus_gb_s"] == pytest.approx(2 * 1 / 2 * 8192 / 21e-6 / 1e9, abs=1e-3)
    assert first["of_nvlink4"] == pytest.approx(first["bus_gb_s"] / 450, abs=1e-5)
    assert "needs more tokens" in refused["refusal"]
    assert "median_us" not in refused


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "cannot be read"), ('{"format": "x"}', "its format is 'x'")],
)
def test_another_file_is_refused(tmp_path, text, message):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(sm.ConfigError, match=message):
        measure.load_fused_ops(file)


def test_the_table_shows_medians_gaps_and_why():
    head, one, sixty_four, *reasons = measure.fused_ops_table(TIMINGS).splitlines()
    assert head.split()[:3] == ["unfused", "triton", "one-shot"]
    assert one.split() == ["1", "21.0", "10.0", "-"]
    assert sixty_four.split() == ["64", "31.0", "15.5", "15.0"]
    assert reasons == ["force('flashinfer two-shot'): needs more tokens"]


def test_the_picture_draws_every_series_and_says_where_it_is_from(content):
    figure = charts.fused_ops({**content, "recorded": True, "date": "2026-11-25T12:00:00"})
    times, gains = figure.axes
    assert times.get_title(loc="left").splitlines()[1].startswith("recorded 2026-11-25: 2 CPU")
    shown = {text.get_text() for text in times.get_legend().get_texts()}
    assert {"unfused", "triton one-shot", "flashinfer two-shot"} <= shown
    ratios = [line.get_ydata() for line in gains.lines]
    assert any(list(ratio) == [2.1, 2.0] for ratio in ratios)  # 21 / 10 and 31 / 15.5 µs
    live = charts.fused_ops(content).axes[0].get_title(loc="left")
    assert "measured just now" in live


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "3"], "--repeats must be a whole number of at least 6, got 3"),
        (["--tokens", "1", "0"], "--tokens must be a whole number of at least 1, got 0"),
        (["--hidden", "-2"], "--hidden must be a whole number of at least 1, got -2"),
        (["--json", "no/such/folder/x.json"], "cannot write into"),
    ],
)
def test_the_command_refuses_bad_arguments(arguments, message, capsys):
    assert main(["bench-fusion", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_needs_ranks():
    # In a process of its own, of which it makes a rank.
    command = [sys.executable, "-m", "stepmoe", "bench-fusion", "--rehearse", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs two ranks or more, and this is one: start it with torchrun" in done.stderr


def test_the_command_needs_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench-fusion"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
