"""One real step of the run on several GPUs, rehearsed by CPU ranks: run, kept, not run again."""

import json
import subprocess
import sys


def multi_gpu(folder, *words):
    command = [sys.executable, "-m", "stepmoe", "multi-gpu", "--device", "cpu", "--shape", "tiny"]
    command += ["--folder", str(folder), "--only", "collectives", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_rehearsed_step(tmp_path):
    shown = multi_gpu(tmp_path)
    assert "A rehearsal, whose times mean nothing" in shown
    assert "[1/1] collectives" in shown
    content = json.loads((tmp_path / "collectives.json").read_text())
    assert (content["rehearsal"], content["run"]["rehearsal"]) == (True, True)
    assert content["run"]["status"] == "done"
    assert str(tmp_path) not in json.dumps(content)
    ran = {row["implementation"]: row for row in content["rows"] if "error" in row}
    assert {"all_reduce", "reduce_scatter + all_gather", "unfused", "triton two-shot"} <= set(ran)
    # Triton's interpreter cuts bfloat16 off at 8 bits, twice; half a bit each on average.
    assert all(0 < row["error"] < 2**-7 for row in ran.values())
    assert "0 of 1 steps left" in multi_gpu(tmp_path)
