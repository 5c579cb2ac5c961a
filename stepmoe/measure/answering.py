"""What each rank does to answer questions."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.groups import meet
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
        (questions, max_new_tokens) int64 on the CPU, filled up with the token that ended it.
    """
    length, found = prompts.shape[1], []
    for batch in progress(prompts.split(batch_size), desc=desc):
        new = model.generate(batch, max_new_tokens)[:, length:].cpu()
        # A batch stops early when all its sequences have ended: its last column holds their ends.
        found.append(torch.cat((new, new[:, -1:].expand(-1, max_new_tokens - new.shape[1])), dim=1))
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
