"""What each rank does to answer questions, and where its time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.groups import meet
from stepmoe.comm.ledger import Ledger
from stepmoe.launch import progress, rank_device
from stepmoe.measure.environment import Place, look_around
from stepmoe.measure.source import Source, load
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import DecoderLayer

BATCH_SIZE = 128


@dataclass(frozen=True)
class Answers:
    """One rank's run. `completions` (questions, max_new_tokens) int64 on the CPU."""

    completions: Tensor
    seconds: float
    place: Place


def answer(
    model: Step3p5ForCausalLM,
    prompts: Tensor,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    desc: str = "",
) -> Tensor:
    """What a model adds to each prompt: greedy, in batches, with a progress bar.

    Runs inside a rank; every rank of the model calls it with the same.

    Args:
        prompts: (questions, length) int64.
        desc: shown before the bar.

    Returns:
        (questions, max_new_tokens) int64 on the CPU, filled up with the end of sequence.
    """
    length, fill = prompts.shape[1], (*model.config.eos_token_ids, 0)[0]
    found = []
    for batch in progress(prompts.split(batch_size), desc=desc):
        new = model.generate(batch, max_new_tokens)[:, length:].cpu()
        found.append(F.pad(new, (0, max_new_tokens - new.shape[1]), value=fill))
    return torch.cat(found)


def answer_here(
    setting: tuple[Source, type[DecoderLayer], ParallelConfig, torch.dtype],
    asked: tuple[Tensor, int, int, str],
) -> Answers:
    """In a rank: build, answer, time."""
    model = load(*setting)
    device = rank_device()
    meet(model.comm.group, device)
    start = time.perf_counter()
    completions = answer(model, *asked)
    return Answers(completions, time.perf_counter() - start, look_around(device))


@dataclass(frozen=True)
class Spent:
    """Seconds that one rank took for one batch of questions; waiting counts as collectives."""

    prefill: float
    prefill_collectives: float
    decode: float
    decode_collectives: float
    steps: int

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill:.2f} s ({self.prefill_collectives:.2f} in collectives), "
            f"{self.steps} decode steps {self.decode:.2f} s ({self.decode_collectives:.2f})"
        )


def where_time_goes(
    source: Source,
    variant: str | type[DecoderLayer],
    parallel: ParallelConfig,
    prompts: Tensor,
    max_new_tokens: int,
) -> Spent:
    """Split the time of one batch between prompts and new tokens, computing and collectives.

    Runs inside a rank, with a ledger open, which costs some time itself.

    Args:
        prompts: (batch, length) int64.
    """
    model = load(source, variant, parallel)
    device = rank_device()
    model.generate(prompts[:1], 2)  # the first pass of a model is slower than the rest
    ends: list[float] = []

    def on_end_of_pass(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter() - start)

    hook = model.register_forward_hook(on_end_of_pass)
    meet(model.comm.group, device)
    with Ledger() as ledger:
        start = time.perf_counter()
        tokens = model.generate(prompts, max_new_tokens)
    total, prefill = time.perf_counter() - start, ends[0]
    hook.remove()
    collectives = [entry for entry in ledger.entries if entry.kind == "collective"]
    before = sum(entry.seconds for entry in collectives if entry.start < prefill)
    return Spent(
        prefill=prefill,
        prefill_collectives=before,
        decode=total - prefill,
        decode_collectives=sum(entry.seconds for entry in collectives) - before,
        steps=tokens.shape[1] - prompts.shape[1] - 1,
    )
