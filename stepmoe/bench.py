"""Measure the variants without a notebook: `python -m stepmoe bench`, alone or under torchrun."""

from __future__ import annotations

import argparse
import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepmoe import command
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.measure import compare_latency, save, table
from stepmoe.measure.plan import PHASES, Plan
from stepmoe.parallel import tensor_layouts

if TYPE_CHECKING:
    import pandas as pd

_SHAPES = {"tiny": Step3p5Config.tiny, "flash": Step3p5Config.flash}
_RANKS = 4  # as many as the notebooks use


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bench` command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure how long a step of each variant takes here",
        description="Measure how long a step of each variant takes here, and where the time goes. "
        "Alone it starts its own ranks; under torchrun it uses torchrun's.",
    )
    add = parser.add_argument
    add("--shape", default="tiny", help="tiny, flash, or a folder with a config.json")
    command.add_arguments(parser, _RANKS, "the shape's own")
    only = "run this rank's share alone in one process, nothing sent: one rank's compute of --tp"
    add("--simulate-rank", type=int, metavar="R", help=only)
    some = "only these decoder layers of the shape (default: all)"
    add("--layers", nargs="+", type=int, metavar="N", help=some)
    add("--tokens", nargs="+", type=int, default=[1, 64, 1024], metavar="N")
    add("--phase", nargs="+", default=list(PHASES), choices=PHASES)
    add("--repeats", type=int, default=20, help="rounds, at least 6 (default: 20)")
    add("--warmup", type=int, default=3, help="rounds before them (default: 3)")
    add("--seed", type=int, default=0)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    checked, give = partial(_checked, args), partial(_give, args)
    return command.carry_out("bench", args, checked, compare_latency, give)


def _checked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of compare_latency; ConfigError for what is wrong before any rank starts."""
    config = _SHAPES[args.shape]() if args.shape in _SHAPES else _from_folder(args.shape)
    if args.layers is not None:
        config = config.with_layers(*args.layers)
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
    _check_memory(Plan.of(**arguments), args.device)
    return {**arguments, "timeout": args.timeout}


def _from_folder(shape: str) -> Step3p5Config:
    if not Path(shape).exists():
        raise ConfigError(f"--shape {shape}: give tiny, flash, or a folder with a config.json")
    return Step3p5Config.from_pretrained(shape)


def _check_memory(plan: Plan, device: str) -> None:
    """Raise ConfigError where the weights alone do not fit: the system would kill the ranks."""
    layouts = tensor_layouts(plan.config, plan.parallel, 0).values()
    weights = sum(math.prod(layout.local_shape) for layout in layouts) * plan.dtype.itemsize
    here = int(os.environ.get("LOCAL_WORLD_SIZE", plan.parallel.processes))
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        there = torch.cuda.get_device_properties(0).total_memory
        needed, what = weights * -(-here // gpus), "a GPU"
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed, what = weights * here, "this machine"
    if needed > there:
        raise ConfigError(
            f"the weights of --shape take {needed / 2**30:,.0f} GiB with tp={plan.parallel.tp} and "
            f"{plan.dtype}; {what} has {there / 2**30:,.0f}. Choose another shape, tp or dtype"
        )


def _give(args: argparse.Namespace, arguments: dict[str, Any], frame: pd.DataFrame) -> None:
    """Print it, and write the file asked for."""
    options = {
        "shape": [args.shape],
        **command.layout_options(args, arguments),
        "tokens": arguments["tokens"],
        "phase": arguments["phases"],
        "repeats": [args.repeats],
        "warmup": [args.warmup],
        "seed": [args.seed],
    }
    if args.simulate_rank is not None:
        options["simulate-rank"] = [args.simulate_rank]
    if args.layers is not None:
        options["layers"] = args.layers
    frame.attrs["command"] = command.command_line("bench", options)
    print(table(frame))
    if args.json:
        save(frame, args.json)
