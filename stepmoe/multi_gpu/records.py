"""A folder of results: one JSON file a step, written when the step is over."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepmoe.errors import ConfigError
from stepmoe.multi_gpu.plan import Setting, Step

#: What a step's file calls itself where the step wrote none of its own.
FORMAT = "stepmoe multi-gpu step 1"
DONE, FAILED, TIMEOUT = "done", "failed", "over its limit"
_KEYS = {"status", "seconds", "date", "setting", "rehearsal", "machine"}


@dataclass(frozen=True)
class Record:
    """What a folder holds of one step.

    Attributes:
        run: how the step went: step, status, seconds, date, command, setting, machine, and of one
            that was not done its last lines of output and its limit.
        content: all of the file: what the step's command wrote, and `run`.
    """

    run: dict[str, Any]
    content: dict[str, Any]

    @property
    def done(self) -> bool:
        return bool(self.run["status"] == DONE)


def file_of(folder: Path, step: str) -> Path:
    """Where a step's result is kept."""
    return folder / f"{step}.json"


def unfinished_file_of(folder: Path, step: str) -> Path:
    """Where a step's command writes; what an interrupted run leaves there is not a result."""
    return folder / f"{step}.unfinished"


def read(folder: Path, step: str) -> Record | None:
    """What there is of a step; None if it was not run.

    Raises:
        ConfigError: a file that is no whole result of this step.
    """
    file = file_of(folder, step)
    try:
        content = json.loads(file.read_text())
        run = content["run"]
        if run["step"] != step:
            raise ValueError("it belongs to another step")
        if lacking := _KEYS - run.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is not a whole result ({type(error).__name__}: {error}): delete it, or give "
            "another --folder"
        ) from error
    return Record(run, content)


def read_all(
    folder: Path, steps: Sequence[Step], setting: Setting, anew: Sequence[str] = ()
) -> dict[str, Record]:
    """What there is of these steps.

    Args:
        anew: steps that will be run again, whatever there is of them.

    Raises:
        ConfigError: a file that is no whole result, or one of another setting.
    """
    found = {}
    for step in steps:
        if step.name in anew or (record := read(folder, step.name)) is None:
            continue
        if record.run["setting"] != setting.identity():
            raise ConfigError(
                f"{file_of(folder, step.name)} is of {_words(record.run['setting'])}, and this run "
                f"of {_words(setting.identity())}: give another --folder"
            )
        found[step.name] = record
    return found


def check_folder(folder: Path) -> None:
    """Make the folder; ConfigError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--folder {folder}: cannot be made ({error.strerror}); give another"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--folder {folder}: cannot be written to; give another")


def write(folder: Path, run: dict[str, Any], if_not_done: Mapping[str, Any]) -> Record:
    """Keep a step: `run`, and what its command wrote; in one go, so that no half file is left.

    Args:
        if_not_done: what is kept, too, of a step that was not: its output, its limit.
    """
    unfinished, file = unfinished_file_of(folder, run["step"]), file_of(folder, run["step"])
    content: dict[str, Any] = {"format": FORMAT}
    try:
        content |= json.loads(unfinished.read_text())
    except (FileNotFoundError, ValueError):  # it wrote nothing, or ended while it wrote
        if run["status"] == DONE:
            run = {**run, "status": FAILED}
            output = f"{if_not_done['output']}\nit wrote no whole result"
            if_not_done = {**if_not_done, "output": output.lstrip()}
    if run["status"] != DONE:
        run = {**run, **if_not_done}
    run = {**run, **{name: neutral(run[name]) for name in ("machine", "output") if name in run}}
    content["run"] = run
    whole = file.with_suffix(".whole")
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(file)
    unfinished.unlink(missing_ok=True)
    return Record(run, content)


def neutral(value: Any) -> Any:
    """The same without names of this machine's folders, user and host."""
    if isinstance(value, Mapping):
        return {key: neutral(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [neutral(item) for item in value]
    if not isinstance(value, str):
        return value
    value = value.replace(f"{Path.cwd()}{os.sep}", "")
    value = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "HOST", value)
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/(?=[\w.+-])", ".../", value)


def _words(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value)
