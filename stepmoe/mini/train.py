"""Train the mini model: `python -m stepmoe.mini.train --weights build/mini --log build/mini.json`.

The defaults are those of the shipped weights. Minutes on one GPU; on a CPU only a trial
(`--steps 20 --rows 8`), which takes about a second a step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.checkpoint_writer import save_pretrained
from stepmoe.launch.rank import rank_device
from stepmoe.measure.environment import describe, look_around
from stepmoe.mini import config
from stepmoe.mini.answer import completions, right
from stepmoe.mini.data import ROW_TOKENS, loader
from stepmoe.mini.few_shot import prompt_ids
from stepmoe.mini.load import imbalance, load_of
from stepmoe.mini.task import HELDOUT_QUESTIONS, MAX_STEPS, heldout, parse_answer
from stepmoe.mini.trainer import Trainer, initialise
from stepmoe.parallel import ParallelConfig

FORMAT = "stepmoe training 1"
_REPORT_EVERY = 50  # steps between two points of the loss curve


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, write weights and log."""
    args = _parser().parse_args(argv)
    device = torch.device(args.device) if args.device else rank_device()
    model = Step3p5ForCausalLM.from_config(
        config(), parallel=ParallelConfig(), device=device, seed=args.seed
    )
    initialise(model)
    log: dict[str, Any] = {
        "format": FORMAT,
        "command": f"python -m stepmoe.mini.train {shlex.join(_shown(args))}".strip(),
        "date": datetime.date.today().isoformat(),
        "settings": {name: getattr(args, name) for name in _SETTINGS},
        "tokens_per_step": args.rows * ROW_TOKENS,
        **_place(device),
    }
    log |= _train(model, args)
    log["final"] = _evaluate(model, args.final_questions)
    log["final"]["load"] = _load(model, args.final_questions)
    print(json.dumps(log["final"] | {"load": "in the log"}), flush=True)
    if args.weights:
        save_pretrained(model, args.weights)
    if args.log:
        Path(args.log).write_text(json.dumps(log, indent=1, allow_nan=False) + "\n")
    return 0


def _train(model: Step3p5ForCausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """The steps; returns the curves of loss and accuracy."""
    trainer = Trainer(model, args.steps, args.learning_rate)
    batches = loader(args.rows, args.seed, args.workers)
    losses: list[dict[str, float]] = []
    accuracies: list[dict[str, Any]] = []
    total, counted, start = (
        0.0 * torch.zeros((), device=model.lm_head.weight.device),
        0,
        time.time(),
    )
    for step in range(1, args.steps + 1):
        total, counted = total + trainer.step(next(batches)), counted + 1
        if step % _REPORT_EVERY == 0 or step == args.steps:
            loss = float(total) / counted
            total, counted = torch.zeros_like(total), 0
            losses.append({"step": step, "seconds": round(time.time() - start, 1), "loss": loss})
            print(f"step {step} of {args.steps}: {losses[-1]}", flush=True)
        if step % args.evaluate_every == 0:
            score = _evaluate(model, args.questions)
            accuracies.append({"step": step, "seconds": round(time.time() - start, 1), **score})
            print(f"held-out: {accuracies[-1]}", flush=True)
    trainer.balance.load.close()
    return {"loss": losses, "accuracy": accuracies, "seconds": round(time.time() - start, 1)}


def _evaluate(model: Step3p5ForCausalLM, count: int) -> dict[str, Any]:
    """Greedy few-shot answers to the first `count` held-out questions."""
    asked = heldout()[:count]
    texts = completions(model, asked)
    is_right = right(asked, texts)
    steps = range(1, MAX_STEPS + 1)
    of_steps = {n: [r for q, r in zip(asked, is_right, strict=True) if q.steps == n] for n in steps}
    return {
        "questions": len(asked),
        "right": sum(is_right),
        "invalid": sum(parse_answer(text) is None for text in texts),
        "accuracy_by_steps": {n: sum(r) / max(1, len(r)) for n, r in of_steps.items()},
    }


def _load(model: Step3p5ForCausalLM, count: int) -> dict[str, Any]:
    """Tokens of the held-out prompts that each expert of each layer gets."""
    counts = load_of(model, prompt_ids(heldout()[:count]))
    return {
        "tokens_per_expert": {layer: found.tolist() for layer, found in counts.items()},
        "max_over_mean": {layer: imbalance(found) for layer, found in counts.items()},
    }


def _place(device: torch.device) -> dict[str, Any]:
    place = look_around(device)
    return {"hardware": describe([place]), "versions": place.versions}


_SETTINGS = (
    "steps",
    "rows",
    "learning_rate",
    "seed",
    "workers",
    "questions",
    "final_questions",
    "evaluate_every",
)


def _shown(args: argparse.Namespace) -> list[str]:
    """The settings that differ from the defaults, as arguments; no path."""
    parser = _parser()
    return [
        word
        for name in _SETTINGS
        if getattr(args, name) != parser.get_default(name)
        for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stepmoe.mini.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="optimiser steps (%(default)s)")
    parser.add_argument(
        "--rows", type=int, default=128, help=f"rows of {ROW_TOKENS} tokens a step (%(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (%(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=4,
        help="processes that draw data; another number gives other data (%(default)s)",
    )
    parser.add_argument(
        "--questions", type=int, default=512, help="held-out, while training (%(default)s)"
    )
    parser.add_argument(
        "--final-questions",
        type=int,
        default=HELDOUT_QUESTIONS,
        help="held-out, at the end (%(default)s: all)",
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=200, help="steps between them (%(default)s)"
    )
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--weights", help="folder to write config.json and model.safetensors to")
    parser.add_argument("--log", help="JSON file to write curves, score and load to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
