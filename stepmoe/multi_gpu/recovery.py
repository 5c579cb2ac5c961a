"""What a lost rank costs, without a notebook: `python -m stepmoe recovery`."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepmoe import command
from stepmoe.checks import whole_number
from stepmoe.comm.fusion import IMPLEMENTATIONS
from stepmoe.command_checks import check_alone, check_packages, check_writable
from stepmoe.errors import ConfigError, RankError, RankTimeout
from stepmoe.launch import Ranks
from stepmoe.launch.arguments import PACKAGES
from stepmoe.launch.rank import check_device
from stepmoe.measure.environment import Place, provenance
from stepmoe.measure.recovery import Loss, measure_recovery
from stepmoe.measure.store import without_nan

FORMAT = "stepmoe recovery 1"
_RANKS = 2  # the fewest of which one can be lost
_DEFAULTS = ("unfused", "triton", "flashinfer")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `recovery` command."""
    parser = subparsers.add_parser(
        "recovery",
        help="measure how the ranks end when one is lost, and when they are usable again",
        description="Start ranks, and lose one in the middle of all-reduce + add + norm: once it "
        "is killed, once it does not come. How the others end, and how long until the next call "
        "returns the right sum.",
    )
    add = parser.add_argument
    ranks = f"ranks to start, at least {_RANKS} (default: {_RANKS})"
    add("--tp", type=int, default=_RANKS, metavar="N", help=ranks)
    rows = "rows of the tensor that is summed (default: 64)"
    add("--tokens", type=int, default=64, metavar="N", help=rows)
    columns = "its columns, the model's hidden size (default: 4096)"
    add("--hidden", type=int, default=4096, metavar="N", help=columns)
    names = f"some of {', '.join(IMPLEMENTATIONS)} (default: {' '.join(_DEFAULTS)})"
    add("--implementations", nargs="+", default=_DEFAULTS, metavar="NAME", help=names)
    command.add_device(parser)
    add("--json", type=Path, metavar="FILE", help="keep all of it in a file")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    _check(args)
    try:
        with Ranks(args.tp, device=args.device) as ranks:
            losses, places = measure_recovery(ranks, args.implementations, args.tokens, args.hidden)
    except (RankError, RankTimeout):
        raise
    except RuntimeError as error:  # a wrong sum, or none that was missed
        raise command.FailedError(str(error)) from error
    print(losses_table(losses))
    if args.json:
        content = _with_provenance(losses, places, args)
        args.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    check_alone()
    check_device(args.device)
    check_writable(args.json)
    for name, least in (("tp", _RANKS), ("tokens", 1), ("hidden", 1)):
        whole_number(f"--{name}", getattr(args, name), least)
    check_packages(*PACKAGES)
    if unknown := set(args.implementations) - set(IMPLEMENTATIONS):
        raise ConfigError(
            f"--implementations {', '.join(sorted(unknown))}: use some of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}"
        )


def losses_table(losses: list[Loss]) -> str:
    """A line for each."""
    lines = ["implementation       a rank was   error after   usable after   what was raised"]
    for loss in losses:
        if loss.refusal:
            lines.append(f"{loss.implementation:20} {loss.how:10}   not tried: {loss.refusal}")
            continue
        times = f"{loss.error_seconds:9.2f} s   {loss.usable_seconds:10.2f} s"
        lines.append(f"{loss.implementation:20} {loss.how:10}   {times}   {loss.ended}")
    return "\n".join(lines)


def loss_of(row: dict[str, Any]) -> Loss:
    """Out of the rows of a file."""
    known: dict[str, Any] = {n: math.nan if v is None else v for n, v in row.items()}
    return Loss(**known)


def _with_provenance(
    losses: list[Loss], places: list[Place], args: argparse.Namespace
) -> dict[str, Any]:
    options: dict[str, list[object]] = {
        "tp": [args.tp],
        "tokens": [args.tokens],
        "hidden": [args.hidden],
        "implementations": list(args.implementations),
        "device": [args.device],
    }
    return {
        "format": FORMAT,
        **provenance(places),
        "command": command.command_line("recovery", options),
        "rows": [without_nan(asdict(loss)) for loss in losses],
    }
