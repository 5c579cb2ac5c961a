"""Where a rank is: the collective its main thread waits in, or the line it executes."""

import linecache
import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType

# Files whose functions are collectives; gloo and NCCL wait without the interpreter's lock, so
# another thread can look.
_COLLECTIVES = ("distributed/distributed_c10d.py", "distributed/_functional_collectives.py")
# Code that a reader of the message did not write: the standard library, installed packages, and
# what calls a rank's function.
_NOT_THEIRS = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib")),
    str(Path(__file__).parent),
)

_WORKER = str(Path(__file__).with_name("worker.py"))

NOT_IN_ONE = "not in one"
A_CELL = "a cell"


def where_is_main_thread() -> str:
    """What the main thread of this process waits in.

    Returns:
        The collective ("all_reduce", or richer where the ledger knows its site), or a text that
        starts with "not in one" and names the line being executed.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    # Not imported here: a rank that never used stepmoe's communicator has no ledger to ask.
    ledger = sys.modules.get("stepmoe.comm.ledger")
    in_flight: str | None = ledger.in_flight() if ledger else None
    return in_flight or describe(frame)


def describe(frame: FrameType | None) -> str:
    """`where_is_main_thread` for a given innermost frame."""
    collective, user_frame = None, None
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _WORKER:  # further out is what called the function
            break
        if name.endswith(_COLLECTIVES):
            collective = frame.f_code.co_name  # the outermost: what the user called
        elif user_frame is None and not name.startswith(_NOT_THEIRS):
            user_frame = frame
        frame = frame.f_back
    if collective:
        return collective
    return f"{NOT_IN_ONE} ({_line(user_frame)})" if user_frame else NOT_IN_ONE


def is_cell(path: str) -> bool:
    """Whether a notebook's kernel made up this path for the code of a cell."""
    return Path(path).parent.name.startswith("ipykernel_")


def _line(frame: FrameType) -> str:
    code, number = frame.f_code, frame.f_lineno
    source = linecache.getline(code.co_filename, number).strip()
    file = A_CELL if is_cell(code.co_filename) else Path(code.co_filename).name
    return f"{code.co_name}, line {number} of {file}" + (f": {source}" if source else "")
