"""Measure the variants without a notebook: `python -m stepmoe bench`, alone or under torchrun."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError, RankError, RankTimeout
from stepmoe.launch import Ranks, init_distributed
from stepmoe.launch.rank import DEVICES, check_device
from stepmoe.measure.plan import PHASES, Plan
from stepmoe.parallel import ParallelConfig, tensor_layouts
from stepmoe.variants import VARIANTS

if TYPE_CHECKING:
    import pandas as pd

_SHAPES = {"tiny": Step3p5Config.tiny, "flash": Step3p5Config.flash}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_RANKS = 4  # as many as the notebooks use
_BAD_ARGUMENT, _FAILED = 2, 1  # exit statuses


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
    add("--tp", type=int, help=f"ranks (default: torchrun's, else {_RANKS})")
    add("--ep", type=int, default=1, help="expert groups; divides tp (default: 1)")
    add("--attention", default="tp", choices=("tp", "dp"))
    only = "run this rank's share alone in one process, nothing sent: one rank's compute of --tp"
    add("--simulate-rank", type=int, metavar="R", help=only)
    some = "only these decoder layers of the shape (default: all)"
    add("--layers", nargs="+", type=int, metavar="N", help=some)
    names = f"all, or some of {', '.join(VARIANTS)}"
    add("--variants", nargs="+", default=["all"], metavar="NAME", help=names)
    add("--tokens", nargs="+", type=int, default=[1, 64, 1024], metavar="N")
    add("--phase", nargs="+", default=list(PHASES), choices=PHASES)
    add("--device", default="auto", choices=DEVICES)
    add("--dtype", choices=_DTYPES, help="default: the shape's own")
    add("--repeats", type=int, default=20, help="rounds, at least 6 (default: 20)")
    add("--warmup", type=int, default=3, help="rounds before them (default: 3)")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=600, help="seconds for all of it (default: 600)")
    add("--json", type=Path, metavar="FILE", help="keep it for stepmoe.measure.load and the charts")
    add("--csv", type=Path, metavar="FILE", help="the table alone")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        arguments = _checked(args)
    except (ConfigError, ImportError) as error:
        return _say(error, _BAD_ARGUMENT)
    try:
        frame = _measure(arguments, args.device)
    except (RankError, RankTimeout, ConfigError) as error:
        return _say(error, _FAILED)
    if _is_first():
        _give(args, arguments, frame)
    return 0


def _checked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of compare_latency; ConfigError for what is wrong before any rank starts."""
    config = _SHAPES[args.shape]() if args.shape in _SHAPES else _from_folder(args.shape)
    if args.layers is not None:
        config = config.with_layers(*args.layers)
    there = _torchrun_ranks()
    tp = args.tp if args.tp is not None else there or _RANKS
    parallel = ParallelConfig(tp, args.ep, args.attention, args.simulate_rank)
    if args.simulate_rank is None and there not in (None, tp):
        raise ConfigError(f"--tp {tp}: torchrun started {there} ranks; leave --tp out")
    arguments = {
        "config": config,
        "variants": list(VARIANTS) if args.variants == ["all"] else args.variants,
        "tokens": args.tokens,
        "parallel": parallel,
        "phases": args.phase,
        "repeats": args.repeats,
        "warmup": args.warmup,
        "dtype": getattr(torch, args.dtype or config.torch_dtype),
        "seed": args.seed,
    }
    plan = Plan.of(**arguments)
    check_device(args.device)
    if not args.timeout > 0:
        raise ConfigError(f"--timeout {args.timeout}: give seconds, more than 0")
    for file in (args.json, args.csv):
        if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            raise ConfigError(f"{file}: cannot write into {file.parent}; give another folder")
    _check_memory(plan, args.device)
    for package in ("pandas",) if there else ("pandas", "ipyparallel", "cloudpickle"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install 'stepmoe[notebooks]'")
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


def _torchrun_ranks() -> int | None:
    """How many ranks torchrun started, this process being one of them; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _is_first() -> bool:
    return _torchrun_ranks() is None or os.environ["RANK"] == "0"


def _say(error: Exception, status: int) -> int:
    if _is_first():
        print(f"python -m stepmoe bench: {error}", file=sys.stderr)
    return status


def _measure(arguments: dict[str, Any], device: str) -> pd.DataFrame:
    """In torchrun's ranks, in new ones, or, for a simulated rank, in this process."""
    from stepmoe.measure import compare_latency

    parallel = arguments["parallel"]
    if _torchrun_ranks() is None and parallel.simulate_rank is None:
        with Ranks(parallel.tp, device=device) as ranks:
            return compare_latency(ranks=ranks, **arguments)
    init_distributed(device)
    try:
        return compare_latency(**arguments)
    finally:
        dist.destroy_process_group()


def _give(args: argparse.Namespace, arguments: dict[str, Any], frame: pd.DataFrame) -> None:
    """Print it, and write the files asked for."""
    from stepmoe.measure import save, table

    frame.attrs["command"] = _command(args, arguments)
    print(table(frame))
    if args.json:
        save(frame, args.json)
    if args.csv:
        frame.to_csv(args.csv, index=False)


def _command(args: argparse.Namespace, arguments: dict[str, Any]) -> str:
    """The command line that measures the same again."""
    parallel, words = arguments["parallel"], ["python", "-m", "stepmoe", "bench"]
    if there := _torchrun_ranks():
        words = ["torchrun", "--nproc-per-node", str(there), "-m", "stepmoe", "bench"]
    options = {
        "shape": [args.shape],
        "tp": [parallel.tp],
        "ep": [parallel.ep],
        "attention": [parallel.attention],
        "variants": arguments["variants"],
        "tokens": arguments["tokens"],
        "phase": arguments["phases"],
        "device": [args.device],
        "dtype": [str(arguments["dtype"]).removeprefix("torch.")],
        "repeats": [args.repeats],
        "warmup": [args.warmup],
        "seed": [args.seed],
    }
    if args.simulate_rank is not None:
        options["simulate-rank"] = [args.simulate_rank]
    if args.layers is not None:
        options["layers"] = args.layers
    for name, values in options.items():
        words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
