"""Which implementation of the fused operation is chosen, and the reason given: plain data."""

from pathlib import Path

import pytest
import torch

import stepmoe as sm
from stepmoe.comm.fusion import (
    GATES,
    IMPLEMENTATIONS,
    ONE_SHOT_MAX_BYTES,
    REQUIREMENTS,
    TRITON_FASTER_FROM_BYTES,
    Place,
    choose,
    flashinfer_path,
    force,
)
from stepmoe.comm.groups import RankGroup
from stepmoe.measure import load_fused_ops

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
RESULTS = Path(__file__).parents[2] / "notebooks" / "results"
HOPPER8 = Place("one GPU a rank", 8, (9, 0))


def test_the_gates_as_published():
    """2048 tokens in sglang; 0.5 MB in vLLM, which is 64 tokens of 4096 in bfloat16."""
    sglang, vllm = GATES["sglang"], GATES["vllm"]
    for gate, most in ((sglang, 2048), (vllm, 64)):
        assert gate.allows(most, 4096, BF16)
        assert not gate.allows(most + 1, 4096, BF16)


@pytest.mark.parametrize(
    ("tokens", "hidden", "dtype", "place", "implementation", "reason"),
    [
        (64, 4096, BF16, HOPPER8, "flashinfer", "8 ranks, one GPU a rank, 512 KiB"),
        (2048, 4096, FP16, HOPPER8, "flashinfer", "16384 KiB"),
        (2049, 4096, BF16, HOPPER8, "unfused", "2049 tokens are more than the gate's 2048"),
        (64, 4096, BF16, Place("one GPU a rank", 4, (10, 0)), "flashinfer", "4 ranks"),
        # Where FlashInfer was not built for, Triton takes over, and the reason says why.
        (32, 4096, BF16, Place("one GPU a rank", 8, (8, 0)), "triton one-shot", "here: 8.0"),
        (64, 4096, BF16, Place("one GPU a rank", 8, (8, 0)), "triton two-shot", "here: 8.0"),
        (32, 4096, FP32, HOPPER8, "triton two-shot", "flashinfer: has no kernel for float32"),
        (64, 4096, BF16, Place("shared GPU", 4, (9, 0)), "triton one-shot", "take turns"),
        (64, 4096, BF16, Place("shared GPU", 8, (9, 0)), "triton two-shot", "take turns"),
        (2048, 4096, BF16, Place("shared GPU", 2, (9, 0)), "triton one-shot", "2 ranks"),
        # Where both would run, what was measured decides.
        (1023, 4096, BF16, Place("one GPU a rank", 2, (9, 0)), "flashinfer", "2 ranks"),
        (1024, 4096, BF16, Place("one GPU a rank", 2, (9, 0)), "triton one-shot", "slower than"),
        # What neither can do.
        (64, 4096, FP64, HOPPER8, "unfused", "triton: has no kernel for float64"),
        (64, 4096, BF16, Place("one GPU a rank", 3, (9, 0)), "unfused", "2 or 4 or 8 ranks"),
        (64, 4097, BF16, HOPPER8, "unfused", "multiple of 64, here: 4097"),
        (64, 4096, BF16, Place("several hosts", 8, (9, 0)), "unfused", "here: several hosts"),
        (64, 4096, BF16, Place("no peer access", 2, (9, 0)), "unfused", "no peer access"),
        (64, 4096, BF16, Place("cpu", 8), "unfused", "CPU tensors"),
        (4096, 4096, BF16, Place("cpu", 8), "unfused", "4096 tokens are more"),
    ],
)
def test_truth_table(tokens, hidden, dtype, place, implementation, reason):
    choice = choose(tokens, hidden, dtype, place)
    assert choice.implementation == implementation
    assert reason in choice.reason


def test_what_the_ranks_voted_out_is_passed_over_and_named():
    refused = {"flashinfer": "cannot run: rank 3: no nvcc"}
    choice = choose(8, 4096, BF16, HOPPER8, refused)
    assert choice.implementation == "triton one-shot"
    assert "flashinfer: cannot run: rank 3: no nvcc" in choice.reason
    refused["triton"] = "cannot run: rank 1: no memory"
    choice = choose(8, 4096, BF16, HOPPER8, refused)
    assert choice.implementation == "unfused"
    assert "rank 3: no nvcc" in choice.reason
    assert "rank 1: no memory" in choice.reason


def test_without_triton_flashinfer_runs_also_where_it_is_slower():
    two = Place("one GPU a rank", 2, (9, 0))
    choice = choose(2048, 4096, BF16, two, {"triton": "cannot run: rank 0: no memory"})
    assert choice.implementation == "flashinfer"
    assert "triton: cannot run: rank 0: no memory" in choice.reason
    shared = Place("shared GPU", 2, (9, 0))
    assert choose(8, 4096, BF16, shared, {"triton": "cannot run"}).implementation == "unfused"


def test_the_measured_limit_is_what_the_recorded_file_says():
    """From the limit on Triton is faster at every recorded size, below it at none."""
    recorded = load_fused_ops(RESULTS / "h100x2_fusion.json")
    times = {
        (row["tokens"], row["implementation"]): row["median_us"]
        for row in recorded["rows"]
        if "median_us" in row
    }
    limit = TRITON_FASTER_FROM_BYTES[recorded["hardware"]["ranks"]]
    for tokens in {tokens for tokens, _ in times}:
        is_faster = times[tokens, "triton one-shot"] < times[tokens, "flashinfer one-shot"]
        assert is_faster == (tokens * recorded["hidden_size"] * BF16.itemsize >= limit), tokens


def test_one_shot_wins_where_its_extra_bytes_take_less_than_a_meeting():
    """The threshold is the cost model's, to within a factor of two: it is a round number."""
    meeting, bandwidth = 3e-6, 450e9
    for ranks, most in ONE_SHOT_MAX_BYTES.items():
        extra = (ranks - 1) - 2 * (ranks - 1) / ranks  # of the tensor, a rank
        if most is None:
            assert extra == 0
        else:
            assert 0.5 < most * extra / bandwidth / meeting < 2


def test_every_implementation_has_its_requirements():
    assert {name.split()[0] for name in IMPLEMENTATIONS} == {"unfused", *REQUIREMENTS}


def test_an_unknown_demand_is_refused_before_any_call():
    with pytest.raises(sm.ConfigError, match="force\\('nccl'\\): use one of unfused, triton"):
        force("nccl").__enter__()


def test_flashinfer_is_refused_where_its_offsets_would_overflow():
    """8 ranks x 16384 tokens x 4096 in bfloat16 are 1 GiB a buffer, the third begins at 2 GiB."""
    row = torch.empty(1, 4096, dtype=BF16)
    for ranks, capacity, overflows in ((8, 16384, True), (8, 8192, False), (2, 16384, False)):
        problem = flashinfer_path._problem(RankGroup("tp", tuple(range(ranks))), capacity, row)
        assert ("offsets in its buffers exceed 32 bits" in problem) == overflows
