"""`python -m stepmoe layer-floor`: one rank's share of a layer on one GPU, against its floor."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stepmoe import command
from stepmoe.checks import whole_number
from stepmoe.command_checks import check_alone, check_memory, check_writable
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS

FORMAT = "stepmoe layer floor 1"
_LAYERS = {"full": 4, "sliding": 5}  # of the published shape
_DEPTH = 5  # layers of the stack that is timed, beside one of a single layer


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `layer-floor` command."""
    parser = subparsers.add_parser(
        "layer-floor",
        help="time every operation of one rank's MoE layer on this GPU, against its floor",
        description="Time one rank's share of an MoE layer of Step-3.5-Flash on one NVIDIA GPU, "
        "operation by operation, against the least time each can take: one layer with full "
        "attention and one with sliding attention, each in a prefill and in decode steps.",
    )
    add = parser.add_argument
    ranks = "ranks that share the layer; one is measured, and nothing is sent (default: 8)"
    add("--tp", type=int, default=8, metavar="N", help=ranks)
    groups = "groups of ranks, each with its own part of the experts; divides --tp (default: 4)"
    add("--ep", type=int, default=4, metavar="N", help=groups)
    which = "which rank is measured, from 0 (default: 0)"
    add("--simulate-rank", type=int, default=0, metavar="R", help=which)
    add("--variant", default="deferred", choices=VARIANTS, help="default: deferred")
    size = "sequences of a prefill, and tokens of each (default: 2 8192)"
    add("--prefill", nargs=2, type=int, default=[2, 8192], metavar=("SEQUENCES", "LENGTH"),
        help=size)  # fmt: skip
    sizes = [1, 16, 64, 256]
    words = f"sequences of a decode step; none: no decode (default: {' '.join(map(str, sizes))})"
    add("--decode", nargs="*", type=int, default=sizes, metavar="SEQUENCES", help=words)
    seen = "tokens of a sequence in a decode step, the new one included (default: 4096)"
    add("--context", type=int, default=4096, metavar="N", help=seen)
    peer = "also time the prefill in transformers (5.23 or newer), for comparison"
    add("--peer", action="store_true", help=peer)
    add("--json", type=Path, metavar="FILE", help="keep all of it in a file, for notebook 06")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    parallel = ParallelConfig(args.tp, args.ep, "tp", args.simulate_rank)
    _check(args, parallel)
    record = measure(args, parallel)
    print(text_of(record))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return 0


def _check(args: argparse.Namespace, parallel: ParallelConfig) -> None:
    check_alone()
    config = Step3p5Config.flash()
    parallel.check(config)
    longest = config.max_position_embeddings
    whole_number("--prefill SEQUENCES", args.prefill[0])
    whole_number("--prefill LENGTH", args.prefill[1], most=longest)
    for sequences in args.decode:
        whole_number("--decode", sequences)
    whole_number("--context", args.context, most=longest)
    check_writable(args.json)
    if args.peer and not _has_peer():
        raise ConfigError("--peer needs transformers 5.23 or newer: pip install transformers")
    if not torch.cuda.is_available():
        raise ConfigError("this needs an NVIDIA GPU, and torch sees none")
    from stepmoe.measure.layer_floor import VOCAB

    for layer in _LAYERS.values():
        held = config.replace(vocab_size=VOCAB).with_layers(*[layer] * (_DEPTH + 1))
        check_memory(held, parallel, torch.bfloat16, "cuda")


def _has_peer() -> bool:
    """Whether there is a transformers that knows the model."""
    try:
        return importlib.util.find_spec("transformers.models.step3p7") is not None
    except ModuleNotFoundError:  # no transformers at all
        return False


def measure(args: argparse.Namespace, parallel: ParallelConfig) -> dict[str, Any]:
    """Everything the arguments ask for, as what is kept in a file."""
    from stepmoe.measure.chip import measure_chip
    from stepmoe.measure.environment import look_around, provenance
    from stepmoe.measure.layer_floor import Stack
    from stepmoe.measure.layer_record import layer_record
    from stepmoe.measure.peer import peer_seconds, peer_version

    config, device = Step3p5Config.flash(), torch.device("cuda")
    where = provenance([look_around(device)])
    if args.peer:
        where["versions"]["transformers"] = peer_version()
    chip = measure_chip(device)
    batch, length = args.prefill
    layers = []
    growth = 0
    for name, layer in _LAYERS.items():
        stack = Stack(config, layer, parallel, args.variant, depth=_DEPTH)
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
        "command": command.command_line("layer-floor", _options(args)),
        **where,
        "parallel": {"tp": parallel.tp, "ep": parallel.ep, "simulate_rank": parallel.simulate_rank},
        "variant": args.variant,
        "dtype": "bfloat16",
        "chip": asdict(chip),
        "growth_bytes_in_1000_passes": growth,
        "layers": layers,
    }


def _options(args: argparse.Namespace) -> dict[str, list[object]]:
    """What was measured, as options."""
    options: dict[str, list[object]] = {
        "tp": [args.tp],
        "ep": [args.ep],
        "simulate-rank": [args.simulate_rank],
        "variant": [args.variant],
        "prefill": args.prefill,
        "decode": args.decode,
        "context": [args.context],
    }
    return {**options, "peer": []} if args.peer else options


def text_of(record: dict[str, Any]) -> str:
    """The tables, for a terminal."""
    chip = record["chip"]
    lines = [
        f"{', '.join(record['hardware']['gpus'])}: {chip['rate'] / 1e12:.0f} TFLOP/s for a moment, "
        f"{chip['sustained_rate'] / 1e12:.0f} kept up; {chip['bandwidth'] / 1e12:.2f} TB/s; "
        f"{record['date']}"
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
        f"floor {layer['floor'] * 1e6:.1f}, ratio {layer['ratio']:.2f} (at the rate kept up "
        f"{layer['seconds'] / layer['sustained_floor']:.2f})"
    )
    if layer["eager_seconds"] is not None:
        text += f"; launched by the host: {layer['eager_seconds'] * 1e6:.1f} us"
    if layer["memory_ratio"] is not None:
        text += f"; memory {layer['memory_ratio']:.2f} x unavoidable"
    if "peer_seconds" in layer:
        text += f"; transformers takes {layer['peer_seconds'] / layer['seconds']:.1f} x as long"
    return text
