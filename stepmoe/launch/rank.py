"""What a function running in a rank may use: its device, a store that lasts between calls.

Needs torch alone, so that the same functions run under `torchrun` without a notebook.
"""

import atexit
import os
import socket
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from stepmoe.errors import ConfigError

# For a thread of gloo to get the interpreter's lock and free its tensor (s). Of processes made to
# race, 10 of 200 aborted without destruction, 1 of 200 without this, none of 180 with both.
_FREE = 0.05

DEVICES = ("auto", "cpu", "cuda")

#: Kept in this rank from one `Ranks.run` to the next (a model, say). Emptied when a call fails,
#: because what it holds may refer to process groups that no longer exist.
state: dict[str, Any] = {}


def rank_device() -> torch.device:
    """The device of this rank: `STEPMOE_DEVICE`, else a GPU for torchrun's `LOCAL_RANK`, else one.

    Returns:
        `cpu` or `cuda:i`. Ranks that are more than the GPUs share them in turn.
    """
    named = os.environ.get("STEPMOE_DEVICE")
    if named:
        return torch.device(named)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def init_distributed(device: str = "auto") -> torch.device:
    """Initialise torch.distributed as `Ranks` does, from the environment that torchrun sets.

    Does nothing in a process that has done so already, and makes a world of one where there is
    no torchrun: a script that starts with this line runs in a rank, under torchrun and alone. A
    group of gloo is destroyed when the process ends. Who destroys one of NCCL before that calls
    `leave` for it: models that have decoded keep CUDA graphs, for which NCCL would wait.

    Args:
        device: "cpu", "cuda" or "auto" (GPUs where there are some).
    Returns:
        The device of this rank.
    Raises:
        ConfigError: an unknown device, "cuda" on a machine without GPUs, or several ranks and no
            MASTER_ADDR and MASTER_PORT to meet at.
    """
    if dist.is_initialized():
        return rank_device()
    check_device(device)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={world}, but {' and '.join(missing)} not set: start with torchrun, or set "
            "where rank 0 listens. In a rank of Ranks leave the process group to Ranks, which "
            "makes it before each call that needs one"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    prepare_rank(rank, world, local_rank, ranks_here, device_name(local_rank, gpus))
    backend = backend_name(shares_gpus=ranks_here > gpus, on_gpu=gpus > 0)
    if ranks_here == world and "GLOO_SOCKET_IFNAME" not in os.environ:
        use_loopback()
    if "RANK" in os.environ and not missing:
        dist.init_process_group(backend, rank=rank, world_size=world)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    if backend == "gloo":
        atexit.register(_leave_at_exit)
    return rank_device()


def leave() -> None:
    """Destroy this rank's process groups, and before them the CUDA graphs with their collectives,
    for which NCCL would wait."""
    graphs = sys.modules.get("stepmoe.comm.graphs")  # not imported where nothing was captured
    if graphs:
        graphs.end_graphs()
    dist.destroy_process_group()


def _leave_at_exit() -> None:
    """Destroy the group before Python shuts down, as torch's documentation asks of scripts.

    A thread of gloo that frees its last tensor only after that ends the process with SIGABRT,
    "terminate called without an active exception" (pytorch #179291). Not for NCCL, whose
    destruction may wait for a rank that has failed.
    """
    if dist.is_initialized():
        leave()
        time.sleep(_FREE)


def torchrun_ranks() -> int | None:
    """How many ranks torchrun started, this process being one of them; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def torchrun_rank() -> int | None:
    """Which of torchrun's ranks this process is; None without torchrun."""
    return None if torchrun_ranks() is None else int(os.environ["RANK"])


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that an argument asks for: None and "auto" ask for this rank's own.

    Raises:
        ConfigError: no device of torch, one that models do not run on, or not on this machine.
    """
    if device is None or device == "auto":
        return rank_device()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    gpus = torch.cuda.device_count()
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f'device={device!r}: give "auto", "cpu", "cuda" or "cuda:" and a number')
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise ConfigError(
            f'device={str(device)!r}: torch sees {gpus} GPU here; give "cpu" or "auto"'
        )
    return found


def check_device(device: str) -> None:
    """Raise ConfigError unless `device` is known and this machine has it."""
    if device not in DEVICES:
        known = ", ".join(repr(name) for name in DEVICES)
        raise ConfigError(f"device={device!r}: give one of {known}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device="cuda": torch sees no GPU here; give "cpu" or "auto"')


def device_name(local_rank: int, gpus: int) -> str:
    """The device of the host's `local_rank`-th rank, the host having `gpus` GPUs to use."""
    return f"cuda:{local_rank % gpus}" if gpus else "cpu"


def backend_name(*, shares_gpus: bool, on_gpu: bool) -> str:
    """NCCL refuses two ranks on one GPU, so those that share use gloo throughout."""
    return "cpu:gloo,cuda:nccl" if on_gpu and not shares_gpus else "gloo"


def prepare_rank(rank: int, world: int, local_rank: int, ranks_here: int, device: str) -> None:
    """Set what torch and the code in a rank read: environment, current GPU, threads.

    Args:
        ranks_here: how many ranks share this host's cores.
    """
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank), STEPMOE_DEVICE=device
    )
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
        _prepare_symmetric_memory(ranks_here)
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # on CPUs, Triton has only its interpreter
    if not _threads_are_chosen():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))


def _threads_are_chosen() -> bool:
    """Whether the user has set OMP_NUM_THREADS; where nobody has, torchrun sets it to 1."""
    return "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def _prepare_symmetric_memory(ranks_here: int) -> None:
    """How torch shares memory between GPUs; read at its first use. What the user set stays."""
    settings = {
        # Our kernels read their peers one by one, and multicast fails on some machines
        # (vLLM #34891, #48071).
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        # With a pool, memory that is freed and taken again keeps its old mapping to the peers.
        "TORCH_SYMMMEM_IMPLICIT_POOL": "0",
    }
    if ranks_here > torch.cuda.device_count():
        settings["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def use_loopback() -> None:
    """Keep gloo and NCCL's sockets on this host: `lo` is the interface on Linux, `lo0` on macOS."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = names.pop()
