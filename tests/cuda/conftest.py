"""Keeps what a run of the cuda tests found: `make test-cuda RECORD=notebooks/results/...json`."""

import datetime
import json
import platform
from collections import Counter
from pathlib import Path

import pytest
import torch

from stepmoe.probe import Probe


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Write outcomes by test file, devices and versions to the file named by --record."""
    file = config.getoption("record")
    if file is None:
        return
    outcomes: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            if outcome != "passed" or report.when == "call":
                outcomes.setdefault(Path(report.location[0]).name, Counter())[outcome] += 1
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = {name: Probe().package(name) for name in ("triton", "flashinfer-python")}
    content = {
        "format": "stepmoe cuda tests 1",
        "command": "pytest -m cuda tests",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpus": gpus,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: version for name, version in packages.items() if version},
        },
        "outcomes": {name: dict(counts) for name, counts in sorted(outcomes.items())},
        "total": dict(sum(outcomes.values(), Counter())),
    }
    Path(file).write_text(json.dumps(content, indent=1) + "\n")
    terminalreporter.write_line(f"recorded in {file}")
