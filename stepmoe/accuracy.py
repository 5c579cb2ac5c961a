"""Ask the mini model its questions without a notebook: `python -m stepmoe accuracy`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from stepmoe import command, mini
from stepmoe.checks import check_dtype
from stepmoe.command_checks import check_weights
from stepmoe.hub import locate
from stepmoe.measure import compare_accuracy, save, word_problems
from stepmoe.measure.accuracy import check_setting
from stepmoe.measure.answering import BATCH_SIZE
from stepmoe.measure.report import accuracy_table
from stepmoe.measure.source import config_of
from stepmoe.mini.task import HELDOUT_QUESTIONS

if TYPE_CHECKING:
    import pandas as pd

_RANKS = 2  # which all questions take a minute for, on a laptop


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `accuracy` command."""
    parser = subparsers.add_parser(
        "accuracy",
        help="measure how many questions each variant answers rightly here",
        description="Ask each variant of stepmoe's mini model the held-out word problems. "
        "Alone it starts its own ranks; under torchrun it uses torchrun's.",
    )
    add = parser.add_argument
    many = f"ask only the first N (default: all {HELDOUT_QUESTIONS})"
    add("--questions", type=int, metavar="N", help=many)
    together = f"questions answered together (default: {BATCH_SIZE})"
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=together)
    other = "a checkpoint's folder or name on the hub (default: the mini model in this package)"
    add("--model", help=other)
    command.add_arguments(parser, _RANKS, "the checkpoint's")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    checked, give = partial(_checked, args), partial(_give, args)
    return command.carry_out(args, checked, compare_accuracy, give)


def _checked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of compare_accuracy; ConfigError for what is wrong before any rank starts."""
    source = locate(args.model) if args.model is not None else mini.path()
    arguments = {
        "variants": command.variants_of(args),
        "task": word_problems(args.questions),
        "source": source,
        "parallel": command.layout_of(args, _RANKS),
        "dtype": check_dtype(args.dtype or config_of(source).torch_dtype),
        "batch_size": args.batch_size,
    }
    check_setting(**arguments)
    check_weights(source)
    return {**arguments, "timeout": args.timeout}


def _give(args: argparse.Namespace, arguments: dict[str, Any], frame: pd.DataFrame) -> None:
    """Print it, and write the file asked for."""
    options: dict[str, list[Any]] = {
        **command.layout_options(args, arguments),
        "questions": [len(arguments["task"])],
        "batch-size": [args.batch_size],
    }
    if args.model is not None:
        options["model"] = [command.shown_folder(args.model)]
    frame.attrs["command"] = command.command_line("accuracy", options)
    print(accuracy_table(frame))
    if args.json:
        save(frame, args.json)
