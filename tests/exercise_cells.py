"""The exercises of all notebooks, and what their cells define: the stubs and the solutions."""

import ast
import importlib
import linecache
import pkgutil
from pathlib import Path
from typing import Any

import nbformat

import stepmoe.exercises
from stepmoe.exercises import Exercise

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def all_exercises() -> list[Exercise]:
    """Every exercise of the package."""
    found = []
    for module in pkgutil.iter_modules(stepmoe.exercises.__path__, "stepmoe.exercises."):
        values = vars(importlib.import_module(module.name)).values()
        found += [value for value in values if isinstance(value, Exercise)]
    return found


def cells(path: str) -> list[nbformat.NotebookNode]:
    return list(nbformat.read(NOTEBOOKS / f"{path}.ipynb", as_version=4).cells)


def defined(path: str, name: str) -> Any:
    """The function or class `name` of a notebook, made from its cell and the notebook's imports.

    As a cell would make it: its module is __main__, so that it travels to ranks by value, and its
    source can be read.
    """
    sources = [cell.source for cell in cells(path) if cell.cell_type == "code"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    made = None
    for number, source in enumerate(sources):
        for node in ast.parse(source).body:
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            if not is_import and getattr(node, "name", None) != name:
                continue
            file = f"<{path}, cell {number}>"
            linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
            exec(compile(ast.Module([node], []), file, "exec"), namespace)
            made = namespace.get(name, made)
    assert made is not None, f"{path} does not define {name}"
    return made
