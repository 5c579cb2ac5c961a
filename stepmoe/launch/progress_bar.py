"""A progress bar for long work in ranks: rank 0's, shown where the person is."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")

#: (done, total or None, description, seconds since the start)
Report = tuple[int, int | None, str, float]

# Shorter work shows no bar (s): it would be gone before it is read, and a notebook's stored
# outputs stay the same.
DELAY = 2.0
_PERIOD = 0.25

#: Where reports go; set in a rank of `Ranks`, None elsewhere (under torchrun, say).
sink: Callable[[Report], None] | None = None


def progress(iterable: Iterable[Item], total: int | None = None, desc: str = "") -> Iterator[Item]:
    """Iterate over `iterable` and show how far rank 0 is, once the work lasts 2 s.

    Under `Ranks` the bar appears in the notebook, under torchrun and alone on rank 0's stderr.
    It disappears with the work. Other ranks just iterate.

    Args:
        iterable: the work, an item a step.
        total: the number of items; by default the iterable's length, where it has one.
        desc: shown before the bar.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if os.environ.get("RANK", "0") != "0":
        return iter(iterable)
    if sink is None:
        return _on_stderr(iterable, total, desc)
    return _report(iterable, total, desc, sink)


def _on_stderr(iterable: Iterable[Item], total: int | None, desc: str) -> Iterator[Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: pip install 'stepmoe[notebooks]'", file=sys.stderr)
        return iter(iterable)
    bar: Iterable[Item] = tqdm(iterable, total=total, desc=desc or None, leave=False, delay=DELAY)
    return iter(bar)


def _report(
    iterable: Iterable[Item], total: int | None, desc: str, to: Callable[[Report], None]
) -> Iterator[Item]:
    started = last = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= _PERIOD:
            to((done, total, desc, now - started))
            last = now


class Bar:
    """The notebook's end: shows the latest report, leaves no trace."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._text = ""

    def show(self, report: Report) -> None:
        """Draw, or redraw what has changed: a report stays the latest until the next one."""
        from tqdm import tqdm

        done, total, desc, seconds = report
        text = tqdm.format_meter(done, total, seconds, prefix=desc, ncols=80)
        if text == self._text:
            return
        self._text = text
        if _in_kernel():
            self._display({"text/plain": text})
        else:
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove it."""
        if self._handle is not None:
            self._handle.update({}, raw=True)
        elif self._text:
            print("\r" + " " * len(self._text) + "\r", end="", file=sys.stderr, flush=True)

    def _display(self, data: dict[str, str]) -> None:
        from IPython.display import display

        if self._handle is None:
            # Empty first and last: an output without data is the same with and without a bar.
            self._handle = display({}, raw=True, display_id=True)
        self._handle.update(data, raw=True)


def _in_kernel() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None
