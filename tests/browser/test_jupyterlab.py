"""The notebooks in JupyterLab, in a real browser, as a person uses them.

Each test leaves numbered screenshots and a log in build/browser/.
"""

import base64
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

if TYPE_CHECKING:
    from conftest import JupyterLab
    from jupyterlab_page import JupyterLabPage

pytestmark = pytest.mark.browser

# A notebook takes some 30 s on 2 idle cores; this leaves room on a busy machine, and is below
# the time limit of a test.
RUN_ALL = 150
START = 60  # importing torch and starting 4 ranks: 8 s on 2 idle cores
SECONDS = 10  # what a person calls "at once": a call takes 20 ms, freeing ranks less than 3 s

RANKS = """
from pathlib import Path
import torch, torch.distributed as dist
import stepmoe as sm
ranks = sm.Ranks(4, device="cpu")
"""
ADD_UP = """
def add_up():
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()

print(ranks.run(add_up))
"""
HANG = """
def one_stays_away(entered):
    if dist.get_rank() != 3:
        Path(entered).touch()
        dist.all_reduce(torch.ones(1))

ranks.run(one_stays_away, str(Path("entered").absolute()), timeout=600)
"""
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
START_CELL, ADD_CELL, HANG_CELL = 0, 1, 2


def number_of_cells(path: Path) -> int:
    return len(nbformat.read(path, 4).cells)


def saved_outputs(path: Path) -> list[list[str]]:
    """For each code cell of a notebook file, what kinds of output it holds."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return [
        [kind for output in cell.outputs for kind in output.get("data", {"text": None})]
        for cell in cells
    ]


def saved_pictures(path: Path) -> list[str]:
    """The PNG pictures in a notebook file, which an export shows, as hexadecimal digits."""
    outputs = [
        output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])
    ]
    pictures = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    return [base64.b64decode(picture).hex() for picture in pictures]


@pytest.fixture
def small(jupyterlab: "JupyterLab", request: pytest.FixtureRequest) -> Path:
    """A notebook that starts ranks, uses them, and can make them hang."""
    path = jupyterlab.folder / f"{request.node.name}.ipynb"
    cells = [new_code_cell(source.strip()) for source in (RANKS, ADD_UP, HANG)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)
    return path


def test_start_here_runs_and_is_found_again(
    page: "JupyterLabPage", jupyterlab: "JupyterLab"
) -> None:
    path = jupyterlab.folder / "00_start_here.ipynb"
    cells = number_of_cells(path)
    page.open(path.name, cells)
    page.screenshot("opened")
    page.run_all(RUN_ALL)
    page.screenshot("ran")
    page.save()
    page.close_and_shut_down()
    page.screenshot("closed")
    jupyterlab.wait_until_alone(SECONDS)

    page.open_from_file_browser(path.name, cells)
    assert page.errors() == []
    kinds = saved_outputs(path)
    assert sum("image/png" in kind for kind in kinds) >= 2  # the count and the timeline
    drawings = page.code_cells.locator(".jp-RenderedImage img")
    assert drawings.count() == sum(kind.count("image/png") for kind in kinds)
    for number, kind in enumerate(kinds):
        shown = page.output(number)
        assert bool(shown.strip() or "image/png" in kind) == bool(kind), number
        assert "Error displaying widget" not in shown, number
    for number in range(drawings.count()):
        page.scroll_to(drawings.nth(number))
        page.screenshot(f"reopened_figure_{number}")


def test_slider_of_latency_moves_its_figure(
    page: "JupyterLabPage", jupyterlab: "JupyterLab"
) -> None:
    path = jupyterlab.folder / "06_latency.ipynb"
    page.open(path.name, number_of_cells(path))
    page.run_all(RUN_ALL)
    slider, output = page.first_slider()
    page.screenshot("ran")
    value, first = slider.get_attribute("aria-valuenow"), page.drawing(output)

    slider.focus()
    page.page.keyboard.press("ArrowRight")
    page.wait("the slider", SECONDS, lambda: slider.get_attribute("aria-valuenow") != value)
    page.wait("another figure", SECONDS, lambda: page.drawing(output) != first)
    page.wait_for_kernel("Idle")
    page.screenshot("one_step_right")
    assert page.errors() == []

    value, drawing = slider.get_attribute("aria-valuenow"), page.drawing(output)
    page.save()
    as_exported = first in saved_pictures(path)  # not in the assert, which would print pictures
    assert as_exported, "before anything was moved, the figure was not the one an export shows"
    page.close_tab()
    page.open_from_file_browser(path.name, number_of_cells(path))
    slider, output = page.first_slider()
    page.screenshot("reopened_while_the_kernel_runs")
    assert slider.get_attribute("aria-valuenow") == value
    assert page.drawing(output) == drawing


def test_stop_button_frees_a_hanging_cell(
    page: "JupyterLabPage", jupyterlab: "JupyterLab", small: Path
) -> None:
    page.open(small.name, 3)
    page.run_cell(START_CELL, START)
    page.run_cell(ADD_CELL, SECONDS)
    page.start_cell(HANG_CELL)
    entered = jupyterlab.folder / "entered"
    page.wait("ranks to enter the collective", SECONDS, entered.exists)
    page.screenshot("hangs")
    assert page.prompts()[HANG_CELL] == "[*]:"
    page.press_stop()
    page.wait_for_cell(HANG_CELL, SECONDS)
    page.screenshot("stopped")
    assert [error.split(":")[0] for error in page.errors()] == ["KeyboardInterrupt"]

    page.run_cell(ADD_CELL, SECONDS)
    assert page.output(ADD_CELL).strip() == "[4.0, 4.0, 4.0, 4.0]"
    page.screenshot("next_cell")
    processes = len(jupyterlab.processes())
    page.run_cell(START_CELL, SECONDS)  # takes the running ranks over
    page.run_cell(ADD_CELL, SECONDS)
    page.screenshot("ranks_cell_again")
    assert len(jupyterlab.processes()) == processes


def test_shutting_the_kernel_down_ends_its_ranks(
    page: "JupyterLabPage", jupyterlab: "JupyterLab", small: Path
) -> None:
    page.open(small.name, 3)
    page.run_cell(START_CELL, START)
    assert len(jupyterlab.processes()) >= 5  # a kernel and 4 ranks
    page.menu("Kernel", "Shut Down Kernel")
    jupyterlab.wait_until_alone(SECONDS)
    page.wait("no kernel", SECONDS, page.page.get_by_text("No Kernel").first.is_visible)
    page.screenshot("shut_down")


def test_a_killed_kernel_takes_its_ranks_along(
    page: "JupyterLabPage", jupyterlab: "JupyterLab", small: Path
) -> None:
    """As when the system runs out of memory: JupyterLab starts a new kernel, without ranks."""
    page.open(small.name, 3)
    page.run_cell(START_CELL, START)
    (kernel,) = psutil.Process(jupyterlab.pid).children()
    os.kill(kernel.pid, signal.SIGKILL)
    page.wait("the dialog", START, page.page.get_by_text("Kernel Restarting").is_visible)
    page.screenshot("killed")
    page.accept_dialog("Kernel Restarting")
    page.wait("the ranks to end", SECONDS, lambda: len(jupyterlab.processes()) == 1)

    page.clear_outputs()
    page.run_cell(START_CELL, START)
    page.run_cell(ADD_CELL, SECONDS)
    assert page.output(ADD_CELL).strip() == "[4.0, 4.0, 4.0, 4.0]"
    page.screenshot("started_again")
