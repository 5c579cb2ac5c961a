"""Measure the variants without a notebook: `python -m stepmoe bench`, alone or under torchrun."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from stepmoe import command
from stepmoe.command_checks import check_memory
from stepmoe.measure import compare_latency, save, table
from stepmoe.measure.plan import FEWEST_ROUNDS, PHASES, Plan
from stepmoe.measure.source import config_of

if TYPE_CHECKING:
    import pandas as pd

_RANKS = 4  # as many as the notebooks use


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bench` command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure how long a step of each variant takes here",
        description="Measure how long a step of each variant takes here, and where the time goes. "
        "Alone it starts its own ranks; under torchrun it uses torchrun's.",
    )
    command.add_shape(parser)
    command.add_arguments(parser, _RANKS, "the shape's own")
    add = parser.add_argument
    tokens = [1, 64, 1024]
    words = (
        "new tokens of a step: of one sequence in a prefill, one of each sequence in a decode step "
        f"(default: {' '.join(map(str, tokens))})"
    )
    add("--tokens", nargs="+", type=int, default=tokens, metavar="N", help=words)
    add(
        "--phase",
        nargs="+",
        default=list(PHASES),
        choices=PHASES,
        help="which steps (default: both)",
    )
    rounds = f"timed rounds, at least {FEWEST_ROUNDS}; a round runs each variant once (default: 20)"
    add("--repeats", type=int, default=20, metavar="N", help=rounds)
    add("--warmup", type=int, default=3, metavar="N", help="rounds before them (default: 3)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and tokens (default: 0)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    checked, give = partial(_checked, args), partial(_give, args)
    return command.carry_out(args, checked, compare_latency, give)


def _checked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of compare_latency; ConfigError for what is wrong before any rank starts."""
    config = config_of(command.shape_of(args), command.layers_of(args))
    arguments = {
        "config": config,
        "variants": command.variants_of(args),
        "tokens": args.tokens,
        "parallel": command.layout_of(args, _RANKS, args.simulate_rank),
        "phases": args.phase,
        "repeats": args.repeats,
        "warmup": args.warmup,
        "dtype": getattr(torch, args.dtype or config.torch_dtype),
        "seed": args.seed,
    }
    plan = Plan.of(**arguments)
    check_memory(config, plan.parallel, plan.dtype, args.device)
    return {**arguments, "timeout": args.timeout}


def _give(args: argparse.Namespace, arguments: dict[str, Any], frame: pd.DataFrame) -> None:
    """Print it, and write the file asked for."""
    options = {
        **command.shape_options(args),
        **command.layout_options(args, arguments),
        "tokens": arguments["tokens"],
        "phase": arguments["phases"],
        "repeats": [args.repeats],
        "warmup": [args.warmup],
        "seed": [args.seed],
    }
    frame.attrs["command"] = command.command_line("bench", options)
    print(table(frame))
    if args.json:
        save(frame, args.json)
