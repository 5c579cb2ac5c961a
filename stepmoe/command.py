"""What the measuring commands share: whose ranks they run in, what they refuse, how they end."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from stepmoe.checks import DTYPES
from stepmoe.comm.groups import world_size
from stepmoe.command_checks import check_packages, check_writable
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.launch import Ranks, init_distributed
from stepmoe.launch.arguments import PACKAGES, check_timeout
from stepmoe.launch.rank import DEVICES, check_device, leave, torchrun_rank, torchrun_ranks
from stepmoe.layers import layer_numbers
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS

if TYPE_CHECKING:
    import pandas as pd

_SHAPES = {"tiny": Step3p5Config.tiny, "flash": Step3p5Config.flash}
_DEFAULT_SHAPE = "tiny"


class FailedError(RuntimeError):
    """What was asked for had been checked, and went wrong all the same."""


def add_arguments(parser: argparse.ArgumentParser, default_ranks: int, dtype: str) -> None:
    """The arguments that every measuring command has.

    Args:
        default_ranks: tp where nothing else says it.
        dtype: whose dtype is the default, in words.
    """
    add = parser.add_argument
    ranks = f"ranks that share the model (default: as many as torchrun has, else {default_ranks})"
    add("--tp", type=int, metavar="N", help=ranks)
    groups = "groups of ranks, each with its own part of the experts; divides --tp (default: 1)"
    add("--ep", type=int, default=1, metavar="N", help=groups)
    heads = "tp: a rank has some heads of each sequence; dp: all heads of some (default: tp)"
    add("--attention", default="tp", choices=("tp", "dp"), help=heads)
    names = f"some of {', '.join(VARIANTS)} (default: all)"
    add("--variants", nargs="+", default=["all"], metavar="NAME", help=names)
    add_device(parser)
    kind = f"of weights and activations (default: {dtype})"
    add("--dtype", choices=DTYPES, help=kind)
    limit = "end the ranks if a call takes longer; no limit under torchrun (default: 600)"
    add("--timeout", type=float, default=600, metavar="SECONDS", help=limit)
    kept = "keep all of it in a file, for stepmoe.measure.load and the charts"
    add("--json", type=Path, metavar="FILE", help=kept)
    add("--csv", type=Path, metavar="FILE", help="keep the table alone in a file")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where ranks run."""
    where = "where ranks run; auto: on GPUs if there are some (default: auto)"
    parser.add_argument("--device", default="auto", choices=DEVICES, help=where)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The arguments that say of which model, and which rank of it."""
    add = parser.add_argument
    shapes = (
        f"of a model with random weights: flash (the published one), {_DEFAULT_SHAPE}, or a folder "
        f"with a config.json (default: {_DEFAULT_SHAPE})"
    )
    add("--shape", metavar="SHAPE", help=shapes)
    some = "only these decoder layers, from 0, as in 3-6 or 0 4 (default: all)"
    add("--layers", nargs="+", metavar="N", help=some)
    only = (
        "run only rank R (from 0) of the --tp ranks, in this process: its compute; nothing is sent"
    )
    add("--simulate-rank", type=int, metavar="R", help=only)


def shape_name(args: argparse.Namespace) -> str:
    """The shape asked for, as `--shape` has it."""
    return _DEFAULT_SHAPE if args.shape is None else str(args.shape)


def shape_of(args: argparse.Namespace) -> Step3p5Config:
    """The shape asked for, with all its layers."""
    name = shape_name(args)
    if name in _SHAPES:
        return _SHAPES[name]()
    if not Path(name).exists():
        raise ConfigError(f"--shape {name}: give tiny, flash, or a folder with a config.json")
    return Step3p5Config.from_pretrained(name)


def layers_of(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The layers asked for; None for all."""
    return None if args.layers is None else layer_numbers(",".join(args.layers))


def shape_options(args: argparse.Namespace) -> dict[str, list[object]]:
    """The options that `add_shape` added, as they were given."""
    options: dict[str, list[object]] = {"shape": [shown_folder(shape_name(args))]}
    if args.simulate_rank is not None:
        options["simulate-rank"] = [args.simulate_rank]
    if args.layers is not None:
        options["layers"] = args.layers
    return options


def shown_folder(given: str) -> str:
    """A folder as a file may name it, without where it lies on this machine.

    Returns:
        As given if relative; relative if it lies in the current folder; else ".../" and its name.
    """
    path, here = Path(given), Path.cwd()
    if not path.is_absolute():
        return given
    return str(path.relative_to(here)) if path.is_relative_to(here) else f".../{path.name}"


def carry_out(
    args: argparse.Namespace,
    checked: Callable[[], dict[str, Any]],
    measure: Callable[..., pd.DataFrame],
    give: Callable[[dict[str, Any], pd.DataFrame], None],
) -> int:
    """Check, measure, give; returns the exit status.

    Args:
        checked: the arguments of `measure`; raises ConfigError for what is wrong.
        measure: takes `ranks` beside them, where it does not run in this process.
        give: prints; called with the arguments and the result, in one rank.

    Raises:
        ConfigError, CheckpointError: something cannot be run as asked for; nothing was started.
        RankError, RankTimeout, FailedError: it was started, and failed.
    """
    arguments = checked()
    _check(args)
    try:
        frame = _measure(measure, arguments, args.device)
    except ConfigError as error:
        raise FailedError(str(error)) from error
    if torchrun_rank() in (None, 0):
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
    if simulate_rank is not None and there not in (None, 1):
        raise ConfigError(
            f"--simulate-rank {simulate_rank} runs alone, and torchrun started {there} ranks: "
            "leave torchrun out"
        )
    return ParallelConfig(tp, args.ep, args.attention, simulate_rank)


def variants_of(args: argparse.Namespace) -> list[str]:
    """The variants asked for, by name."""
    return list(VARIANTS) if args.variants == ["all"] else args.variants


def command_line(
    name: str, options: Mapping[str, Iterable[object]], ranks: int | None = None
) -> str:
    """The command line that measures the same again.

    Args:
        options: values by name, none for a flag.
        ranks: of a command that something else than torchrun may have started, too.
    """
    words = ["python", "-m", "stepmoe", name]
    if there := ranks or torchrun_ranks():
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
    check_timeout(args.timeout)
    for file in (args.json, args.csv):
        check_writable(file)
    if args.json is not None and args.json == args.csv:
        raise ConfigError(f"--json {args.json} --csv {args.csv}: give each a file of its own")
    check_packages("pandas", *(() if torchrun_ranks() else PACKAGES))


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
        frame = measure(**arguments)
    except BaseException:
        # NCCL's end would wait for the peers, and they wait for this rank: nobody would see why.
        if world_size() == 1 or dist.get_backend() == "gloo":
            leave()
        raise
    leave()
    return frame
