"""The published figures are what their sources say, and complete enough to be cited."""

from __future__ import annotations

from itertools import groupby

import pytest

from stepmoe.published import GAINS, LATENCIES, MIB, Latency, latencies, layer_points


def key(row: Latency) -> tuple[str, str]:
    return row.source, row.implementation


def test_every_figure_can_be_cited() -> None:
    for row in LATENCIES:
        assert row.source
        assert row.hardware
        assert 1e-6 < row.seconds < 2e-3, row  # µs and ms were not mixed up
        assert row.operation in ("all_reduce", "all_reduce_add_rms_norm")
        if row.hidden is not None:
            assert row.nbytes == (row.tokens or 0) * row.hidden * 2
    for gain in GAINS:
        assert gain.source
        assert gain.what
        assert gain.change is not None or gain.unit, gain


def test_longer_for_more() -> None:
    for _, group in groupby(LATENCIES, key):
        times = [row.seconds for row in group]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("source", "implementation", "mib", "milliseconds"),
    [
        ("vLLM #42324", "NCCL", 1, 0.025),
        ("vLLM #42324", "NCCL", 128, 0.561),
        ("vLLM #42324", "multimem", 64, 0.320),
        ("vLLM #37756", "NCCL", 16, 0.083),
        ("vLLM #22086", "all-reduce + norm", 1, 0.012),  # 64 tokens of 8192 two-byte numbers
        ("vLLM #22086", "FlashInfer two-shot", 0.5, 0.079),
        ("TensorRT-LLM #14534", "two-shot", 64, 0.278),  # 2048 x 16384
        ("aiter #2586", "fused", 1 / 128, 0.0114),
    ],
)
def test_figures(source: str, implementation: str, mib: float, milliseconds: float) -> None:
    rows = latencies(source, implementation)
    found = [row.seconds * 1e3 for row in rows if row.nbytes == mib * MIB]
    assert found == [pytest.approx(milliseconds)]


def test_gains() -> None:
    main = next(gain for gain in GAINS if gain.source == "sglang #22773")
    assert (main.before, main.after) == (46e3, 56e3)
    # The source rounds both throughputs to thousands.
    assert main.change == pytest.approx(56 / 46 - 1, abs=0.01)
    losses = [gain.change for gain in GAINS if gain.change is not None and gain.change < 0]
    assert losses == [-0.034, -0.074]


def test_layer_points_are_doubled_and_moved_to_the_same_bytes() -> None:
    points = layer_points(8, 4096, 2)
    nccl = [point for point in points if "vLLM #42324" in point.label]
    assert [point.tokens for point in nccl] == [64 * 2**power for power in range(9)]
    assert nccl[1].seconds == pytest.approx(50e-6)  # 128 tokens are 1 MiB
    assert {point.variant for point in nccl} == {"deferred"}
    assert [p.tokens for p in layer_points(8, 8192, 2) if "vLLM" in p.label][1] == 64
    assert not any("multimem" in point.label for point in points)

    flagtree = [point for point in points if "FlagTree" in point.label]
    assert {point.variant for point in flagtree} == {"deferred", "fused"}
    assert all("hidden size not stated" in point.label for point in flagtree)
    assert [point.tokens for point in flagtree] == [8, 512, 4096, 8192] * 2

    assert {point.label.partition(",")[0] for point in layer_points(2, 8192, 2)} == {"vLLM #22086"}
    assert layer_points(16, 4096, 2) == []
