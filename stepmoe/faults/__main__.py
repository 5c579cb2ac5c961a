"""python -m stepmoe.faults: the mini model's accuracy under every fault, into a file.

4 CPU ranks; on 2 cores about a minute for each of the 12 faults that come to an end.
"""

from __future__ import annotations

import argparse

from stepmoe import measure, mini
from stepmoe.faults.answers import accuracy_under
from stepmoe.faults.catalogue import FAULTS, TIMEOUT
from stepmoe.launch import Ranks


def main() -> None:
    """Ask, print a line a fault, write the file."""
    parser = argparse.ArgumentParser(prog="python -m stepmoe.faults", description=__doc__)
    parser.add_argument(
        "--questions", type=int, default=200, help="the first so many held-out ones"
    )
    parser.add_argument("--json", required=True, help="file to write")
    arguments = parser.parse_args()
    task = measure.word_problems(arguments.questions)
    ending = [name for name, fault in FAULTS.items() if TIMEOUT not in fault.caught_by]
    with Ranks(4, device="cpu") as ranks:
        frame = accuracy_under(
            ranks, str(mini.path()), task, [None, *ending], batch_size=len(task), timeout=None
        )
    frame.attrs["command"] = f"python -m stepmoe.faults --questions {arguments.questions}"
    print(frame[["fault", "right", "invalid", "questions", "ranks_agree"]].to_string(index=False))
    measure.save(frame, arguments.json)


if __name__ == "__main__":
    main()
