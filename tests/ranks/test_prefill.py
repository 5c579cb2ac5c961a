"""The throughput command on real ranks: the tiny shape, in Ranks and under torchrun."""

import subprocess
import sys

import pytest

import stepmoe as sm
from stepmoe.measure import Workload, compare_throughput, load

WORDS = [
    "--ep",
    "2",
    "--input-len",
    "24",
    "--output-len",
    "2",
    "--prompts",
    "3",
    "--chunk",
    "48",
    "--device",
    "cpu",
]
# A layer of experts: an all-reduce for each of these sites; 4 of the 5 layers have experts.
ALL_REDUCES = {"three_all_reduces": 5 + 1 + 2 * 4, "deferred": 10}


def check(frame, tp):
    assert frame.attrs["parallel"]["tp"] == frame.attrs["hardware"]["ranks"] == tp
    assert list(frame["variant"]) == list(sm.VARIANTS)
    for row in frame.to_dict("records"):
        assert (row["tokens"], row["batch"], row["length"]) == (48, 2, 24)
        assert row["tokens_per_second"] > 0
        if row["variant"] in ALL_REDUCES:
            assert row["counts"] == {"all_reduce": ALL_REDUCES[row["variant"]]}


def test_four_ranks(ranks4):
    work = Workload(24, 2, 3, 48, decode=(5,), context=7, decode_steps=2)
    frame = compare_throughput(
        sm.Step3p5Config.tiny(), workload=work, parallel=sm.ParallelConfig(4, 2), ranks=ranks4
    )
    check(frame[frame["phase"] == "prefill"], 4)
    assert len(frame[frame["phase"] == "decode"]) == len(sm.VARIANTS)
    assert frame.attrs["routing"]["own_share"] >= 1  # of two groups, the one with more rows


@pytest.mark.timeout(120)
def test_two_ranks_by_the_command(tmp_path):
    file = tmp_path / "x.json"
    # In a process of its own: a process has one `Ranks`, and this one's are the four above.
    command = [sys.executable, "-m", "stepmoe", "prefill", "--tp", "2", *WORDS, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "the rank with most rows" in done.stdout
    check(load(file), 2)


@pytest.mark.timeout(120)
def test_two_ranks_under_torchrun(tmp_path):
    file = tmp_path / "x.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "stepmoe", "prefill", *WORDS, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prompts of 24 tokens") == 1, "one rank prints"
    frame = load(file)
    check(frame, 2)
    assert frame.attrs["command"].startswith("torchrun --nproc-per-node 2 -m stepmoe prefill")
