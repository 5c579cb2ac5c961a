"""The README's first example, run as the script it is."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_first_example_prints_the_counts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0])
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # Step3p5Config.tiny() has one dense layer and four MoE layers: 2 + 4 x 3, then 2 x 5.
    assert done.stdout.splitlines() == [
        "three_all_reduces {'all_reduce': 14}",
        "deferred {'all_reduce': 10}",
        "fused {'all_reduce_add_rms_norm': 9, 'all_reduce': 1}",
        "reduce_scatter {'all_gather': 11, 'reduce_scatter': 10}",
    ]
