"""The command line: `python -m stepmoe doctor`, and whatever is added to COMMANDS."""

import argparse
import sys
import time
from collections.abc import Sequence

import stepmoe
from stepmoe import accuracy, bench, bench_fusion, doctor, layer_floor, prefill
from stepmoe.command import FailedError
from stepmoe.errors import CheckpointError, ConfigError, RankError, RankTimeout
from stepmoe.launch.rank import torchrun_rank
from stepmoe.multi_gpu import command as multi_gpu
from stepmoe.multi_gpu import recovery

# Each module has `register(subparsers)`, which adds its parser and sets `run` on it: a function
# from the parsed arguments to the exit status, or to an error that is said here.
COMMANDS = (
    doctor,
    bench,
    bench_fusion,
    prefill,
    layer_floor,
    accuracy,
    recovery,
    multi_gpu,
)
_REFUSED, _FAILED, _INTERRUPTED = 2, 1, 130  # exit statuses; the last is a shell's
_PATIENCE = 10  # seconds; torchrun ends the other ranks in less when one has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `python -m stepmoe`; by default those of this process.

    Returns:
        The exit status: 0 when the command did what was asked.
    """
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (ConfigError, CheckpointError) as error:
        return _ended(args.command, error, _REFUSED)
    except (RankError, RankTimeout, FailedError) as error:
        return _ended(args.command, error, _FAILED)
    return status


def _ended(name: str, error: Exception, status: int) -> int:
    """Say why a command ended; returns the exit status.

    What is refused is refused by all of torchrun's ranks: the first says it at once, and torchrun
    then ends the others, which wait for that, or they would have it ended first. One that is not
    ended was alone with its error. Of what fails later each rank says its own: one may be the
    cause of another's.
    """
    rank = torchrun_rank() or 0
    if rank and status == _REFUSED:
        time.sleep(_PATIENCE)
    where = f"rank {rank}: " if rank else ""
    print(f"python -m stepmoe {name}: {where}{error}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    """Knows every command; what it parses has the command's `run`."""
    made = argparse.ArgumentParser(
        prog="python -m stepmoe",
        description="Look at this machine, and measure and test the variants without a notebook. "
        "Each command explains itself: python -m stepmoe bench --help.",
    )
    made.add_argument("--version", action="version", version=f"stepmoe {stepmoe.__version__}")
    subparsers = made.add_subparsers(required=True, metavar="command", dest="command")
    for command in COMMANDS:
        command.register(subparsers)
    return made


if __name__ == "__main__":
    sys.exit(main())
