"""The builder of the walkthrough, on notebooks made up for the test."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """notebooks/build.py, which is a script and not part of a package."""
    spec = importlib.util.spec_from_file_location("build", REPO / "notebooks" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def write(path: Path, *cells: str) -> None:
    """A notebook that was never run; a cell that starts with # is text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make = [new_markdown_cell(c) if c.startswith("#") else new_code_cell(c) for c in cells]
    nbformat.write(new_notebook(cells=make), path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "path with space"


def run(build: ModuleType, source: Path, *arguments: str) -> tuple[int, Path]:
    output = source.parent / "out"
    return build.main(["--source", str(source), "--output", str(output), *arguments]), output


def test_goes_on_after_a_failing_notebook(
    build: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(source / "00_bad.ipynb", "# Bad\n\nIt <fails>.", "x = 1", "x / 0", "print('not reached')")
    write(
        source / "01_good.ipynb",
        "# The *good* one\n\nSee [the bad](00_bad.ipynb) first. Then [more](results/more.md).",
        "print(6 * 7)",
    )
    write(source / "solutions" / "01_good.ipynb", "# Solution", "print('solved')")
    (source / "results").mkdir()
    (source / "results" / "more.md").write_text("More")
    before = {path: path.read_bytes() for path in source.rglob("*.ipynb")}

    status, output = run(build, source)

    assert status == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"00_bad +\d+\.\d s  FAILED", lines[0])
    assert lines[1] == "    cell 3 (x / 0): ZeroDivisionError: division by zero"
    assert re.fullmatch(r"01_good +\d+\.\d s  ok", lines[2])
    assert re.fullmatch(r"solutions/01_good +\d+\.\d s  ok", lines[3])
    assert lines[-1] == f"Open {output / 'index.html'}"
    assert {path: path.read_bytes() for path in source.rglob("*.ipynb")} == before

    index = (output / "index.html").read_text()
    assert "1 of 3 notebooks failed." in index
    assert "It &lt;fails&gt;." in index
    assert "See the bad first.</td>" in index
    assert 'href="solutions/01_good.html"' in index
    assert not re.search(r'(src|href)="(https?:)?//', index), "the index page stands alone"
    page = (output / "01_good.html").read_text()
    assert "42" in page
    assert 'href="00_bad.html"' in page
    assert 'href="../path%20with%20space/results/more.md"' in page
    assert "ZeroDivisionError" in (output / "00_bad.html").read_text()


def test_in_place_stores_only_what_stays_the_same(build: ModuleType, source: Path) -> None:
    path = source / "00.ipynb"
    write(
        path,
        "# One",
        "import sys\nprint('a', flush=True)\nprint('b')",
        "import ipywidgets\nipywidgets.IntSlider()",
        "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])",
    )
    assert run(build, source, "--in-place")[0] == 0
    first = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    assert [c.execution_count for c in notebook.cells[1:]] == [1, 2, 3]
    assert [o.text for o in notebook.cells[1].outputs] == ["a\nb\n"]
    assert set(notebook.cells[2].outputs[0].data) == {"text/plain"}
    assert "image/png" in notebook.cells[3].outputs[0].data
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)
    assert "data:image/png;base64" in (source.parent / "out" / "00.html").read_text()

    assert run(build, source, "--in-place")[0] == 0
    assert path.read_bytes() == first, "a second run changes nothing"


def test_in_place_keeps_a_failing_notebook_as_it_was(build: ModuleType, source: Path) -> None:
    write(source / "00.ipynb", "# One", "1 / 0")
    before = (source / "00.ipynb").read_bytes()
    assert run(build, source, "--in-place")[0] == 1
    assert (source / "00.ipynb").read_bytes() == before


def test_expected_exception_is_no_failure_and_its_traceback_holds_no_checkout_path(
    build: ModuleType, source: Path
) -> None:
    cell = new_code_cell("import fractions\nraise RuntimeError(fractions.__name__)")
    cell.metadata.tags = ["raises-exception"]
    notebook = new_notebook(cells=[new_markdown_cell("# One"), cell])
    source.mkdir()
    nbformat.write(notebook, source / "00.ipynb")
    assert run(build, source, "--in-place")[0] == 0
    (output,) = nbformat.read(source / "00.ipynb", as_version=4).cells[1].outputs
    assert output.ename == "RuntimeError"
    assert str(REPO) not in "".join(output.traceback)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("import time; time.sleep(60)", "ran longer than 2 s"),
        ("import os; os._exit(1)", "its kernel died"),
    ],
)
def test_a_cell_that_hangs_or_ends_its_kernel(
    build: ModuleType,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    cell: str,
    message: str,
) -> None:
    write(source / "00.ipynb", "# One", cell)
    assert run(build, source, "--cell-timeout", "2")[0] == 1
    assert f"    cell 2 ({cell}): {message}" in capsys.readouterr().out


def test_no_notebook(build: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.mkdir()
    assert run(build, source)[0] == 2
    assert "There is no notebook" in capsys.readouterr().err


def test_notebook_outside_the_source(
    build: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source.mkdir()
    assert run(build, source, str(source / "missing.ipynb"))[0] == 2
    assert "missing.ipynb is not a notebook under" in capsys.readouterr().err
