"""The command line: `python -m stepmoe doctor`, and whatever is added to COMMANDS."""

import argparse
import sys
from collections.abc import Sequence

import stepmoe
from stepmoe import accuracy, bench, bench_fusion, doctor, layer_floor, prefill
from stepmoe.multi_gpu import command as multi_gpu
from stepmoe.multi_gpu import recovery

# Each module has `register(subparsers)`, which adds its parser and sets `run` on it: a function
# from the parsed arguments to the exit status.
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
        return 130  # a shell's word for it
    return status


def parser() -> argparse.ArgumentParser:
    """Knows every command; what it parses has the command's `run`."""
    made = argparse.ArgumentParser(prog="python -m stepmoe")
    made.add_argument("--version", action="version", version=f"stepmoe {stepmoe.__version__}")
    subparsers = made.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.register(subparsers)
    return made


if __name__ == "__main__":
    sys.exit(main())
