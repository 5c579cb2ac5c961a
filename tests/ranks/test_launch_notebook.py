"""`Ranks` in a real Jupyter kernel: functions of cells, interruption, a cell run again."""

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = {
    "start": """
import os, signal, threading, time
import torch, torch.distributed as dist
from stepmoe.errors import RankError
from stepmoe.launch import Ranks, progress
scale = 10
ranks = Ranks(2, device="cpu")
""",
    "functions": """
def scaled():
    return scale * dist.get_rank()

print(ranks.run(scaled), ranks.run(lambda: scaled() + 1))
""",
    "output": """
def speak():
    print("here")

_ = ranks.run(speak)
""",
    "error": """
def fail():
    if dist.get_rank() == 1:
        raise ValueError("in a cell")
    dist.barrier()

try:
    ranks.run(fail)
except RankError as error:
    print(error)
""",
    "interrupt": """
def hang():
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()

# Jupyter interrupts a kernel with this signal.
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    ranks.run(hang)
except KeyboardInterrupt:
    print("freed", time.monotonic() - start < 3)
print(ranks.run(scaled))
""",
    "again": """
start = time.monotonic()
ranks = Ranks(2, device="cpu")
print(time.monotonic() - start < 2, ranks.run(scaled))
""",
    "progress": """
def work():
    for _ in progress(range(30), desc="layers"):
        time.sleep(0.1)

_ = ranks.run(work)
""",
    "close": "ranks.close()",
}


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[nbformat.NotebookNode]]:
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def text(outputs: list[nbformat.NotebookNode]) -> str:
    assert [output.get("name") for output in outputs] == ["stdout"], outputs
    joined: str = outputs[0].text
    return joined


def test_starting_and_closing_print_nothing(
    outputs: dict[str, list[nbformat.NotebookNode]],
) -> None:
    assert outputs["start"] == []
    assert outputs["close"] == []


def test_functions_of_cells(outputs: dict[str, list[nbformat.NotebookNode]]) -> None:
    assert text(outputs["functions"]) == "[0, 10] [1, 11]\n"
    assert text(outputs["output"]) == "[rank 0] here\n[rank 1] here\n"


def test_an_error_shows_the_cell_and_its_line(
    outputs: dict[str, list[nbformat.NotebookNode]],
) -> None:
    assert text(outputs["error"]).splitlines()[:4] == [
        "rank 1 raised ValueError: in a cell",
        "Traceback of rank 1:",
        "  a cell, line 3, in fail",
        '    raise ValueError("in a cell")',
    ]


def test_interrupting_the_kernel(outputs: dict[str, list[nbformat.NotebookNode]]) -> None:
    assert text(outputs["interrupt"]) == "freed True\n[0, 10]\n"


def test_running_the_cell_again(outputs: dict[str, list[nbformat.NotebookNode]]) -> None:
    assert text(outputs["again"]) == "True [0, 10]\n"


def test_a_progress_bar_leaves_an_output_without_data(
    outputs: dict[str, list[nbformat.NotebookNode]],
) -> None:
    """nbval compares what an output holds, so the same notebook passes with and without a bar."""
    assert [dict(output.data) for output in outputs["progress"]] == [{}]
