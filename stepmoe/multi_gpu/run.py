"""Carries out a plan: what is left of it, one step after the other, within a budget of time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stepmoe.multi_gpu.plan import Setting, Step
from stepmoe.multi_gpu.records import DONE, FAILED, TIMEOUT, Record, unfinished_file_of, write

_PATIENCE = 10  # seconds that a step has to end after it was told to
_LINES = 60  # of output that the file of a failed step keeps


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, None where it was ended at its limit; what it wrote."""

    status: int | None
    output: str


#: Runs words with a limit in seconds.
Execute = Callable[[Sequence[str], float], Outcome]


@dataclass(frozen=True)
class Finished:
    """What came of a run: the steps that were run, and the names of those the budget left out."""

    records: list[Record]
    left: list[str]


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    setting: Setting,
    machine: Mapping[str, Any],
    minutes: float | None = None,
    execute: Execute | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Finished:
    """Run the steps, each in a process of its own, and keep each one's result when it is over.

    Args:
        machine: goes into every file.
        minutes: the budget. A step whose estimate would exceed it is not started, a shorter one
            behind it may be; and a step that overruns is ended with it.
        execute: runs the words of a command with a limit in seconds.
    """
    begun, records, left = clock(), [], []
    for number, step in enumerate(steps, 1):
        remaining = float("inf") if minutes is None else 60 * minutes - (clock() - begun)
        if step.estimate > remaining:
            left.append(step.name)
            continue
        print(f"[{number}/{len(steps)}] {step.name}: {step.what} ...", flush=True)
        limit = min(step.limit, remaining)
        record = _run_step(step, folder, setting, machine, limit, execute or run_command, clock)
        records.append(record)
        print(f"        {record.run['status']} after {record.run['seconds']:.0f} s", flush=True)
        if not record.done:
            last = record.run["output"].splitlines()[-8:]
            print("\n".join(f"        | {line}" for line in last), flush=True)
    return Finished(records, left)


def _run_step(
    step: Step,
    folder: Path,
    setting: Setting,
    machine: Mapping[str, Any],
    limit: float,
    execute: Execute,
    clock: Callable[[], float],
) -> Record:
    result = unfinished_file_of(folder, step.name)
    result.unlink(missing_ok=True)
    begun = clock()
    outcome = execute(step.words(str(result)), limit)
    status = TIMEOUT if outcome.status is None else FAILED if outcome.status else DONE
    run = {
        "step": step.name,
        "what": step.what,
        "status": status,
        "seconds": round(clock() - begun, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": step.typed,
        "setting": setting.identity(),
        "rehearsal": setting.rehearsal,
        "machine": dict(machine),
    }
    # `write` keeps the rest where the step was not done, or says that and wrote no whole result.
    return write(
        folder,
        run,
        {"output": "\n".join(outcome.output.splitlines()[-_LINES:]), "limit": round(limit)},
    )


def run_command(words: Sequence[str], limit: float) -> Outcome:
    """A command of the plan with this interpreter; at its limit it ends with all its children."""
    programs = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*programs[words[0]], *words[1:]],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a signal reaches what it started
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        output.seek(0)
        return Outcome(status, output.read())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and what it left behind, first by asking."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and _is_there(process):
            time.sleep(0.1)


def _is_there(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of its group is: when it has ended, its children may still be at it."""
    process.poll()  # an ended process is there until someone has asked
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
