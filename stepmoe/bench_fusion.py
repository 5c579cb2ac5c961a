"""Time the fused operation: `torchrun --nproc-per-node 2 -m stepmoe bench-fusion`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepmoe import command
from stepmoe.checks import whole_number
from stepmoe.command_checks import check_writable
from stepmoe.launch import init_distributed
from stepmoe.launch.rank import DEVICES, leave
from stepmoe.measure.plan import FEWEST_ROUNDS

_DTYPES = ("bfloat16", "float16")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bench-fusion` command."""
    parser = subparsers.add_parser(
        "bench-fusion",
        help="measure all-reduce + add + norm, fused and not, on ranks with a GPU each",
        description="Measure all-reduce + add + norm in every implementation, and the collectives "
        "alone, at several sizes. Start it with torchrun, a rank for each GPU: torchrun "
        "--nproc-per-node 8 -m stepmoe ...",
    )
    add = parser.add_argument
    sizes = [1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    rows = f"rows of the tensor that is summed (default: {' '.join(map(str, sizes))})"
    add("--tokens", nargs="+", type=int, default=sizes, metavar="N", help=rows)
    columns = "its columns, the model's hidden size (default: 4096)"
    add("--hidden", type=int, default=4096, metavar="N", help=columns)
    add("--dtype", default=_DTYPES[0], choices=_DTYPES, help=f"default: {_DTYPES[0]}")
    rounds = f"timed rounds, at least {FEWEST_ROUNDS}; each runs every implementation (default: 30)"
    add("--repeats", type=int, default=30, metavar="N", help=rounds)
    where = "where ranks run; cpu is for --rehearse (default: cuda)"
    add("--device", default="cuda", choices=DEVICES, help=where)
    shows = "only show that it works, on ranks that share a GPU or have none; times mean nothing"
    add("--rehearse", action="store_true", help=shows)
    add("--json", type=Path, metavar="FILE", help="keep all of it in a file, for notebook 04")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from stepmoe.measure.environment import look_around
    from stepmoe.measure.fused_ops import time_fused_ops
    from stepmoe.measure.fused_ops_file import table, with_provenance

    _check(args)
    device = init_distributed(args.device)
    dtype = getattr(torch, args.dtype)
    timings = time_fused_ops(args.tokens, args.hidden, dtype, args.repeats, rehearsal=args.rehearse)
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, look_around(device))
    if dist.get_rank() == 0:
        print(table(timings))
        if args.json:
            line = command.command_line("bench-fusion", _options(args), len(places))
            content = with_provenance(
                timings, places, args.hidden, dtype, line, rehearsal=args.rehearse
            )
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    leave()
    return 0


def _check(args: argparse.Namespace) -> None:
    for tokens in args.tokens:
        whole_number("--tokens", tokens)
    whole_number("--hidden", args.hidden)
    whole_number("--repeats", args.repeats, FEWEST_ROUNDS)
    check_writable(args.json)


def _options(args: argparse.Namespace) -> dict[str, list[object]]:
    """What was measured, as options."""
    options: dict[str, list[object]] = {
        "tokens": args.tokens,
        "hidden": [args.hidden],
        "dtype": [args.dtype],
        "repeats": [args.repeats],
    }
    return {**options, "device": [args.device], "rehearse": []} if args.rehearse else options
