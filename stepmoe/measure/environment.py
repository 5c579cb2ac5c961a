"""What a measurement was made on: hardware, versions, last-level cache."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import stepmoe
from stepmoe.comm.groups import backend_for, world_size
from stepmoe.parallel import ParallelConfig
from stepmoe.probe import Probe

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ASSUMED_CACHE = 32 * 2**20


@dataclass(frozen=True)
class Place:
    """Where one rank ran. `device` tells GPUs of one host apart; host names do not go further."""

    host: str
    device: str
    gpu: str
    cpu: str
    cores: int
    threads: int
    backend: str
    cache_bytes: int
    cache_source: str
    versions: dict[str, str]


def look_around(device: torch.device) -> Place:
    """Describe the machine of this rank."""
    on_gpu = device.type == "cuda"
    size, source = last_level_cache(device)
    return Place(
        host=socket.gethostname(),
        device=str(device),
        gpu=torch.cuda.get_device_name(device) if on_gpu else "",
        cpu=cpu_model(),
        cores=Probe().cores(),
        threads=torch.get_num_threads(),
        backend=backend_for(device) if world_size() > 1 else "none: one rank",
        cache_bytes=size,
        cache_source=source,
        versions=versions(on_gpu),
    )


def describe(places: list[Place]) -> dict[str, object]:
    """The hardware of all ranks, for a table or a file; no host name and no path in it."""
    first = places[0]
    gpus = {(place.host, place.device): place.gpu for place in places if place.gpu}
    return {
        "device": first.device.partition(":")[0],
        "ranks": len(places),
        "hosts": len({place.host for place in places}),
        "cpu": first.cpu,
        "cores": first.cores,
        "threads_per_rank": first.threads,
        "gpus": sorted(gpus.values()),
        "backend": first.backend,
        "last_level_cache": first.cache_bytes,
        "last_level_cache_source": first.cache_source,
    }


def provenance(places: list[Place]) -> dict[str, Any]:
    """On what, with what and when: what every measurement says of itself, from every rank's place.

    Returns:
        hardware, versions, and the date now in UTC.
    """
    return {
        "hardware": describe(places),
        "versions": places[0].versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def attributes(places: list[Place], dtype: object, parallel: ParallelConfig) -> dict[str, Any]:
    """`provenance` of a measurement of a model, with dtype and layout, for a frame's `attrs`."""
    return {
        "recorded": False,
        **provenance(places),
        "dtype": str(dtype).removeprefix("torch."),
        "parallel": asdict(parallel),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def last_level_cache(device: torch.device) -> tuple[int, str]:
    """Size in bytes of the cache nearest to memory, and how it was found."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size, "L2, device properties"
    sizes = {}
    for index in _CACHES.glob("index*"):
        try:
            level, size = ((index / name).read_text().strip() for name in ("level", "size"))
        except OSError:
            continue
        sizes[int(level)] = int(size.removesuffix("K")) * 1024
    if sizes:
        return sizes[max(sizes)], f"L{max(sizes)}, Linux's /sys/devices/system/cpu"
    if sys.platform == "darwin":
        for level in (3, 2):
            if size := int(_sysctl(f"hw.l{level}cachesize") or 0):
                return size, f"L{level}, sysctl"
    return _ASSUMED_CACHE, "assumed: this system does not tell"


def _sysctl(name: str) -> str:
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def versions(on_gpu: bool) -> dict[str, str]:
    """Of what a measurement depends on, by package."""
    probe = Probe()
    found = {
        "stepmoe": stepmoe.__version__,
        "python": probe.python(),
        "torch": probe.torch(),
        "system": probe.system(),
    }
    if on_gpu:
        found["cuda"] = torch.version.cuda or ""
        if probe.nccl():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        packages = {name: probe.package(name) for name in ("triton", "flashinfer-python")}
        found |= {name: version for name, version in packages.items() if version}
    return found
