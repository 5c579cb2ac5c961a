"""Time the fused operation: `torchrun --nproc-per-node 2 -m stepmoe bench-fusion`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from stepmoe.errors import ConfigError
from stepmoe.launch import init_distributed

if TYPE_CHECKING:
    from stepmoe.measure.fused_ops import Timing

FORMAT = "stepmoe fused operation 1"
_DTYPES = ("bfloat16", "float16")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bench-fusion` command."""
    parser = subparsers.add_parser(
        "bench-fusion",
        help="measure all-reduce + add + norm, fused and not, on ranks with a GPU each",
        description="Measure all-reduce + add + norm in every implementation, under torchrun with "
        "one rank a GPU.",
    )
    add = parser.add_argument
    sizes = [1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    add("--tokens", nargs="+", type=int, default=sizes, metavar="N")
    add("--hidden", type=int, default=4096, metavar="D", help="hidden size (default: 4096)")
    add("--dtype", default=_DTYPES[0], choices=_DTYPES)
    add("--rounds", type=int, default=30, help="timed rounds (default: 30)")
    add("--json", type=Path, metavar="FILE", help="keep it, for notebook 04")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from stepmoe.measure.environment import describe, look_around
    from stepmoe.measure.fused_ops import TIMED_IN, time_fused_ops

    try:
        _check(args)
        device = init_distributed("cuda")
        dtype = getattr(torch, args.dtype)
        timings = time_fused_ops(args.tokens, args.hidden, dtype, args.rounds)
    except ConfigError as error:
        print(f"python -m stepmoe bench-fusion: {error}", file=sys.stderr)
        return 2
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, look_around(device))
    if dist.get_rank() == 0:
        print(table(timings))
        if args.json:
            content = {
                "format": FORMAT,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": _command(args, dist.get_world_size()),
                "hardware": describe(places),
                "versions": places[0].versions,
                "dtype": args.dtype,
                "hidden_size": args.hidden,
                "ranks": dist.get_world_size(),
                "timed_in": TIMED_IN,
                "rows": [_row(timing, args.hidden, dtype, len(places)) for timing in timings],
            }
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    dist.destroy_process_group()
    return 0


def table(timings: list[Timing]) -> str:
    """Median microseconds of a call: a line for each number of tokens."""
    names = list(dict.fromkeys(timing.implementation for timing in timings))
    lines = [" " * 8 + "".join(f"{name:>21}" for name in names) + "   (us a call, median)"]
    for tokens in dict.fromkeys(timing.tokens for timing in timings):
        cells = {t.implementation: t for t in timings if t.tokens == tokens}
        shown = (f"{t.median:21.1f}" if t.microseconds else f"{'-':>21}" for t in cells.values())
        lines.append(f"{tokens:8}" + "".join(shown))
    refusals = dict.fromkeys(t.refusal for t in timings if t.refusal)
    return "\n".join([*lines, *refusals])


def _check(args: argparse.Namespace) -> None:
    if min(args.tokens) < 1 or args.rounds < 6 or args.hidden < 1:
        raise ConfigError(
            f"--tokens {args.tokens}, --hidden {args.hidden}, --rounds {args.rounds}: "
            "give positive numbers, and at least 6 rounds"
        )
    if args.json and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        raise ConfigError(f"{args.json}: cannot write into {args.json.parent}; give another folder")


def _command(args: argparse.Namespace, ranks: int) -> str:
    words = f"torchrun --nproc-per-node {ranks} -m stepmoe bench-fusion --tokens"
    tokens = " ".join(map(str, args.tokens))
    return f"{words} {tokens} --hidden {args.hidden} --dtype {args.dtype} --rounds {args.rounds}"


def _row(timing: Timing, hidden_size: int, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    from stepmoe.measure.fused_ops import wire_floor

    times = sorted(timing.microseconds)
    row: dict[str, Any] = {
        "tokens": timing.tokens,
        "implementation": timing.implementation,
        "wire_floor_us": round(wire_floor(timing.tokens, hidden_size, dtype, ranks), 3),
    }
    if not times:
        return row | {"refusal": timing.refusal}
    tenth = len(times) // 10
    return row | {
        "median_us": round(timing.median, 3),
        "p10_us": round(times[tenth], 3),
        "p90_us": round(times[-1 - tenth], 3),
        "error": timing.error,
    }
