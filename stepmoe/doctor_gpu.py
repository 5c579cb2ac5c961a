"""The doctor's checks of what needs an NVIDIA GPU."""

from stepmoe.probe import Check, Probe

SYMMETRIC_MEMORY, TRITON, TRTLLM = (
    "Symmetric memory",
    "Triton",
    "FlashInfer, trtllm (fused all-reduce)",
)

# FlashInfer compiles its all-reduce fusion kernels for these major compute capabilities only
# (SM90 Hopper, SM100 Blackwell), on first use, with nvcc.
TRTLLM_MAJORS = (9, 10)


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


def shared_gpu(probe: Probe) -> Check:
    name = "One shared GPU"
    if not (gpus := probe.gpus()):
        return _without_gpu(name, probe)
    detail = f"{gpus[0].name}: several ranks share it, over gloo (for checking, not for timing)"
    return Check(name, True, detail)


def gpu_each(probe: Probe) -> Check:
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


def symmetric_memory(probe: Probe) -> Check:
    name = SYMMETRIC_MEMORY
    if not (gpus := probe.gpus()):
        return _without_gpu(name, probe)
    if len(gpus) == 1:
        detail = (
            "ranks that share the GPU read each other's memory (`Ranks` and init_distributed set "
            "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1)"
        )
        return Check(name, True, detail)
    if not probe.peer_access():
        return Check(
            name,
            False,
            "these GPUs cannot read each other's memory",
            "Use GPUs connected by NVLink or by peer-to-peer PCIe; `nvidia-smi topo -m` shows it.",
        )
    return Check(name, True, f"{len(gpus)} GPUs read each other's memory")


def triton(probe: Probe) -> Check:
    name, version = TRITON, probe.package("triton")
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


def flashinfer_trtllm(probe: Probe) -> Check:
    name = TRTLLM
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


def flashinfer_mnnvl(probe: Probe) -> Check:
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


def fused_operation(probe: Probe, checks: list[Check]) -> Check:
    """Which implementations of all-reduce + add + norm the checks above leave."""
    name = "Fused all-reduce + add + norm"
    if not probe.gpus():
        return _without_gpu(name, probe)
    ok = {check.name for check in checks if check.ok}
    usable = []
    if TRTLLM in ok and SYMMETRIC_MEMORY in ok:
        usable.append("FlashInfer")
    if TRITON in ok and SYMMETRIC_MEMORY in ok:
        usable.append("Triton over symmetric memory")
    if usable:
        return Check(name, True, f"{' and '.join(usable)}; up to 2048 tokens, then unfused")
    detail = "neither FlashInfer nor Triton can run it: the unfused steps run instead"
    return Check(name, False, detail, "See the checks above.")
