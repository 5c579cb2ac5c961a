"""Runs every notebook and writes the walkthrough: each as HTML, and an index page.

Works on copies. Authors pass --in-place to store the outputs in the notebooks themselves.
"""

import argparse
import html
import itertools
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

REPO = Path(__file__).resolve().parent.parent
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

# What differs from one author's machine to the next is not stored in a notebook.
STABLE_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>stepmoe: the walkthrough</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
        color: #1a1a1a; background: #fff; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .5rem .75rem;
          border-bottom: 1px solid #ccc; }}
.seconds {{ text-align: right; white-space: nowrap; }}
.failed {{ color: #a40000; font-weight: bold; }}
</style>
</head>
<body>
<h1>The walkthrough</h1>
<p>{verdict}</p>
<table>
<tr><th>Notebook</th><th>What it is about</th><th class="seconds">Time</th><th>Result</th></tr>
{rows}
</table>
</body>
</html>
"""

ROW = (
    '<tr><td><a href="{link}">{title}</a></td><td>{summary}</td>'
    '<td class="seconds">{seconds:.1f} s</td><td{style}>{result}</td></tr>'
)


@dataclass(frozen=True)
class Run:
    """One executed notebook; `failure` names the cell and the error, and is empty when it ran."""

    name: str
    notebook: NotebookNode
    seconds: float
    failure: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebooks and write the pages.

    Returns:
        The exit status: 0 when every notebook ran to its end.
    """
    args = _parse(argv)
    source = args.source.resolve()
    paths = [p.resolve() for p in args.notebooks] or find_notebooks(source)
    for path in paths:
        if not path.is_file() or not path.is_relative_to(source):
            print(f"{path.name} is not a notebook under {source}", file=sys.stderr)
            return 2
    if not paths:
        print(f"There is no notebook (*.ipynb) in {source}", file=sys.stderr)
        return 2
    runs = []
    for path in paths:
        name = path.relative_to(source).with_suffix("").as_posix()
        print(f"{name:<32}", end=" ", flush=True)
        run = execute(path, name, cell_timeout=args.cell_timeout)
        print(f"{run.seconds:6.1f} s  {'FAILED' if run.failure else 'ok'}", flush=True)
        if run.failure:
            print(f"    {run.failure}", flush=True)
        write_html(run, args.output, source=source, runs=[p.stem for p in paths])
        if args.in_place and not run.failure:
            store(run, path)
        runs.append(run)
    index = args.output / "index.html"
    index.write_text(index_page(runs), encoding="utf-8")
    print(f"\nOpen {index.resolve()}")
    return 1 if any(run.failure for run in runs) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("notebooks", nargs="*", type=Path, help="notebooks to run (default: all)")
    add("--source", type=Path, default=REPO / "notebooks", help="the folder the notebooks are in")
    add("--output", type=Path, default=REPO / "build" / "walkthrough", help="where the pages go")
    add("--cell-timeout", type=int, default=120, metavar="SECONDS", help="limit for one cell")
    add("--in-place", action="store_true", help="store the outputs in the notebooks that ran")
    return parser.parse_args(argv)


def find_notebooks(source: Path) -> list[Path]:
    """The notebooks of a folder in reading order, then the solutions."""
    return sorted(source.glob("*.ipynb")) + sorted((source / "solutions").glob("*.ipynb"))


def execute(path: Path, name: str, *, cell_timeout: int) -> Run:
    """Run a copy of a notebook up to its end or its first failing cell.

    Args:
        name: what to call it, such as "solutions/01_one_layer".
        cell_timeout: seconds one cell may take.
    """
    notebook = nbformat.read(path, as_version=4)
    reached = {"cell": 0}

    def on_cell_start(cell: NotebookNode, cell_index: int) -> None:
        reached["cell"] = cell_index

    client = NotebookClient(
        notebook,
        timeout=cell_timeout,
        kernel_name="python3",
        # Without this every kernel warns between the progress lines that it listens on TCP.
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        # A page shows a widget as a still picture; with its state it would ask a server for code.
        store_widget_state=False,
        on_cell_start=on_cell_start,
    )
    failure = ""
    started = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        failure = f"{error.ename}: {error.evalue}"
    except CellTimeoutError:
        failure = f"ran longer than {cell_timeout} s"
    except DeadKernelError:
        failure = "its kernel died"
    seconds = time.perf_counter() - started
    if failure:
        cell = reached["cell"]
        source = notebook.cells[cell].source.strip().splitlines()
        first_line = source[0] if source else ""
        failure = f"cell {cell + 1} ({first_line}): {failure}"
    return Run(name, notebook, seconds, failure)


def write_html(run: Run, output: Path, *, source: Path, runs: Sequence[str]) -> Path:
    """Write one executed notebook as a page with its images in it.

    Args:
        source: the folder the notebooks are in: links to other files lead back to it.
        runs: names of the notebooks that become pages, so that links between them lead there.
    """
    exporter = HTMLExporter(embed_images=True)
    resources: dict[str, Any] = {"metadata": {"name": title_and_summary(run)[0]}}
    body, _ = exporter.from_notebook_node(run.notebook, resources=resources)
    pages = "|".join(re.escape(name) for name in runs)
    body = re.sub(rf'(href="[^":]*\b(?:{pages}))\.ipynb(["#])', r"\1.html\2", body)
    page = output / f"{run.name}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    folder = (source / run.name).parent

    def in_source(link: re.Match[str]) -> str:
        file = folder / link[1]
        return f'href="{quote(os.path.relpath(file, page.parent))}"' if file.is_file() else link[0]

    body = re.sub(r'href="([^":#]+)"', in_source, body)
    page.write_text(body, encoding="utf-8")
    return page


def store(run: Run, path: Path) -> None:
    """Write an executed notebook back, without what changes from run to run or with the machine."""
    notebook = run.notebook
    notebook.metadata = nbformat.from_dict(STABLE_METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)  # a random id of a widget that is gone
            if "traceback" in output:
                output.traceback = [line.replace(f"{REPO}/", "") for line in output.traceback]
        if cell.cell_type == "code":  # a progress bar leaves nothing but its view
            cell.outputs = [output for output in cell.outputs if output.get("data") != {}]
    nbformat.write(notebook, path)


def title_and_summary(run: Run) -> tuple[str, str]:
    """A notebook's first heading and the first sentence of text, without Markdown's marks."""
    lines = [
        line.strip()
        for cell in run.notebook.cells
        if cell.cell_type == "markdown"
        for line in [*cell.source.splitlines(), ""]
    ]
    title = next((line.lstrip("# ") for line in lines if line.startswith("#")), run.name)
    is_text = [bool(line) and line[0] not in "#<>!|-" for line in lines]
    first = is_text.index(True) if True in is_text else len(lines)
    paragraph = itertools.takewhile(bool, lines[first:])
    sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraph))[0]
    return _plain(title), _plain(sentence)


def _plain(markdown: str) -> str:
    without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return without_links.replace("**", "").replace("`", "")


def index_page(runs: Sequence[Run]) -> str:
    """The page that leads to the others."""
    failed = sum(bool(run.failure) for run in runs)
    rows = []
    for run in runs:
        title, summary = title_and_summary(run)
        rows.append(
            ROW.format(
                link=html.escape(f"{run.name}.html"),
                title=html.escape(title),
                summary=html.escape(summary),
                seconds=run.seconds,
                style=' class="failed"' if run.failure else "",
                result=html.escape(f"failed: {run.failure}" if run.failure else "ok"),
            )
        )
    verdict = f"{failed} of {len(runs)} notebooks failed." if failed else "Every notebook ran."
    return PAGE.format(verdict=verdict, rows="\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
