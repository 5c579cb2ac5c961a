"""`python -m stepmoe layer-floor`: one rank's share of a layer on one GPU, against its floor."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from stepmoe.checks import whole_number
from stepmoe.command_checks import check_writable
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS

FORMAT = "stepmoe layer floor 1"
_LAYERS = {"full": 4, "sliding": 5}  # of the published shape


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `layer-floor` command."""
    parser = subparsers.add_parser(
        "layer-floor",
        help="time every operation of one rank's MoE layer on this GPU, against its floor",
        description="Time one rank's share of an MoE layer of Step-3.5-Flash on one NVIDIA GPU, "
        "operation by operation, against the least time each can take.",
    )
    add = parser.add_argument
    add("--tp", type=int, default=8, help="ranks of which one is measured (default: 8)")
    add("--ep", type=int, default=4, help="expert groups (default: 4)")
    add("--simulate-rank", type=int, default=0, metavar="R", help="which rank (default: 0)")
    add("--variant", default="deferred", choices=VARIANTS)
    add("--prefill", nargs=2, type=int, default=[2, 8192], metavar=("SEQUENCES", "LENGTH"))
    add("--decode", nargs="*", type=int, default=[1, 16, 64, 256], metavar="SEQUENCES")
    add("--context", type=int, default=4096, help="tokens that decoding sees (default: 4096)")
    add("--peer", action="store_true", help="also time the share in transformers (5.23 or newer)")
    add("--json", type=Path, metavar="FILE", help="keep everything that was measured")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        parallel = ParallelConfig(args.tp, args.ep, "tp", args.simulate_rank)
        parallel.check(Step3p5Config.flash())
        _check(args)
    except ConfigError as error:
        print(f"python -m stepmoe layer-floor: {error}", file=sys.stderr)
        return 2
    record = measure(args, parallel)
    print(text_of(record))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    check_writable(args.json)
    for name in ("prefill", "decode", "context"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            whole_number(f"--{name}", value)
    if not torch.cuda.is_available():
        raise ConfigError("this needs an NVIDIA GPU, and torch sees none")


def measure(args: argparse.Namespace, parallel: ParallelConfig) -> dict[str, Any]:
    """Everything the arguments ask for, as what is kept in a file."""
    from stepmoe.measure.environment import look_around, provenance
    from stepmoe.measure.layer_floor import Stack, measured_chip
    from stepmoe.measure.layer_record import layer_record
    from stepmoe.measure.peer import peer_seconds, peer_version

    config, device = Step3p5Config.flash(), torch.device("cuda")
    where = provenance([look_around(device)])
    if args.peer:
        where["versions"]["transformers"] = peer_version()
    chip = measured_chip(device)
    batch, length = args.prefill
    layers = []
    growth = 0
    for name, layer in _LAYERS.items():
        stack = Stack(config, layer, parallel, args.variant, depth=5)
        found = [stack.prefill(batch, length)]
        found += [stack.decode(sequences, args.context) for sequences in args.decode]
        layers += [layer_record(name, result, chip) for result in found]
        growth = max(growth, stack.growth(64, 1000))
        del stack, found
        torch.cuda.empty_cache()
        if args.peer:
            layers[-1 - len(args.decode)]["peer_seconds"] = peer_seconds(
                config, layer, parallel, batch, length
            )
    return {
        "format": FORMAT,
        "command": shlex.join(["python", "-m", "stepmoe", *sys.argv[1:]]),
        **where,
        "parallel": {"tp": parallel.tp, "ep": parallel.ep, "simulate_rank": parallel.simulate_rank},
        "variant": args.variant,
        "dtype": "bfloat16",
        "chip": {"rate": chip.rate, "bandwidth": chip.bandwidth, "source": chip.source},
        "growth_bytes_in_1000_passes": growth,
        "layers": layers,
    }


def text_of(record: dict[str, Any]) -> str:
    """The tables, for a terminal."""
    chip = record["chip"]
    lines = [
        f"{', '.join(record['hardware']['gpus'])}: {chip['rate'] / 1e12:.0f} TFLOP/s, "
        f"{chip['bandwidth'] / 1e12:.2f} TB/s; {record['date']}"
    ]
    for layer in record["layers"]:
        lines += ["", _heading(layer), f"{'operation':28}{'us':>9}{'floor':>9}{'ratio':>7}  bound"]
        lines += [
            f"{row['operation']:28}{row['seconds'] * 1e6:9.1f}{row['floor'] * 1e6:9.1f}"
            f"{row['ratio']:7.2f}  {row['bound']}"
            for row in layer["operations"]
        ]
        lines.append(f"{'other kernels':28}{layer['other'] * 1e6:9.1f}")
    lines.append(f"\nmemory grew by {record['growth_bytes_in_1000_passes']} bytes in 1000 passes")
    return "\n".join(lines)


def _heading(layer: dict[str, Any]) -> str:
    text = (
        f"{layer['attention']} attention, {layer['phase']}, {layer['batch']} x {layer['length']} "
        f"tokens, context {layer['context']}: {layer['seconds'] * 1e6:.1f} us, "
        f"floor {layer['floor'] * 1e6:.1f}, ratio {layer['ratio']:.2f}"
    )
    if layer["eager_seconds"] is not None:
        text += f"; launched by the host: {layer['eager_seconds'] * 1e6:.1f} us"
    if layer["memory_ratio"] is not None:
        text += f"; memory {layer['memory_ratio']:.2f} x unavoidable"
    if "peer_seconds" in layer:
        text += f"; transformers takes {layer['peer_seconds'] / layer['seconds']:.1f} x as long"
    return text
