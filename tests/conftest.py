"""What every test shares: models of the test process live on the CPU; cuda tests need a GPU.

`--record FILE` keeps what a run found: `make test-cuda RECORD=notebooks/results/...json`.
"""

import datetime
import json
import os
import platform
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Where tests start ranks, which use all cores: those tests run one after the other.
WITH_RANKS = ("tests/ranks/", "notebooks/")

# What is computed here is small: a second thread halves no time, and while it waits for the first
# it takes the core from the ranks and the tests beside it. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test compares on the CPU, also on a machine with GPUs; ranks are given their device by Ranks.
os.environ["STEPMOE_DEVICE"] = "cpu"

# Without a GPU, kernels are tested in Triton's interpreter; triton reads this when it is imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="keep outcomes, devices and versions")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several test processes, one runs all tests that start ranks; the others share files.

    Of a cuda test's file each team of ranks is its own, so that teams of 2, 4 and 8 run at once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(WITH_RANKS):
                return "ranks"
            team = re.search(r"\btp[248]\b", nodeid) if nodeid.startswith("tests/cuda/") else None
            return nodeid.partition("::")[0] + (team.group() if team else "")

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if not needs_gpu:
        return
    import torch  # takes seconds, so only when a test asks for it

    if not torch.cuda.is_available():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_configure(config: pytest.Config) -> None:
    # With several test processes only the first, which gets every report, writes the file.
    if (file := config.getoption("record")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(file), config.invocation_params.args))


class Record:
    """Writes outcomes by test file, what failed, devices and versions to the file of --record.

    Again after every test, so that a run that is cut off leaves what it found.
    """

    def __init__(self, file: Path, words: Sequence[str]) -> None:
        import torch

        from stepmoe.probe import Probe

        kept = [
            word
            for before, word in zip(("", *words), words, strict=False)
            if "--record" not in (before, word) and not word.startswith("--record=")
        ]
        packages = {name: Probe().package(name) for name in ("triton", "flashinfer-python")}
        self._file, self._outcomes, self._failed = file, dict[str, Counter[str]](), dict[str, str]()
        self._content = {
            "format": "stepmoe tests 1",
            "command": shlex.join(["pytest", *kept]),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                **{name: version for name, version in packages.items() if version},
            },
        }
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        self._outcomes.setdefault(Path(report.location[0]).name, Counter())[outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else report.longreprtext
            self._failed[report.nodeid] = reason.partition("\n")[0][:300]
        self._write()

    def _write(self) -> None:
        found = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "outcomes": {name: dict(counts) for name, counts in sorted(self._outcomes.items())},
            "total": dict(sum(self._outcomes.values(), Counter())),
            "failed": self._failed,
        }
        self._file.write_text(json.dumps({**self._content, **found}, indent=1) + "\n")
