"""Show the package's own source in a notebook, and how one piece differs from another.

    show.source(DeferredLayer.forward)
    show.source("stepmoe.kernels.all_reduce_norm_gpu.meet")     # without importing it
    show.diff(ThreeAllReducesLayer.forward, DeferredLayer.forward)

What is shown depends on the source alone, so a notebook's outputs can be compared. Plain text comes
with the coloured HTML, for a terminal and for whoever reads without colour.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from dataclasses import dataclass
from difflib import unified_diff
from html import escape
from pathlib import Path
from typing import Any

from IPython.display import display
from pygments import formatters, highlight, lexers  # type: ignore[import-untyped]

from stepmoe.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
# Dark text on light ground of its own, so that it reads on a dark page as well.
_CAPTION = "font-family:monospace;font-size:90%;color:#555;background:#fff;padding:0 .5em"
_GROUND = (
    "color:#222;background:#f8f8f8;border:1px solid #ccc;padding:.5em;overflow-x:auto;"
    "font-family:monospace"
)

# The page around it may give a bare <pre> another font.
_PRE = "font-family:monospace;line-height:1.35;margin:0;background:transparent"


def source(obj: Any) -> None:
    """Display the source of a function, class or method, with its file.

    Given as text, "package.module.name", its module is read and not imported: a Triton kernel can
    be shown where Triton is not installed.

    Without line numbers, which an edit above it would change in every notebook's output.

    Raises:
        ConfigError: it has no Python source, or there is nothing of that name.
    """
    place, text = _read(obj)
    display(_Shown(place, text, lexers.PythonLexer()))


def diff(before: Any, after: Any) -> None:
    """Display how the source of `after` differs from that of `before`, whole, in unified form.

    A line that goes starts with "-", one that comes with "+", one that stays with a space.

    Raises:
        ConfigError: one of them has no Python source.
    """
    (place_before, text_before), (place_after, text_after) = _read(before), _read(after)
    lines_before, lines_after = text_before.splitlines(), text_after.splitlines()
    context = max(len(lines_before), len(lines_after))
    lines = list(unified_diff(lines_before, lines_after, n=context, lineterm=""))
    # The first three lines name the files and the lines of the only hunk, which is everything.
    text = "\n".join(lines[3:]) or "(the same source)"
    display(_Shown(f"--- {place_before}\n+++ {place_after}", text, lexers.DiffLexer()))


@dataclass
class _Shown:
    """What a notebook displays: a caption and a text, coloured where there is colour."""

    caption: str
    text: str
    lexer: Any

    def __repr__(self) -> str:
        return f"{self.caption}\n{self.text}"

    def _repr_html_(self) -> str:
        formatter = formatters.HtmlFormatter(
            noclasses=True, nobackground=True, cssstyles=_GROUND, prestyles=_PRE
        )
        code = highlight(self.text, self.lexer, formatter)
        caption = escape(self.caption).replace("\n", "<br>")
        return f'<div style="{_CAPTION}">{caption}</div>{code}'


def _read(obj: Any) -> tuple[str, str]:
    """Where an object is defined, and its source without the indentation it has there."""
    if isinstance(obj, str):
        return _read_named(obj)
    obj = inspect.unwrap(obj) if callable(obj) else obj
    try:
        lines = inspect.getsource(obj)
        file = inspect.getsourcefile(obj) or ""
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"{obj!r} has no Python source to show: give a function, class or method in Python"
        ) from error
    name = getattr(obj, "__qualname__", type(obj).__name__)
    return f"{_place(Path(file))}  {name}", textwrap.dedent(lines).rstrip()


def _read_named(name: str) -> tuple[str, str]:
    """The same for "package.module.function", from the module's file alone."""
    module, _, wanted = name.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None:
        text = Path(spec.origin).read_text()
        for node in ast.parse(text).body:
            if getattr(node, "name", None) == wanted:
                decorators = getattr(node, "decorator_list", [])
                first = min([node.lineno, *(each.lineno for each in decorators)])
                lines = text.splitlines()[first - 1 : node.end_lineno]
                return f"{_place(Path(spec.origin))}  {wanted}", "\n".join(lines)
    raise ConfigError(f"{name!r}: no such function or class; give package.module.name")


def _place(file: Path) -> str:
    """File, relative to the package; the same on every machine."""
    if file.resolve().is_relative_to(_PACKAGE):
        return file.resolve().relative_to(_PACKAGE.parent).as_posix()
    # A cell's code has the name of a temporary file, which exists only while someone debugs it.
    is_cell = file.parent.name.startswith("ipykernel_") or not file.is_file()
    return "this notebook" if is_cell else file.name
