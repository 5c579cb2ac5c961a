"""The lists of dependencies, the Makefile and the CI script agree with each other."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}  # conda-forge's name where it differs from PyPI's


def requirements(*extras: str, everywhere: bool = False) -> dict[str, SpecifierSet]:
    """Name to bounds: the library's own and those of some extras.

    Args:
        everywhere: leave out what only some platforms need.
    """
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = [r for r in map(Requirement, lines) if not (everywhere and r.marker)]
    return {r.name: r.specifier for r in found}


def conda_requirements() -> dict[str, SpecifierSet]:
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    entries = [e for e in environment["dependencies"] if isinstance(e, str)]
    return {r.name: r.specifier for r in map(Requirement, entries)}


def pins() -> dict[str, SpecifierSet]:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    return {r.name: r.specifier for r in map(Requirement, entries)}


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,  # nothing is installed or run here: seconds, even on a loaded machine
        check=False,
    )


def test_library_alone_needs_three_packages() -> None:
    assert set(requirements()) == {"torch", "numpy", "safetensors"}


def test_what_a_rank_imports_is_torch_and_little_else() -> None:
    """Every rank pays for it at its start: sympy alone, by way of DTensor, costs 0.7 s of CPU."""
    heavy = ("sympy", "triton", "pandas", "matplotlib", "scipy", "torch._dynamo")
    script = (
        "import sys, stepmoe.launch.worker, stepmoe.lesson, stepmoe.faults\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, cwd=REPO, text=True, timeout=60) == "[]\n"


def test_the_library_alone_computes() -> None:
    """On torch, numpy and safetensors; what needs more says what to install."""
    optional = "matplotlib ipywidgets IPython pandas scipy statsmodels ipyparallel cloudpickle"
    script = f"""
import sys
sys.modules |= dict.fromkeys("{optional} psutil tqdm triton flashinfer huggingface_hub".split())
import stepmoe as sm
assert "torch" not in sys.modules, "import stepmoe takes milliseconds"
import torch
for name in sm.__all__:
    getattr(sm, name)
ids = torch.arange(6).view(2, 3)
for variant in sm.VARIANTS:
    sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant).generate(ids, 2)
try:
    sm.Ranks(2)
except ImportError as error:
    assert "pip install 'stepmoe[notebooks]'" in str(error)
from stepmoe.__main__ import main
print(main(["bench"]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPO,
        text=True,
        timeout=60,
        capture_output=True,
        check=True,
    )
    assert ran.stdout == "2\n"
    assert "pip install 'stepmoe[notebooks]'" in ran.stderr


def test_conda_environment_has_the_same_packages_and_bounds() -> None:
    expected = {
        CONDA_NAMES.get(name, name): bounds
        for name, bounds in requirements("notebooks", "test", "dev", everywhere=True).items()
    }
    expected["python"] = SpecifierSet(PROJECT["requires-python"])
    expected["pip"] = SpecifierSet()
    assert conda_requirements() == expected


def test_conda_environment_installs_this_checkout() -> None:
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    assert {"pip": ["-e ."]} in environment["dependencies"]
    assert environment["channels"] == ["conda-forge"]


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    for name, bounds in requirements("notebooks", "test", "dev", "browser").items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        (pin,) = pinned[name]
        assert pin.operator == "==", name
        assert pin.version in bounds, f"{name}=={pin.version} is outside {bounds}"


def test_version_is_a_literal_that_setuptools_can_read() -> None:
    tree = ast.parse((REPO / "stepmoe" / "__init__.py").read_text())
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert [ast.literal_eval(value) for value in values] == ["0.1.0"]


def test_every_folder_of_the_package_is_installed() -> None:
    for folder in {path.parent for path in (REPO / "stepmoe").rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), f"{folder.name} has no __init__.py"
    assert (REPO / "stepmoe" / "py.typed").is_file()


def test_make_help_names_every_target() -> None:
    shown = set(re.findall(r"^make (\S+)", make("help").stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert shown == set(phony[1].split()) - {"help", "FORCE"}
    assert make().stdout == make("help").stdout, "help is the default target"


def test_make_names_a_missing_python(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_bytes((REPO / "Makefile").read_bytes())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    result = make("-C", str(tmp_path), "test", PYTHON="no-such-python")
    assert result.returncode != 0
    assert "'no-such-python' was not found" in result.stdout
    assert not (tmp_path / ".venv").exists()


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "old python"  # a space in its path, too
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.9.1;; *) exit 1;; esac\n')
    old.chmod(0o755)
    (tmp_path / "Makefile").write_bytes((REPO / "Makefile").read_bytes())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    result = make("-C", str(tmp_path), "walkthrough", PYTHON=str(old))
    assert result.returncode != 0
    assert "Python 3.9.1 is too old: stepmoe needs 3.11 or newer" in result.stdout


def test_make_test_ends_with_one_pytest_run_over_tests_and_notebooks() -> None:
    steps = make("--dry-run", "--always-make", "test").stdout.strip().splitlines()
    runs = [step for step in steps if "-m pytest" in step]
    assert runs == steps[-1:]
    assert "--nbval " in runs[0]
    assert runs[0].endswith(" notebooks tests")


def test_make_test_browser_chooses_the_browser_tests() -> None:
    steps = make("--dry-run", "--always-make", "test-browser").stdout.strip().splitlines()
    assert steps[-1].endswith(" -m pytest -m browser tests/browser")


def test_ci_runs_the_tests_and_then_those_in_a_browser() -> None:
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().strip().splitlines()[-2:] == ["make test", "make test-browser"]
