"""What this machine can run, and for each thing it cannot: why, and what to do about it."""

import argparse
import itertools
import json
from dataclasses import asdict

import stepmoe
from stepmoe import doctor_gpu
from stepmoe.probe import Check, Probe

CPU_RANKS = "CPU ranks"


def diagnose(probe: Probe | None = None) -> list[Check]:
    """Find out what this machine can run.

    Args:
        probe: what looks at the machine; only tests pass one.

    Returns:
        The versions in use, then one check for each way to run. No host name and no path in them.
    """
    probe = probe or Probe()
    checks = [
        _versions(probe),
        _cpu_ranks(probe),
        _notebooks(probe),
        doctor_gpu.shared_gpu(probe),
        doctor_gpu.gpu_each(probe),
        doctor_gpu.symmetric_memory(probe),
        doctor_gpu.triton(probe),
        doctor_gpu.flashinfer_trtllm(probe),
        doctor_gpu.flashinfer_mnnvl(probe),
    ]
    return [*checks, doctor_gpu.fused_operation(probe, checks)]


def report(checks: list[Check]) -> str:
    """The checks as text, one line each; a remedy stands below the last one in a row it is for."""
    lines = []
    for remedy, group in itertools.groupby(checks, key=lambda check: check.remedy):
        lines += [f"[{'ok' if c.ok else 'no'}] {c.name}: {c.detail}" for c in group]
        if remedy:
            lines.append(f"     to do: {remedy}")
    return "\n".join(lines)


def can_run_cpu_ranks(checks: list[Check]) -> bool:
    """Whether the checks say that the least this project needs is there."""
    return any(check.ok for check in checks if check.name == CPU_RANKS)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser("doctor", help="say what this machine can run, and why not more")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    checks = diagnose()
    as_json = json.dumps([asdict(check) for check in checks], indent=2)
    print(as_json if args.json else report(checks))
    return 0 if can_run_cpu_ranks(checks) else 1


def _versions(probe: Probe) -> Check:
    detail = (
        f"Python {probe.python()}, torch {probe.torch()}, stepmoe {stepmoe.__version__}, "
        f"{probe.system()}"
    )
    return Check("Versions", True, detail)


def _missing(probe: Probe, *packages: str) -> list[str]:
    return [name for name in packages if probe.package(name) is None]


def _cpu_ranks(probe: Probe) -> Check:
    if not probe.gloo():
        return Check(
            CPU_RANKS,
            False,
            "this build of torch has no gloo, which carries data between CPU ranks",
            "Install the torch of PyPI: python -m pip install --force-reinstall torch",
        )
    if missing := _missing(probe, "ipyparallel", "cloudpickle"):
        return Check(
            CPU_RANKS,
            False,
            f"{' and '.join(missing)} not installed: `Ranks` cannot start processes (torchrun can)",
            f"python -m pip install {' '.join(missing)}",
        )
    # Ranks mostly wait for each other: the notebooks' four run well on two cores.
    ranks = max(2, min(8, 2 * probe.cores()))
    detail = f"{probe.cores()} cores: up to {ranks} ranks run comfortably, over gloo"
    return Check(CPU_RANKS, True, detail)


def _notebooks(probe: Probe) -> Check:
    missing = _missing(probe, "jupyterlab", "ipywidgets", "matplotlib", "pandas")
    if missing:
        detail = f"not installed: {', '.join(missing)}"
        return Check("Notebooks", False, detail, f"python -m pip install {' '.join(missing)}")
    return Check("Notebooks", True, f"JupyterLab {probe.package('jupyterlab')}")
