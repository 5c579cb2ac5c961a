"""What this machine can run, and for each thing it cannot: why, and what to do about it."""

import argparse
import itertools
import json
from dataclasses import asdict, dataclass

import stepmoe
from stepmoe.probe import Probe

CPU_RANKS = "CPU ranks"

# FlashInfer compiles its all-reduce fusion kernels for these major compute capabilities only
# (SM90 Hopper, SM100 Blackwell), on first use, with nvcc.
TRTLLM_MAJORS = (9, 10)


@dataclass(frozen=True)
class Check:
    """One thing this machine can or cannot run.

    Attributes:
        name: what is checked.
        ok: whether it can be used.
        detail: what was found, or why it cannot be used.
        remedy: a command or a sentence that says what to do; empty when `ok`.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def diagnose(probe: Probe | None = None) -> list[Check]:
    """Find out what this machine can run.

    Args:
        probe: what looks at the machine; only tests pass one.

    Returns:
        The versions in use, then one check for each way to run. No host name and no path in them.
    """
    probe = probe or Probe()
    return [
        _versions(probe),
        _cpu_ranks(probe),
        _notebooks(probe),
        _shared_gpu(probe),
        _gpu_each(probe),
        _symmetric_memory(probe),
        _triton(probe),
        _flashinfer_trtllm(probe),
        _flashinfer_mnnvl(probe),
    ]


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


def _without_gpu(name: str, probe: Probe, *, installed: str = "") -> Check:
    """The check for something that needs a GPU on a machine where torch finds none.

    Args:
        installed: a package that is there all the same, with its version.
    """
    prefix = f"{installed} is installed but cannot be used: " if installed else ""
    if not probe.driver():
        return Check(
            name,
            False,
            f"{prefix}no NVIDIA GPU",
            "Nothing to install here: use CPU ranks, or run on a machine with an NVIDIA GPU.",
        )
    if not probe.torch_has_cuda():
        release = probe.torch().partition("+")[0]
        return Check(
            name,
            False,
            f"{prefix}there is an NVIDIA driver, but torch {probe.torch()} was built without CUDA",
            "python -m pip install --force-reinstall --index-url https://pypi.org/simple "
            f"torch=={release}",
        )
    return Check(
        name,
        False,
        f"{prefix}there is an NVIDIA driver, but torch finds no GPU",
        "Run nvidia-smi: the GPU may be hidden by CUDA_VISIBLE_DEVICES, "
        "or the driver too old for this torch.",
    )


def _shared_gpu(probe: Probe) -> Check:
    name = "One shared GPU"
    if not (gpus := probe.gpus()):
        return _without_gpu(name, probe)
    detail = f"{gpus[0].name}: several ranks share it, over gloo (for checking, not for timing)"
    return Check(name, True, detail)


def _gpu_each(probe: Probe) -> Check:
    name = "One GPU a rank"
    if not (gpus := probe.gpus()):
        return _without_gpu(name, probe)
    if len(gpus) == 1:
        detail = f"one GPU ({gpus[0].name}); this needs at least two"
        return Check(name, False, detail, "Share the one GPU, or run on a machine with more.")
    if not probe.nccl():
        return Check(
            name,
            False,
            f"{len(gpus)} GPUs, but this torch has no NCCL, which carries data between them",
            "Use Linux and the torch of PyPI or conda-forge.",
        )
    kinds = ", ".join(sorted({gpu.name for gpu in gpus}))
    return Check(name, True, f"{len(gpus)} GPUs ({kinds}): up to {len(gpus)} ranks, over NCCL")


def _symmetric_memory(probe: Probe) -> Check:
    name = "Symmetric memory"
    if not (gpus := probe.gpus()):
        return _without_gpu(name, probe)
    if len(gpus) == 1:
        detail = "ranks that share the GPU need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1"
        return Check(name, True, detail)
    if not probe.peer_access():
        return Check(
            name,
            False,
            "these GPUs cannot read each other's memory",
            "Use GPUs connected by NVLink or by peer-to-peer PCIe; `nvidia-smi topo -m` shows it.",
        )
    return Check(name, True, f"{len(gpus)} GPUs read each other's memory")


def _triton(probe: Probe) -> Check:
    name, version = "Triton", probe.package("triton")
    if not probe.gpus():
        return _without_gpu(name, probe, installed=f"Triton {version}" if version else "")
    if version is None:
        return Check(name, False, "not installed", 'python -m pip install "triton>=3.6"')
    return Check(name, True, f"Triton {version}")


def _flashinfer_problem(name: str, probe: Probe) -> Check | None:
    """What keeps every backend of FlashInfer from working, None when nothing does."""
    version = probe.package("flashinfer-python")
    if not probe.gpus():  # importing FlashInfer without CUDA fails, so it is not tried
        return _without_gpu(name, probe, installed=f"FlashInfer {version}" if version else "")
    if version is None:
        remedy = 'python -m pip install "flashinfer-python>=0.6.13"'
        return Check(name, False, "FlashInfer is not installed", remedy)
    if error := probe.import_error("flashinfer.comm"):
        return Check(
            name,
            False,
            f"FlashInfer {version} is installed but its import raises {error}",
            'See the whole error: python -c "import flashinfer.comm"',
        )
    if not probe.compiler() and probe.package("flashinfer-jit-cache") is None:
        return Check(
            name,
            False,
            f"FlashInfer {version} compiles its kernels on first use, and there is no nvcc",
            "Install the CUDA toolkit and set CUDA_HOME to its folder.",
        )
    return None


def _flashinfer_trtllm(probe: Probe) -> Check:
    name = "FlashInfer, trtllm (fused all-reduce)"
    if problem := _flashinfer_problem(name, probe):
        return problem
    other = [gpu for gpu in probe.gpus() if gpu.capability[0] not in TRTLLM_MAJORS]
    if other:
        capability = "{}.{}".format(*other[0].capability)
        return Check(
            name,
            False,
            f"{other[0].name} has compute capability {capability}; this needs 9.x or 10.x",
            "Use Hopper (H100, H200, H20) or Blackwell (B200, B300, GB200) GPUs.",
        )
    return Check(name, True, "usable; its first call compiles for some minutes")


def _flashinfer_mnnvl(probe: Probe) -> Check:
    name = "FlashInfer, mnnvl (multicast)"
    if problem := _flashinfer_problem(name, probe):
        return problem
    if len(probe.gpus()) < 2:
        detail = "one GPU; multicast goes from one GPU to several"
        return Check(name, False, detail, "Run on a machine with several GPUs behind an NVSwitch.")
    if not probe.multicast():
        return Check(
            name,
            False,
            "these GPUs have no multicast, which takes an NVSwitch",
            "Use the trtllm backend here, or a machine with an NVSwitch (HGX, DGX).",
        )
    return Check(name, True, "usable; its first call compiles for some minutes")
