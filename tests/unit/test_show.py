"""show: sources and differences, readable with and without colour, the same on every machine."""

from __future__ import annotations

import linecache
import re
import sys
from functools import wraps
from html import unescape
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

import stepmoe as sm
from stepmoe import show
from stepmoe.variants.deferred import DeferredLayer
from stepmoe.variants.three_all_reduces import ThreeAllReducesLayer


class Before:
    def add(self, x: int) -> int:
        total = x + 1
        return total


class After:
    def add(self, x: int) -> int:
        return x + 2 < 3


def shown(call: Any, *args: Any) -> tuple[str, str]:
    """Plain text and HTML of the one thing that a call displays."""
    with mock.patch.object(show, "display") as display:
        call(*args)
    (output,) = display.call_args.args
    return repr(output), output._repr_html_()


def without_tags(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html.replace("<br>", "\n")))


def test_source_shows_a_method_with_its_file_relative_to_the_package() -> None:
    text, html = shown(show.source, DeferredLayer.forward)
    caption, first, *_ = text.splitlines()
    assert caption == "stepmoe/variants/deferred.py  DeferredLayer.forward"
    assert first.startswith("def forward(")  # the indentation inside the class is gone
    assert "self.comm.all_reduce(mlp_partial" in text
    assert "".join(text.split()) == "".join(without_tags(html).split())
    assert "<span style=" in html  # coloured without a style sheet of the page


@pytest.mark.parametrize("obj", [DeferredLayer, sm.ParallelConfig.check, show.source])
def test_source_shows_classes_and_functions(obj: Any) -> None:
    text, _ = shown(show.source, obj)
    caption = text.splitlines()[0]
    assert caption.startswith("stepmoe/")
    assert caption.endswith(f"  {obj.__qualname__}")


def test_nothing_of_this_machine_is_shown() -> None:
    for output in (
        shown(show.source, ThreeAllReducesLayer),
        shown(show.diff, ThreeAllReducesLayer, DeferredLayer),
    ):
        for part in output:
            assert str(Path(sm.__file__).parent.parent) not in part
            assert not re.search(r"0x[0-9a-f]{6}", part)


def test_diff_marks_lines_with_signs_and_colours() -> None:
    text, html = shown(show.diff, Before.add, After.add)
    assert text.splitlines() == [
        "--- test_show.py  Before.add",
        "+++ test_show.py  After.add",
        " def add(self, x: int) -> int:",
        "-    total = x + 1",
        "-    return total",
        "+    return x + 2 < 3",
    ]
    colours = {
        line[0]: re.search(r"color: (#\w+)[^>]*>" + re.escape(line[:6]), html)
        for line in ("-    total = x + 1", "+    return x")
    }
    assert colours["-"]
    assert colours["+"]
    assert colours["-"][1] != colours["+"][1]
    assert "x + 2 &lt; 3" in html


def test_diff_of_two_variants_shows_all_of_both() -> None:
    text, html = shown(show.diff, ThreeAllReducesLayer.forward, DeferredLayer.forward)
    lines = text.splitlines()[2:]
    for variant, sign in ((ThreeAllReducesLayer, "-"), (DeferredLayer, "+")):
        source = shown(show.source, variant.forward)[0].splitlines()[1:]
        assert [line[1:] for line in lines if line[:1] in (" ", sign, "")] == source
    removed = [line for line in lines if line.startswith("-") and "all_reduce" in line]
    assert len(removed) == 4
    assert "".join(text.split()) == "".join(without_tags(html).split())


def test_diff_of_the_same_says_so() -> None:
    assert "(the same source)" in shown(show.diff, DeferredLayer, DeferredLayer)[0]


def test_outputs_are_the_same_every_time() -> None:
    for call, args in ((show.source, (sm.Ledger,)), (show.diff, (Before, After))):
        assert shown(call, *args) == shown(call, *args)


def test_a_decorated_function_shows_itself() -> None:
    def outer(function: Any) -> Any:
        @wraps(function)
        def wrapper() -> None:
            function()

        return wrapper

    @outer
    def inner() -> str:
        return "inside"

    assert 'return "inside"' in shown(show.source, inner)[0]


@pytest.mark.parametrize("obj", [len, 3, None])
def test_what_has_no_source_says_what_to_give(obj: Any) -> None:
    with pytest.raises(sm.ConfigError, match=r"no Python source.*give a function"):
        show.source(obj)


def test_a_name_is_read_without_importing_its_module() -> None:
    """The module imports Triton, which may be missing; the source and its decorator still show."""
    module = "stepmoe.kernels.all_reduce_norm_gpu"
    with mock.patch.dict(sys.modules):
        sys.modules.pop(module, None)
        text, _ = shown(show.source, f"{module}.meet")
        assert module not in sys.modules
    caption, decorator, signature, *body = text.splitlines()
    assert caption == "stepmoe/kernels/all_reduce_norm_gpu.py  meet"
    assert decorator == "@triton.jit"
    assert signature.startswith("def meet(flags, number, ")
    assert "tl.atomic_xchg" in "".join(body)
    assert "def " not in "".join(body)
    by_name, _ = shown(show.source, "stepmoe.show.diff")
    assert by_name == shown(show.source, show.diff)[0]


@pytest.mark.parametrize("name", ["text", "stepmoe.show.nothing", "stepmoe.nothing.source"])
def test_a_name_that_is_not_there(name: str) -> None:
    with pytest.raises(sm.ConfigError, match=f"'{name}': no such function or class"):
        show.source(name)


def test_a_function_of_a_cell_is_said_to_be_of_this_notebook() -> None:
    """A kernel names a cell's code after a file that is not there; linecache holds its lines."""
    name, code = "/tmp/ipykernel_12345/67890.py", "def from_a_cell():\n    return 1\n"
    namespace: dict[str, Any] = {}
    exec(compile(code, name, "exec"), namespace)
    with mock.patch.dict(linecache.cache, {name: (len(code), None, code.splitlines(True), name)}):
        text, _ = shown(show.source, namespace["from_a_cell"])
    assert text == "this notebook  from_a_cell\ndef from_a_cell():\n    return 1"


def test_in_a_notebook() -> None:
    """A kernel sends source and difference as HTML with text, and a chart as one picture."""
    cells = (
        "from stepmoe import charts, show\nimport stepmoe as sm\nshow.source(charts.layout)",
        "def mine(x):\n    return x\nshow.diff(mine, mine)",
        "charts.layout(sm.Step3p5Config.tiny(), sm.ParallelConfig(4, 2), 1)",
    )
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    # A kernel starts within seconds; a minute is for a loaded machine.
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    source, diff, chart = (cell.outputs for cell in notebook.cells)
    assert [set(output.data) for output in source] == [{"text/plain", "text/html"}]
    assert diff[0].data["text/plain"].startswith("--- this notebook  mine\n+++ this notebook  mine")
    assert [set(output.data) for output in chart] == [{"text/plain", "image/png"}]
