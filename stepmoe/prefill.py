"""Throughput without a notebook: `python -m stepmoe prefill`, alone or under torchrun.

The published comparison, on 8 GPUs:

    torchrun --nproc-per-node 8 -m stepmoe prefill --shape flash --ep 4 \\
        --input-len 8192 --output-len 1 --prompts 200 --chunk 16384
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepmoe import command
from stepmoe.command_checks import check_memory, check_weights
from stepmoe.errors import ConfigError
from stepmoe.hub import locate
from stepmoe.measure import Workload, compare_throughput, save
from stepmoe.measure.report import throughput_table
from stepmoe.measure.workload import ROUTINGS, ThroughputPlan

if TYPE_CHECKING:
    import pandas as pd

_RANKS = 4  # as many as the notebooks use
_NUMBERS = {
    "input-len": "tokens of a prompt",
    "output-len": "new tokens for each prompt; the first comes with the prefill",
    "prompts": "how many prompts",
    "chunk": "most tokens of a prefill step: of several prompts, or of a part of one",
    "warmup": "batches, of prompts that share a step, that run first and are not timed",
    "context": "with --decode: tokens that each sequence has before the step",
    "decode-steps": "with --decode: timed steps for each batch size",
}
# The published workload exceeds the tiny shape's positions, and a laptop's patience.
_TINY = Workload(input_len=256, prompts=32, chunk=1024, context=256)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `prefill` command."""
    parser = subparsers.add_parser(
        "prefill",
        help="measure tokens a second of each variant on a workload",
        description="Run random prompts through a whole model, in steps of at most --chunk tokens, "
        "with each variant in turn: tokens a second, and what a step spends on computing, "
        "communicating and waiting. Alone it starts its own ranks; under torchrun it uses "
        "torchrun's.",
    )
    command.add_shape(parser)
    add = parser.add_argument
    checkpoint = "a checkpoint's folder or name on the hub, in place of --shape and random weights"
    add("--model", help=checkpoint)
    for name, meaning in _NUMBERS.items():
        published, tiny = (getattr(work, _field(name)) for work in (Workload(), _TINY))
        default = f"default: {published}" + (f", tiny: {tiny}" if tiny != published else "")
        add(f"--{name}", type=int, metavar="N", help=f"{meaning} ({default})")
    sizes = "also time decode steps, of so many sequences each (default: none)"
    add("--decode", nargs="+", type=int, default=[], metavar="SEQUENCES", help=sizes)
    routing = "how evenly random weights spread tokens over the experts (default: uniform)"
    add("--routing", choices=ROUTINGS, help=routing)
    add("--seed", type=int, default=0, metavar="N", help="of weights and prompts (default: 0)")
    kept = "hold the weights of attention, MLPs and experts in FP8 and compute with them"
    add("--quantization", choices=("fp8",), help=f"{kept} (default: all in --dtype)")
    launched = "let the host launch every step, also where CUDA graphs could be replayed"
    add("--eager", action="store_true", help=launched)
    command.add_arguments(parser, _RANKS, "the shape's own")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    checked, give = partial(_checked, args), partial(_give, args)
    return command.carry_out(args, checked, compare_throughput, give)


def _checked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of compare_throughput; raises for what is wrong before any rank starts."""
    if args.model is not None and args.shape is not None:
        raise ConfigError(
            f"--shape {args.shape} --model {args.model}: a checkpoint has its own shape; give one "
            "of both"
        )
    layers = command.layers_of(args)
    source = locate(args.model, layers) if args.model is not None else command.shape_of(args)
    is_tiny = args.model is None and command.shape_name(args) == "tiny"
    usual = _TINY if is_tiny else Workload()
    for field in map(_field, _NUMBERS):
        if getattr(args, field) is None:
            setattr(args, field, getattr(usual, field))
    workload = Workload(
        decode=tuple(args.decode),
        **{field: getattr(args, field) for field in map(_field, _NUMBERS)},
    )
    arguments = {
        "source": source,
        "variants": command.variants_of(args),
        "workload": workload,
        "parallel": command.layout_of(args, _RANKS, args.simulate_rank),
        "dtype": getattr(torch, args.dtype) if args.dtype else None,
        "routing": args.routing,
        "layers": layers,
        "seed": args.seed,
        "quantization": args.quantization,
        "eager": args.eager,
    }
    plan = ThroughputPlan.of(**arguments)
    check_memory(plan.config, plan.parallel, plan.dtype, args.device, plan.quantization)
    if isinstance(source, Path):
        check_weights(source, layers)
    return {**arguments, "dtype": plan.dtype, "timeout": args.timeout}


def _field(option: str) -> str:
    return option.replace("-", "_")


def _give(args: argparse.Namespace, arguments: dict[str, Any], frame: pd.DataFrame) -> None:
    """Print it, and write the file asked for."""
    options = {
        **command.shape_options(args),
        **command.layout_options(args, arguments),
        **{name: [getattr(args, _field(name))] for name in _NUMBERS},
        "seed": [args.seed],
    }
    for name in ("decode", "routing", "quantization"):
        if value := getattr(args, name):
            options[name] = value if isinstance(value, list) else [value]
    if args.eager:
        options["eager"] = []
    if args.model is not None:
        del options["shape"]
        options["model"] = [command.shown_folder(args.model)]
    frame.attrs["command"] = command.command_line("prefill", options)
    print(throughput_table(frame))
    if args.json:
        save(frame, args.json)
