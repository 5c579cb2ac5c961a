"""Runs one process of a cluster, as a script: an ipyparallel engine or its controller.

The process ends, and the cluster's folder with it, when the notebook's kernel is gone, however
that ended. Run by path, so that the controller need not import torch.

    python -P watch.py PID CREATED FOLDER engine|controller [ipyparallel's arguments]
"""

import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

# A killed kernel leaves nothing within 5 s: looking this often (s) leaves time for the removal.
_PERIOD = 0.5


def main(argv: list[str]) -> None:
    """Watch the kernel with this process id and time of creation, and be its engine."""
    pid, created, folder, kind, *arguments = argv
    watch = threading.Thread(
        target=_end_with, args=(int(pid), float(created), folder), name="kernel watch", daemon=True
    )
    watch.start()
    if kind == "engine":
        # Both take seconds, and the controller starts in the meantime.
        import stepmoe.launch.worker  # noqa: F401

        arguments.append(f"--file={_connection_file(Path(folder))}")
    module = f"ipyparallel.{kind}"
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def is_running(pid: int, created: float) -> bool:
    """Whether the process lives; one that nobody has waited for (a zombie) does not."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_with(pid: int, created: float, folder: str) -> None:
    while is_running(pid, created):
        time.sleep(_PERIOD)
    # Its peers do the same at the same time: what one has removed the other need not find.
    shutil.rmtree(folder, ignore_errors=True)
    # The launcher made this process the leader of a session: its children go with it.
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _connection_file(folder: Path) -> Path:
    """Wait until the controller has written, wholly, where to find it."""
    while True:
        for path in (folder / "security").glob("*-engine.json"):
            try:
                json.loads(path.read_text())
            except ValueError:
                continue
            return path
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
