"""Source that a notebook shows is the source there is: nbval finds it too, but minutes later."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest

from stepmoe import show

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb")])
SHOWS = ("show.source(", "show.diff(")
SHOWING = [path for path in NOTEBOOKS if any(call in path.read_text() for call in SHOWS)]


def shows(line: ast.stmt) -> bool:
    return ast.unparse(line).startswith(SHOWS)


def names(line: ast.stmt) -> bool:
    """Whether a line may name what is shown: an import, or NAME = constant."""
    if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
        return isinstance(line.value, ast.Constant)
    return isinstance(line, ast.Import | ast.ImportFrom)


def outdated(notebook: Path, displayed: list[Any]) -> list[str]:
    """The lines of a notebook that would now show something else than its outputs have.

    displayed: where stepmoe.show puts what it would display.
    """
    found, namespace = [], {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        outputs = [dict(out.data) for out in cell.outputs if out.output_type == "display_data"]
        for line in ast.parse(cell.source).body:
            if names(line):
                exec(ast.unparse(line), namespace)
            if shows(line):
                exec(ast.unparse(line), namespace)
                now = displayed.pop()
                if {"text/plain": repr(now), "text/html": now._repr_html_()} not in outputs:
                    found.append(ast.unparse(line))
    return found


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    shown: list[Any] = []
    monkeypatch.setattr(show, "display", shown.append)
    return shown


@pytest.mark.parametrize("path", SHOWING, ids=lambda path: path.stem)
def test_the_source_shown_is_the_source_there_is(path: Path, displayed: list[Any]) -> None:
    name = path.relative_to(ROOT)
    assert outdated(path, displayed) == [], (
        f"the source of these has changed since {name} was run; run: "
        f".venv/bin/python notebooks/build.py --in-place {name}"
    )


def test_a_change_is_found(tmp_path: Path, displayed: list[Any]) -> None:
    notebook, changed = ROOT / "notebooks/03_deferred.ipynb", tmp_path / "changed.ipynb"
    changed.write_text(notebook.read_text().replace("self.routed_experts", "self.moe"))
    diff = "show.diff(ThreeAllReducesLayer.forward, DeferredLayer.forward)"
    assert outdated(changed, displayed) == [diff]
