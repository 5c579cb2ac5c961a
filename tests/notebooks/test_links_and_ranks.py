"""What a reader meets on the way: links that lead somewhere, and ranks that exercises can use."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from test_committed_notebooks import FOLDER, NOTEBOOKS

LESSONS = [path for path in NOTEBOOKS if path.parent == FOLDER]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def code(path: Path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_links_lead_to_files(path: Path) -> None:
    text = "\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )
    inside = [target for target in LINK.findall(text) if "://" not in target and target[0] != "#"]
    missing = [to for to in inside if not (path.parent / to.partition("#")[0]).is_file()]
    assert inside, "no link to the next notebook, or back to the lesson"
    assert missing == []


def closed_ranks_given(sources: list[str]) -> list[str]:
    """Names of ranks that cells give to an exercise when they are not open, cell after cell."""
    is_open: dict[str, bool] = {}
    found = []
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("sm.Ranks("):
                is_open[ast.unparse(node.targets[0])] = True
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "close":
                    is_open[ast.unparse(node.func.value)] = False
                elif node.func.attr == "try_out":
                    given = [ast.unparse(each) for each in node.args[1:]]
                    found += [name for name in given if not is_open.get(name)]
    return found


@pytest.mark.parametrize("path", LESSONS, ids=named)
def test_exercises_get_ranks_that_are_open(path: Path) -> None:
    assert closed_ranks_given(code(path)) == []


def test_closed_ranks_are_found() -> None:
    cells = ["ranks = sm.Ranks(4)", "e.f.try_out(f, ranks)", "ranks.close()"]
    assert closed_ranks_given(cells) == []
    assert closed_ranks_given([*cells, "e.g.try_out(g, ranks)"]) == ["ranks"]
