"""Looks at the machine on behalf of the doctor: packages, cores, GPUs."""

import importlib
import itertools
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Gpu:
    """One GPU torch can use: its product name and compute capability, such as (9, 0)."""

    name: str
    capability: tuple[int, int]


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


class Probe:
    """Looks at the machine; tests put another one in its place."""

    def system(self) -> str:
        return f"{platform.system()} {platform.machine()}"

    def python(self) -> str:
        return platform.python_version()

    def torch(self) -> str:
        return torch.__version__

    def package(self, name: str) -> str | None:
        """Version of an installed distribution, None without it; does not import it."""
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    def cores(self) -> int:
        """Cores this process may use, which under a batch system is fewer than there are."""
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def gloo(self) -> bool:
        return dist.is_available() and dist.is_gloo_available()

    def nccl(self) -> bool:
        return dist.is_available() and dist.is_nccl_available()

    def torch_has_cuda(self) -> bool:
        return torch.version.cuda is not None

    def driver(self) -> bool:
        return shutil.which("nvidia-smi") is not None

    def gpus(self) -> tuple[Gpu, ...]:
        if not torch.cuda.is_available():
            return ()
        return tuple(
            Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
            for i in range(torch.cuda.device_count())
        )

    def peer_access(self) -> bool:
        """Whether every GPU can read every other one's memory."""
        pairs = itertools.permutations(range(torch.cuda.device_count()), 2)
        return all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)

    def multicast(self) -> bool:
        """Whether every GPU can send one write to all of them (NVSwitch); asked of the driver."""
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _SymmetricMemory

        devices = range(torch.cuda.device_count())
        return all(_SymmetricMemory.has_multicast_support(DeviceType.CUDA, i) for i in devices)

    def compiler(self) -> bool:
        """Whether nvcc is where FlashInfer looks for it."""
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        return shutil.which("nvcc") is not None or any(
            Path(home, "bin", "nvcc").exists() for home in homes if home
        )

    def import_error(self, module: str) -> str | None:
        """Import a module: None when that works, otherwise the kind of error it raised."""
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken binary package raises is the answer
            return type(error).__name__
        return None
