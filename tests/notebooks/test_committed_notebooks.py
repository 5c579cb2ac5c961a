"""Every notebook is committed as it ran, so that nbval has something to compare with."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb")) + sorted(FOLDER.glob("solutions/*.ipynb"))

MAX_CODE_LINES = 15  # what fits beside its output on a screen
NOT_COMPARED = {"image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json"}
# A slash that starts a word and is followed by another: not a/b, not https://, not </tag>, not 1/2.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~<+=-])/[A-Za-z][\w.-]*/[\w.-]+")
HOW = "run: .venv/bin/python notebooks/build.py --in-place"


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def texts(output: NotebookNode) -> list[str]:
    """Everything readable in one output."""
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return [output.evalue, *output.traceback]
    return [value for kind, value in output.data.items() if kind not in NOT_COMPARED]


def is_compared(cell: NotebookNode) -> bool:
    """Whether nbval compares anything of this cell."""
    if {"nbval-ignore-output", "nbval-skip"} & set(tags(cell)):
        return False
    return any(
        output.output_type == "stream" or set(output.get("data", {})) - NOT_COMPARED
        for output in cell.outputs
    )


def code_lines(source: str) -> int:
    lines = [line.strip() for line in source.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def problems(notebook: NotebookNode) -> list[str]:
    """What keeps a notebook from being committed; empty when nothing does."""
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"was not run once, in order: execution counts {counts}; {HOW}")
    if not any(is_compared(cell) for cell in cells):
        found.append("has no output that is compared when it runs again")
    for number, cell in enumerate(cells, start=1):
        if (lines := code_lines(cell.source)) > MAX_CODE_LINES:
            found.append(f"code cell {number} has {lines} lines of code, over {MAX_CODE_LINES}")
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                found.append(f"code cell {number} failed: {output.ename}: {output.evalue}")
            for text in texts(output):
                if match := ABSOLUTE_PATH.search(text):
                    found.append(f"code cell {number} shows a path of one machine: {match[0]}")
    return found


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, "notebooks/ has no notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_it_ran(path: Path) -> None:
    assert problems(nbformat.read(path, as_version=4)) == []


def ran(source: str, output: NotebookNode | None, *tags: str, count: int = 1) -> NotebookNode:
    """A notebook with one executed cell."""
    cell = new_code_cell(source, execution_count=count, outputs=[output] if output else [])
    if tags:
        cell.metadata.tags = list(tags)
    return new_notebook(cells=[cell])


def printed(text: str) -> NotebookNode:
    return new_output("stream", name="stdout", text=text)


def failed(traceback: str = "Traceback") -> NotebookNode:
    return new_output("error", ename="ValueError", evalue="no", traceback=[traceback])


def test_a_good_notebook_has_no_problem() -> None:
    assert problems(ran("print(1)", printed("1, see https://example.org/tmp/x and a/tmp/b"))) == []
    notebook = ran("1 / 0", failed(), "raises-exception")
    notebook.cells.append(new_code_cell("print(2)", execution_count=2, outputs=[printed("2")]))
    assert problems(notebook) == []


PICTURE = new_output("display_data", data={"image/png": "AAAA"})


@pytest.mark.parametrize(
    ("notebook", "problem"),
    [
        (ran("print(1)", printed("1"), count=2), "was not run once, in order"),
        (new_notebook(cells=[new_code_cell("print(1)")]), "was not run once, in order"),
        (new_notebook(), "no output that is compared"),
        (ran("x = 1", None), "no output that is compared"),
        (ran("plot()", PICTURE), "no output that is compared"),
        (ran("print(1)", printed("1"), "nbval-ignore-output"), "no output that is compared"),
        (ran("1 / 0", failed()), "code cell 1 failed: ValueError: no"),
        (ran("x = 1\n" * 16, printed("1")), "16 lines of code, over 15"),
        (ran("print(p)", printed("wrote /home/ada")), "/home/ada"),
        (ran("f()", failed("File /srv/repo/f.py"), "raises-exception"), "/srv/repo"),
    ],
)
def test_each_problem_is_found(notebook: NotebookNode, problem: str) -> None:
    assert any(problem in text for text in problems(notebook)), problems(notebook)
