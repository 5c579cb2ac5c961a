"""What the measuring commands share: whose ranks they run in, what they refuse, how they end."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from stepmoe.checks import DTYPES
from stepmoe.command_checks import check_writable
from stepmoe.config import Step3p5Config
from stepmoe.errors import CheckpointError, ConfigError, RankError, RankTimeout
from stepmoe.launch import Ranks, init_distributed
from stepmoe.launch.rank import DEVICES, check_device
from stepmoe.layers import layer_numbers
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS

if TYPE_CHECKING:
    import pandas as pd

_SHAPES = {"tiny": Step3p5Config.tiny, "flash": Step3p5Config.flash}
_BAD_ARGUMENT, _FAILED = 2, 1  # exit statuses


def add_arguments(parser: argparse.ArgumentParser, default_ranks: int, dtype: str) -> None:
    """The arguments that every measuring command has.

    Args:
        default_ranks: tp where nothing else says it.
        dtype: whose dtype is the default, in words.
    """
    add = parser.add_argument
    add("--tp", type=int, help=f"ranks (default: torchrun's, else {default_ranks})")
    add("--ep", type=int, default=1, help="expert groups; divides tp (default: 1)")
    add("--attention", default="tp", choices=("tp", "dp"))
    names = f"all, or some of {', '.join(VARIANTS)}"
    add("--variants", nargs="+", default=["all"], metavar="NAME", help=names)
    add("--device", default="auto", choices=DEVICES)
    add("--dtype", choices=DTYPES, help=f"default: {dtype}")
    add(
        "--timeout",
        type=float,
        default=600,
        help="seconds for a call of the ranks (default: 600)",
    )
    add("--json", type=Path, metavar="FILE", help="keep it for stepmoe.measure.load and the charts")
    add("--csv", type=Path, metavar="FILE", help="the table alone")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The arguments that say of which model, and which rank of it."""
    add = parser.add_argument
    add("--shape", default="tiny", help="tiny, flash, or a folder with a config.json")
    only = "run this rank's share alone in one process, nothing sent: one rank's compute of --tp"
    add("--simulate-rank", type=int, metavar="R", help=only)
    some = "only these decoder layers, as in 3-6 or 0 4 (default: all)"
    add("--layers", nargs="+", metavar="N", help=some)


def shape_of(args: argparse.Namespace) -> Step3p5Config:
    """The shape asked for, with all its layers."""
    if args.shape in _SHAPES:
        return _SHAPES[args.shape]()
    if not Path(args.shape).exists():
        raise ConfigError(f"--shape {args.shape}: give tiny, flash, or a folder with a config.json")
    return Step3p5Config.from_pretrained(args.shape)


def layers_of(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The layers asked for; None for all."""
    return None if args.layers is None else layer_numbers(",".join(args.layers))


def shape_options(args: argparse.Namespace) -> dict[str, list[object]]:
    """The options that `add_shape` added, as they were given."""
    options: dict[str, list[object]] = {"shape": [args.shape]}
    if args.simulate_rank is not None:
        options["simulate-rank"] = [args.simulate_rank]
    if args.layers is not None:
        options["layers"] = args.layers
    return options


def carry_out(
    name: str,
    args: argparse.Namespace,
    checked: Callable[[], dict[str, Any]],
    measure: Callable[..., pd.DataFrame],
    give: Callable[[dict[str, Any], pd.DataFrame], None],
) -> int:
    """Check, measure, give; returns the exit status.

    Args:
        name: of the command.
        checked: the arguments of `measure`; raises ConfigError for what is wrong.
        measure: takes `ranks` beside them, where it does not run in this process.
        give: prints; called with the arguments and the result, in one rank.
    """
    try:
        arguments = checked()
        _check(args)
    except (ConfigError, CheckpointError, ImportError) as error:
        return _say(name, error, _BAD_ARGUMENT)
    try:
        frame = _measure(measure, arguments, args.device)
    except (RankError, RankTimeout, ConfigError) as error:
        return _say(name, error, _FAILED)
    if _is_first():
        give(arguments, frame)
        if args.csv:
            frame.to_csv(args.csv, index=False)
    return 0


def layout_of(
    args: argparse.Namespace, default_ranks: int, simulate_rank: int | None = None
) -> ParallelConfig:
    """The layout asked for; ConfigError unless torchrun, if it is there, started that many."""
    there = torchrun_ranks()
    tp = args.tp if args.tp is not None else there or default_ranks
    if simulate_rank is None and there not in (None, tp):
        raise ConfigError(f"--tp {tp}: torchrun started {there} ranks; leave --tp out")
    return ParallelConfig(tp, args.ep, args.attention, simulate_rank)


def variants_of(args: argparse.Namespace) -> list[str]:
    """The variants asked for, by name."""
    return list(VARIANTS) if args.variants == ["all"] else args.variants


def torchrun_ranks() -> int | None:
    """How many ranks torchrun started, this process being one of them; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def command_line(name: str, options: Mapping[str, Iterable[object]]) -> str:
    """The command line that measures the same again."""
    words = ["python", "-m", "stepmoe", name]
    if there := torchrun_ranks():
        words = ["torchrun", "--nproc-per-node", str(there), "-m", "stepmoe", name]
    for option, values in options.items():
        words += [f"--{option}", *map(str, values)]
    return shlex.join(words)


def layout_options(args: argparse.Namespace, arguments: dict[str, Any]) -> dict[str, list[object]]:
    """The options that `add_arguments` added, without the files, as they were understood."""
    parallel = arguments["parallel"]
    return {
        "tp": [parallel.tp],
        "ep": [parallel.ep],
        "attention": [parallel.attention],
        "variants": arguments["variants"],
        "device": [args.device],
        "dtype": [str(arguments["dtype"]).removeprefix("torch.")],
    }


def _check(args: argparse.Namespace) -> None:
    check_device(args.device)
    if not args.timeout > 0:
        raise ConfigError(f"--timeout {args.timeout}: give seconds, more than 0")
    for file in (args.json, args.csv):
        check_writable(file)
    needed = ("pandas",) if torchrun_ranks() else ("pandas", "ipyparallel", "cloudpickle")
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install 'stepmoe[notebooks]'")


def _is_first() -> bool:
    return torchrun_ranks() is None or os.environ["RANK"] == "0"


def _say(name: str, error: Exception, status: int) -> int:
    if _is_first():
        print(f"python -m stepmoe {name}: {error}", file=sys.stderr)
    return status


def _measure(
    measure: Callable[..., pd.DataFrame], arguments: dict[str, Any], device: str
) -> pd.DataFrame:
    """In torchrun's ranks, in new ones, or, for a simulated rank, in this process."""
    parallel = arguments["parallel"]
    if torchrun_ranks() is None and parallel.simulate_rank is None:
        with Ranks(parallel.tp, device=device) as ranks:
            return measure(ranks=ranks, **arguments)
    init_distributed(device)
    try:
        return measure(**arguments)
    finally:
        dist.destroy_process_group()
