"""Time the fused operation: `torchrun --nproc-per-node 2 -m stepmoe bench-fusion`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepmoe.command_checks import check_writable
from stepmoe.errors import ConfigError
from stepmoe.launch import init_distributed
from stepmoe.launch.rank import DEVICES

_DTYPES = ("bfloat16", "float16")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `bench-fusion` command."""
    parser = subparsers.add_parser(
        "bench-fusion",
        help="measure all-reduce + add + norm, fused and not, on ranks with a GPU each",
        description="Measure all-reduce + add + norm in every implementation, and the collectives "
        "alone, under torchrun with one rank a GPU.",
    )
    add = parser.add_argument
    sizes = [1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    rows = f"rows of the tensor (default: {' '.join(map(str, sizes))})"
    add("--tokens", nargs="+", type=int, default=sizes, metavar="N", help=rows)
    add("--hidden", type=int, default=4096, metavar="D", help="hidden size (default: 4096)")
    add("--dtype", default=_DTYPES[0], choices=_DTYPES)
    add("--rounds", type=int, default=30, help="timed rounds (default: 30)")
    add("--device", default="cuda", choices=DEVICES)
    shows = "only show that it works, on ranks that share a GPU or have none; times mean nothing"
    add("--rehearse", action="store_true", help=shows)
    add("--json", type=Path, metavar="FILE", help="keep it, for notebook 04")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from stepmoe.measure.environment import look_around
    from stepmoe.measure.fused_ops import time_fused_ops
    from stepmoe.measure.fused_ops_file import table, with_provenance

    try:
        _check(args)
        device = init_distributed(args.device)
        dtype = getattr(torch, args.dtype)
        timings = time_fused_ops(
            args.tokens, args.hidden, dtype, args.rounds, rehearsal=args.rehearse
        )
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"python -m stepmoe bench-fusion: {error}", file=sys.stderr)
        return 2
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, look_around(device))
    if dist.get_rank() == 0:
        print(table(timings))
        if args.json:
            command = _command(args, len(places))
            content = with_provenance(
                timings, places, args.hidden, dtype, command, rehearsal=args.rehearse
            )
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    dist.destroy_process_group()
    return 0


def _check(args: argparse.Namespace) -> None:
    if min(args.tokens) < 1 or args.rounds < 6 or args.hidden < 1:
        raise ConfigError(
            f"--tokens {args.tokens}, --hidden {args.hidden}, --rounds {args.rounds}: "
            "give positive numbers, and at least 6 rounds"
        )
    check_writable(args.json)


def _command(args: argparse.Namespace, ranks: int) -> str:
    words = f"torchrun --nproc-per-node {ranks} -m stepmoe bench-fusion --tokens"
    tokens = " ".join(map(str, args.tokens))
    words += f" {tokens} --hidden {args.hidden} --dtype {args.dtype} --rounds {args.rounds}"
    return words + (f" --device {args.device} --rehearse" if args.rehearse else "")
