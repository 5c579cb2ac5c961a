"""The run on several GPUs, rehearsed by CPU ranks: a real step, and a rank that does not come."""

import json

from stepmoe.__main__ import main
from stepmoe.measure import recovery


def test_a_rehearsed_step(tmp_path, capsys):
    words = ["--device", "cpu", "--shape", "tiny", "--folder", str(tmp_path)]
    words = ["multi-gpu", *words, "--only", "collectives"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "A rehearsal, whose times mean nothing" in shown
    assert "[1/1] collectives" in shown
    content = json.loads((tmp_path / "collectives.json").read_text())
    assert (content["rehearsal"], content["run"]["rehearsal"]) == (True, True)
    assert content["run"]["status"] == "done"
    assert str(tmp_path) not in json.dumps(content)
    assert content["command"] == (
        "torchrun --nproc-per-node 2 -m stepmoe bench-fusion --tokens 3 --hidden 64 "
        "--dtype bfloat16 --repeats 6 --device cpu --rehearse"
    )
    ran = {row["implementation"]: row for row in content["rows"] if "error" in row}
    assert {"all_reduce", "reduce_scatter + all_gather", "unfused", "triton two-shot"} <= set(ran)
    # Triton's interpreter cuts bfloat16 off at 8 bits, twice; half a bit each on average.
    assert all(0 < row["error"] < 2**-7 for row in ran.values())
    assert main(words) == 0
    assert "0 of 1 steps left" in capsys.readouterr().out


def test_a_rank_that_does_not_come(ranks4, monkeypatch):
    """The kill is measured by the command: restarting ranks takes longer than a test may."""
    monkeypatch.setattr(recovery, "LOSSES", ("absent",))
    monkeypatch.setattr(recovery, "_LIMIT", 1.0)  # here; in the ranks the last one sleeps 10 s
    losses, places = recovery.measure_recovery(ranks4, ["unfused", "flashinfer"], 5, 64)
    assert len(places) == 4
    loss, refused = losses
    assert loss.ended.startswith("RankTimeout: rank 0: all_reduce_add_rms_norm")
    # Reports and interrupts take some 2 s on a quiet machine; the sleep alone would be 9 more.
    assert 0 < loss.error_seconds < 8
    assert 0 < loss.usable_seconds < 30
    assert "flashinfer" in refused.refusal
    assert refused.ended == ""
