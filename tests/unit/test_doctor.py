"""The doctor, in front of machines that are not this one."""

import json
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import stepmoe
from stepmoe import __main__ as command_line
from stepmoe import doctor
from stepmoe.probe import Gpu, Probe

H200 = Gpu("NVIDIA H200", (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0))
LAPTOP = {
    "ipyparallel": "9.2.0",
    "cloudpickle": "3.1.2",
    "jupyterlab": "4.6.6",
    "ipywidgets": "8.1.9",
    "matplotlib": "3.11.2",
    "pandas": "3.1.1",
}
FUSED = "Fused all-reduce + add + norm"
GPU_BOX = LAPTOP | {"triton": "3.7.1", "flashinfer-python": "0.7.2"}


@dataclass
class Machine(Probe):
    """A machine made up for a test; by default a laptop that has everything a laptop can."""

    packages: dict[str, str] = field(default_factory=lambda: dict(LAPTOP))
    n_cores: int = 2
    torch_version: str = "2.13.0+cpu"
    has_gloo: bool = True
    has_nccl: bool = False
    has_cuda: bool = False
    has_driver: bool = False
    gpu_list: tuple[Gpu, ...] = ()
    has_peer_access: bool = True
    has_multicast: bool = True
    has_compiler: bool = True
    broken: dict[str, str] = field(default_factory=dict)
    imported: list[str] = field(default_factory=list)

    def torch(self) -> str:
        return self.torch_version

    def package(self, name: str) -> str | None:
        return self.packages.get(name)

    def cores(self) -> int:
        return self.n_cores

    def gloo(self) -> bool:
        return self.has_gloo

    def nccl(self) -> bool:
        return self.has_nccl

    def torch_has_cuda(self) -> bool:
        return self.has_cuda

    def driver(self) -> bool:
        return self.has_driver

    def gpus(self) -> tuple[Gpu, ...]:
        return self.gpu_list

    def peer_access(self) -> bool:
        return self.has_peer_access

    def multicast(self) -> bool:
        return self.has_multicast

    def compiler(self) -> bool:
        return self.has_compiler

    def import_error(self, module: str) -> str | None:
        self.imported.append(module)
        return self.broken.get(module)


def gpu_box(*gpus: Gpu, **changes: object) -> Machine:
    settings: dict[str, object] = {
        "packages": dict(GPU_BOX),
        "torch_version": "2.13.0+cu130",
        "has_nccl": True,
        "has_cuda": True,
        "has_driver": True,
        "gpu_list": gpus,
    }
    return Machine(**(settings | changes))  # type: ignore[arg-type]


def checks(machine: Machine) -> dict[str, doctor.Check]:
    found = doctor.diagnose(machine)
    for check in found:
        assert check.detail
        assert bool(check.remedy) != check.ok, f"{check.name}: a remedy, if and only if it fails"
    return {
        check.name.partition(",")[2].split()[0] if "," in check.name else check.name: check
        for check in found
    }


def working(machine: Machine) -> set[str]:
    return {name for name, check in checks(machine).items() if check.ok} - {"Versions"}


def test_laptop_runs_cpu_ranks_and_says_why_nothing_else() -> None:
    machine = Machine()
    assert working(machine) == {"CPU ranks", "Notebooks"}
    assert all("no NVIDIA GPU" in c.detail for c in checks(machine).values() if not c.ok)


def test_versions_come_first() -> None:
    first = doctor.diagnose(Machine())[0]
    assert f"torch 2.13.0+cpu, stepmoe {stepmoe.__version__}" in first.detail
    assert first.detail.startswith("Python 3.")


@pytest.mark.parametrize(("cores", "ranks"), [(1, 2), (2, 4), (3, 6), (64, 8)])
def test_number_of_cpu_ranks(cores: int, ranks: int) -> None:
    assert f"up to {ranks} ranks" in checks(Machine(n_cores=cores))["CPU ranks"].detail


def test_library_alone_names_what_to_install() -> None:
    found = checks(Machine(packages={}))
    assert not doctor.can_run_cpu_ranks(list(found.values()))
    assert found["CPU ranks"].remedy == "python -m pip install ipyparallel cloudpickle"
    assert found["Notebooks"].remedy.endswith("jupyterlab ipywidgets matplotlib pandas")


def test_one_missing_package() -> None:
    packages = {name: version for name, version in LAPTOP.items() if name != "cloudpickle"}
    check = checks(Machine(packages=packages))["CPU ranks"]
    assert check.detail.startswith("cloudpickle not installed")
    assert check.remedy == "python -m pip install cloudpickle"


def test_torch_without_gloo() -> None:
    assert "no gloo" in checks(Machine(has_gloo=False))["CPU ranks"].detail


def test_installed_flashinfer_is_not_imported_without_a_gpu() -> None:
    machine = Machine(packages=dict(GPU_BOX))
    found = checks(machine)
    expected = "FlashInfer 0.7.2 is installed but cannot be used: no NVIDIA GPU"
    assert found["trtllm"].detail == found["mnnvl"].detail == expected
    assert found["Triton"].detail == "Triton 3.7.1 is installed but cannot be used: no NVIDIA GPU"
    assert machine.imported == []


def test_driver_but_torch_for_the_cpu() -> None:
    check = checks(Machine(has_driver=True))["One shared GPU"]
    assert "built without CUDA" in check.detail
    assert check.remedy.endswith("torch==2.13.0")


def test_driver_but_hidden_gpu() -> None:
    check = checks(gpu_box())["One shared GPU"]
    assert "torch finds no GPU" in check.detail
    assert "CUDA_VISIBLE_DEVICES" in check.remedy


def test_one_gpu() -> None:
    expected = {
        "CPU ranks", "Notebooks", "One shared GPU", "Symmetric memory", "Triton", "trtllm", FUSED
    }  # fmt: skip
    machine = gpu_box(H200)
    assert working(machine) == expected
    assert "needs at least two" in checks(machine)["One GPU a rank"].detail
    assert "OVERLAPPING_DEVICES=1" in checks(machine)["Symmetric memory"].detail


def test_eight_gpus_behind_a_switch_run_everything() -> None:
    found = checks(gpu_box(*[H200] * 8))
    assert all(check.ok for check in found.values())
    assert "8 GPUs (NVIDIA H200): up to 8 ranks" in found["One GPU a rank"].detail


@pytest.mark.parametrize(
    ("changes", "failing", "detail"),
    [
        ({"has_nccl": False}, {"One GPU a rank"}, "no NCCL"),
        ({"has_peer_access": False}, {"Symmetric memory"}, "cannot read each other's memory"),
        ({"has_multicast": False}, {"mnnvl"}, "no multicast"),
        ({"has_compiler": False}, {"trtllm", "mnnvl"}, "no nvcc"),
        ({"packages": LAPTOP | {"triton": "3.7.1"}}, {"trtllm", "mnnvl"}, "is not installed"),
        ({"packages": LAPTOP | {"flashinfer-python": "0.7.2"}}, {"Triton"}, "not installed"),
        (
            {"broken": {"flashinfer.comm": "ImportError"}},
            {"trtllm", "mnnvl"},
            "its import raises ImportError",
        ),
        ({"gpu_list": (A100, A100)}, {"trtllm"}, "A100-SXM4-80GB has compute capability 8.0"),
        ({"gpu_list": (H200, A100)}, {"trtllm"}, "A100-SXM4-80GB has compute capability 8.0"),
    ],
)
def test_what_a_missing_part_of_a_gpu_machine_takes_away(
    changes: dict[str, object], failing: set[str], detail: str
) -> None:
    found = checks(gpu_box(*[H200] * 8, **changes))
    assert {name for name, check in found.items() if not check.ok} - {FUSED} == failing
    assert all(detail in found[name].detail for name in failing)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({}, "FlashInfer and Triton over symmetric memory; up to 2048 tokens"),
        ({"has_compiler": False}, "Triton over symmetric memory; up to"),
        ({"packages": LAPTOP | {"flashinfer-python": "0.7.2"}}, "FlashInfer; up to"),
        ({"has_peer_access": False}, "neither FlashInfer nor Triton"),
        ({"packages": LAPTOP}, "neither FlashInfer nor Triton"),
    ],
)
def test_what_carries_out_the_fused_operation(changes: dict[str, object], detail: str) -> None:
    check = checks(gpu_box(*[H200] * 8, **changes))[FUSED]
    assert check.detail.startswith(detail)
    assert check.ok == (not detail.startswith("neither"))


def test_prebuilt_kernels_need_no_compiler() -> None:
    packages = GPU_BOX | {"flashinfer-jit-cache": "0.7.2"}
    machine = gpu_box(H200, H200, has_compiler=False, packages=packages)
    assert {"trtllm", "mnnvl"} <= working(machine)


def test_report_puts_a_remedy_below_and_says_it_once() -> None:
    lines = doctor.report(doctor.diagnose(Machine(packages={}))).splitlines()
    assert lines[0].startswith("[ok] Versions: ")
    assert lines[1].startswith("[no] CPU ranks: ")
    assert lines[2] == "     to do: python -m pip install ipyparallel cloudpickle"
    assert sum("Nothing to install here" in line for line in lines) == 1
    assert "Nothing to install here" in lines[-1]


def test_command_line_on_this_machine() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "stepmoe", "doctor"],
        capture_output=True,
        text=True,
        timeout=120,  # imports torch, which takes tens of seconds from a cold disk
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "[ok] CPU ranks" in result.stdout
    assert socket.gethostname() not in result.stdout
    assert str(Path.home()) not in result.stdout
    assert not re.search(r"(?<!\S)/\w+/", result.stdout), "a path in the output"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [list(check) for check in found] == [["name", "ok", "detail", "remedy"]] * len(found)


def test_exit_status_without_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "Probe", lambda: Machine(packages={}))
    assert command_line.main(["doctor"]) == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--version"])
    assert capsys.readouterr().out == f"stepmoe {stepmoe.__version__}\n"


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main([])
    assert "command" in capsys.readouterr().err
