"""JupyterLab in a browser page, worked as a person works it: menus, toolbar, keys, sight."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import ConsoleMessage, Locator, Page, Request

RAN = re.compile(r"^\[\d+\]:$")  # the prompt of a cell that has run to its end, well or not
# What is in one output; a drawing is compared by its bytes, wherever its address points.
DRAWING = """async (output) => {
    const drawing = output.querySelector(".jp-OutputArea-output :is(img, canvas, svg)");
    if (!drawing) return null;
    if (drawing.tagName === "CANVAS") return drawing.toDataURL();
    if (drawing.tagName !== "IMG") return drawing.outerHTML;
    const bytes = new Uint8Array(await (await fetch(drawing.src)).arrayBuffer());
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}"""

# Whether one sees the middle of an element, once the page has been painted again.
IN_SIGHT = """async (element) => {
    for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
    const box = element.getBoundingClientRect();
    const top = document.elementFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2);
    return element.contains(top);
}"""


class JupyterLabPage:
    """One page of the browser. Every method that waits ends with an error after its limit.

    Args:
        page: of Playwright, still empty.
        url: of JupyterLab, with a slash at its end.
        token: what it asks for.
        folder: where screenshots and the log go.
    """

    def __init__(self, page: Page, url: str, token: str, folder: Path) -> None:
        self.page = page
        self.requests_outside: list[str] = []
        self._url, self._token, self._folder = url, token, folder
        self._start = time.monotonic()
        self._steps = 0
        self._log: list[str] = []
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.note(f"uncaught: {error}"))
        page.on("request", self._note_request)

    # Notebooks

    def open(self, name: str, cells: int) -> None:
        """Open a notebook by its address, in an otherwise empty JupyterLab."""
        self.page.goto(f"{self._url}lab/tree/{name}?token={self._token}&reset")
        self._wait_for_notebook(cells)

    def open_from_file_browser(self, name: str, cells: int) -> None:
        self.page.locator(".jp-DirListing-item", has_text=name).dblclick()
        self._wait_for_notebook(cells)

    def _wait_for_notebook(self, cells: int) -> None:
        self.wait(f"{cells} cells to be shown", 60, lambda: self.cells.count() == cells)
        self.wait_for_kernel("Idle")

    def save(self) -> None:
        self.menu("File", "Save Notebook")
        unsaved = self.page.locator(".lm-TabBar-tab.jp-mod-dirty")
        self.wait("the notebook to be saved", 30, lambda: unsaved.count() == 0)

    def close_tab(self) -> None:
        """Close the notebook; its kernel runs on."""
        self.menu("File", "Close Tab")
        self.wait("the notebook to close", 30, lambda: self.cells.count() == 0)

    def close_and_shut_down(self) -> None:
        """Close the notebook and end its kernel."""
        self.menu("File", "Close and Shut Down Notebook…")
        self.accept_dialog("Shut down the notebook")
        self.wait("the notebook to close", 30, lambda: self.cells.count() == 0)

    # Cells, numbered from 0; markdown cells have no number.

    @property
    def cells(self) -> Locator:
        """All cells, markdown too."""
        return self.page.locator(".jp-Notebook .jp-Cell")

    @property
    def code_cells(self) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell")

    def prompts(self) -> list[str]:
        # Not the inner text: that is empty while a cell is out of sight.
        return self.code_cells.locator(".jp-InputPrompt").all_text_contents()

    def output(self, cell: int) -> str:
        """The text of all outputs of a code cell."""
        return self.code_cells.nth(cell).locator(".jp-Cell-outputArea").text_content() or ""

    def errors(self, cell: int | None = None) -> list[str]:
        """The last line of each traceback, the error's message, in one code cell or in all."""
        cells = self.code_cells if cell is None else self.code_cells.nth(cell)
        # JupyterLab shows a traceback like anything else that is written to stderr.
        stderr = cells.locator('[data-mime-type="application/vnd.jupyter.stderr"]')
        tracebacks = stderr.filter(has_text="Traceback (most recent call last)")
        return [text.strip().splitlines()[-1] for text in tracebacks.all_text_contents()]

    def clear_outputs(self) -> None:
        self.menu("Edit", "Clear Outputs of All Cells")
        self.wait("empty prompts", 10, lambda: set(self.prompts()) == {"[ ]:"})

    def run_all(self, limit: float) -> None:
        """Clear what is there, so that what is there afterwards is new; then run all cells."""
        self.clear_outputs()
        self.menu("Run", "Run All Cells")
        self.wait(
            "every cell to run", limit, lambda: self.errors() or all(map(RAN.match, self.prompts()))
        )
        assert self.errors() == []
        self.wait_for_kernel("Idle")

    def start_cell(self, cell: int) -> None:
        self.code_cells.nth(cell).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Shift+Enter")

    def wait_for_cell(self, cell: int, limit: float) -> None:
        prompt = self.code_cells.nth(cell).locator(".jp-InputPrompt")
        self.wait(f"code cell {cell}", limit, lambda: RAN.match(prompt.text_content() or ""))
        self.wait_for_kernel("Idle")

    def run_cell(self, cell: int, limit: float) -> float:
        """Run one cell, without an error, and say how many seconds it took."""
        start, before = time.monotonic(), self.prompts()[cell]
        self.start_cell(cell)
        self.wait(f"code cell {cell} to start", limit, lambda: self.prompts()[cell] != before)
        self.wait_for_cell(cell, limit)
        seconds = time.monotonic() - start
        assert self.errors(cell) == []
        self.note(f"code cell {cell} took {seconds:.1f} s")
        return seconds

    # A slider and the figure it drives

    def first_slider(self) -> tuple[Locator, Locator]:
        """The handle of the first slider that is shown, and the output it is in."""
        output = self.page.locator(".jp-Cell-outputArea", has=self.page.get_by_role("slider")).first
        slider = output.get_by_role("slider").first
        self.scroll_to(slider)
        return slider, output

    def drawing(self, output: Locator) -> str:
        """The bytes of the first figure in an output."""
        drawing = output.evaluate(DRAWING)
        assert drawing, "no figure in this output"
        return str(drawing)

    # What surrounds the notebook

    def menu(self, name: str, entry: str) -> None:
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()

    def accept_dialog(self, title: str) -> None:
        dialog = self.page.locator(".jp-Dialog", has_text=title)
        dialog.locator(".jp-mod-accept").click()
        self.wait("the dialog to close", 10, lambda: dialog.count() == 0)

    def press_stop(self) -> None:
        self.page.locator('.jp-NotebookPanel-toolbar [title="Interrupt the kernel"]').click()

    def wait_for_kernel(self, status: str, limit: float = 60) -> None:
        bar = self.page.locator("#jp-main-statusbar")
        self.wait(f"kernel: {status}", limit, lambda: f"| {status}" in (bar.text_content() or ""))

    # Waiting, and what is kept

    def scroll_to(self, what: Locator) -> None:
        """Bring something into sight. Tried again: JupyterLab scrolls too, and draws cells late."""

        def scrolled() -> bool:
            what.scroll_into_view_if_needed()
            return bool(what.evaluate(IN_SIGHT))

        self.wait("what was scrolled to", 30, scrolled)

    def wait(self, what: str, limit: float, condition: Callable[[], object]) -> None:
        """Poll until a condition holds; after `limit` seconds fail, saying what did not come."""
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, f"waited {limit} s for {what}"
            self.page.wait_for_timeout(100)  # keeps the page's events coming, unlike time.sleep

    def screenshot(self, name: str) -> None:
        self._steps += 1
        self.note(f"screenshot {name}")
        self.page.screenshot(path=self._folder / f"{self._steps:02}-{name}.png")

    def note(self, text: str) -> None:
        """A line for the log."""
        self._log.append(f"{time.monotonic() - self._start:6.1f} s  {text}")

    def write_log(self) -> None:
        """What happened in the page, its console included."""
        (self._folder / "log.txt").write_text("\n".join(self._log) + "\n")

    def _note_console(self, message: ConsoleMessage) -> None:
        self.note(f"console {message.type}: {message.text}")

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((self._url, "data:", "blob:")):
            self.requests_outside.append(request.url)
