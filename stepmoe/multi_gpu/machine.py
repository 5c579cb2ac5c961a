"""The machine that a run was on: GPUs, driver, how they are linked, settings; no name of a host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from stepmoe.errors import ConfigError
from stepmoe.measure.environment import cpu_model, versions
from stepmoe.multi_gpu.plan import RANKS, Setting, Step
from stepmoe.probe import Probe

_QUERY = (
    "driver_version",
    "name",
    "memory.total",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
)
# What a command of the plan imports beyond the library's own needs, by a word of it.
_PACKAGES = {
    "pytest": ("pytest", "ipyparallel", "cloudpickle"),
    "recovery": ("ipyparallel", "cloudpickle"),
    "prefill": ("pandas", "scipy"),
}
_SETTINGS = ("NCCL_", "TORCH_SYMM_MEM", "TORCH_SYMMMEM", "NVSHMEM_", "CUDA_VISIBLE_DEVICES")
NEEDS = (
    "2, 4 or 8 NVIDIA GPUs of one host, which NVLink connects (8 H100 or H200 for all of the "
    "published model), torch with CUDA, Triton and FlashInfer (make test-cuda installs them)"
)


def setting_here(ranks: int | None, device: str, shape: str) -> Setting:
    """What is to be run on this machine.

    Args:
        ranks: None for as many as there are GPUs, or 2 on a CPU.

    Raises:
        ConfigError: this machine cannot; says what can.
    """
    if device == "cpu":
        if shape != "tiny":
            raise ConfigError("--device cpu: the published shape needs GPUs; add --shape tiny")
        return Setting(_checked(ranks or RANKS[0]), device, shape, 0, "", 0)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rehearse = "--device cpu --shape tiny shows the whole run at small sizes"
    if not gpus:
        raise ConfigError(f"torch sees no GPU here. This needs {NEEDS}; {rehearse}")
    there = max((number for number in RANKS if number <= gpus), default=RANKS[0])
    number = _checked(ranks or there)
    if number > gpus and shape != "tiny":
        raise ConfigError(
            f"{number} ranks and {gpus} GPU{'s' if gpus > 1 else ''} here: each rank needs one of "
            f"its own. Give --tp {there} where there are so many; --shape tiny lets ranks share "
            "a GPU, to see that everything works"
        )
    found = [torch.cuda.get_device_properties(i) for i in range(min(number, gpus))]
    least = min(found, key=lambda gpu: gpu.total_memory)
    return Setting(number, device, shape, gpus, least.name, least.total_memory)


def assumed_setting(ranks: int) -> Setting:
    """To show the plan where there are no GPUs: 8 GPUs of an H100's memory."""
    return Setting(_checked(ranks), "cuda", "flash", ranks, "a GPU of 80 GB", 80 * 10**9)


def check_packages(steps: Sequence[Step]) -> None:
    """Raise ConfigError, naming them, where packages that these steps import are not installed."""
    needed = {
        package
        for step in steps
        for word, packages in _PACKAGES.items()
        if word in step.command.split()
        for package in packages
    }
    if missing := sorted(name for name in needed if importlib.util.find_spec(name) is None):
        raise ConfigError(
            f"{', '.join(missing)}: not installed; pip install 'stepmoe[notebooks,test,cuda]'"
        )


def remarks(setting: Setting) -> list[str]:
    """What this machine's results will lack, before anything is run."""
    if setting.rehearsal:
        return []
    found = []
    if importlib.util.find_spec("flashinfer") is None:
        found.append(
            "FlashInfer is not installed, and will be missing: pip install 'stepmoe[cuda]'"
        )
    links = links_of(_nvidia_smi("topo", "-m")[0])
    if others := [link for link in links if not link.startswith("NV")]:
        found.append(
            f"nvidia-smi says that GPUs are linked by {', '.join(others)}, not by NVLink: the "
            "collectives are slower then, and the predictions are for NVLink"
        )
    return found


def describe_machine(setting: Setting) -> dict[str, Any]:
    """For a step's file: what nvidia-smi says, processor, versions and settings."""
    described: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": Probe().cores(),
        "versions": versions(on_gpu=setting.device == "cuda"),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)
        },
    }
    if setting.device == "cuda":
        topology, no_topology = _nvidia_smi("topo", "-m")
        rows, no_rows = _nvidia_smi(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader")
        if not no_rows:
            described["gpus"] = [
                dict(zip(_QUERY, map(str.strip, row.split(",")), strict=False))
                for row in rows.splitlines()
            ]
        if not no_topology:
            described |= {"topology": topology, "links": links_of(topology)}
        if problem := no_rows or no_topology:
            described["nvidia_smi_error"] = problem
    return described


def links_of(topology: str) -> list[str]:
    """How pairs of GPUs are linked, out of `nvidia-smi topo -m`: ["NV18"] behind an NVSwitch."""
    lines = [line.split() for line in topology.splitlines()]
    header = next((words for words in lines if words[:1] == ["GPU0"]), [])
    columns = [i for i, word in enumerate(header) if re.fullmatch(r"GPU\d+", word)]
    found = {
        words[1 + column]
        for words in lines
        if words and re.fullmatch(r"GPU\d+", words[0]) and words is not header
        for column in columns
        if len(words) > 1 + column
    }
    return sorted(found - {"X"})


def _nvidia_smi(*arguments: str) -> tuple[str, str]:
    """Its output without the colours of a terminal; and what went wrong, if so."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi: {type(error).__name__}"
    shown = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).rstrip()
    if done.returncode:
        said = (done.stderr.strip() or shown)[-500:]
        return "", f"nvidia-smi {arguments[0]}: exit status {done.returncode}: {said}"
    return shown, ""


def _checked(ranks: int) -> int:
    if ranks not in RANKS:
        raise ConfigError(f"--tp {ranks}: give 2, 4 or 8, which the fused kernels are for")
    return ranks
