"""Decode steps of every variant, in turn: on a GPU from CUDA graphs, unless the plan is eager."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.ledger import Ledger
from stepmoe.generation import DecodeGraph, graph_for, next_tokens
from stepmoe.measure.replays import split_replays
from stepmoe.measure.rounds import split_call, time_call
from stepmoe.measure.stand_ins import stand_in_seconds
from stepmoe.measure.step_times import SPLITS, StepTimes
from stepmoe.measure.workload import ThroughputPlan
from stepmoe.model.kv_cache import KVCache


def decode_in_turn(
    models: dict[str, Step3p5ForCausalLM], plan: ThroughputPlan, batch: int
) -> dict[str, StepTimes]:
    """One new token of `batch` sequences after `context` tokens, `decode_steps` times.

    In a round every variant takes the same step, each on a new position from round to round. They
    share one cache, or four would not fit beside the weights; its keys and values are random
    numbers, because what they are does not matter for the time.
    """
    work, first = plan.workload, next(iter(models.values()))
    device, group = first.lm_head.weight.device, first.comm.group
    capacity = work.context + work.decode_steps + 1
    cache = first.new_cache(capacity)
    # Equal tokens would choose equal experts, and the weights of few would be read.
    random = torch.Generator().manual_seed(plan.seed + 2000)
    tokens = torch.randint(plan.config.vocab_size, (batch, 1), generator=random).to(device)
    kinds: dict[str, StepTimes] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        graph = None if plan.eager else graph_for(model, batch, capacity, cache)
        runs[name] = partial(_step, model, graph, cache, tokens)
        kinds[name] = StepTimes("decode", batch, 1, work.context, is_graph=graph is not None)
        cache.clear()
        with Ledger() as ledger:  # the first step reserves the cache's slots
            runs[name]()
        kinds[name].note(ledger)
        kinds[name].stand_in = stand_in_seconds(ledger, model.comm.group, device)
    _fill(cache, plan.seed)
    for number in range(work.decode_steps):
        for name in plan.order(number):
            cache.move_to(work.context + number)
            kinds[name].seconds.append(time_call(runs[name], device, group))
    for name, steps in kinds.items():
        if steps.is_graph:
            move = partial(cache.move_to, work.context)
            steps.splits, steps.remark = split_replays(
                runs[name], move, device, group, SPLITS, sum(steps.counts.values())
            )
            continue
        for _ in range(SPLITS):
            cache.move_to(work.context)
            steps.splits.append(split_call(runs[name], device, group)[0])
    for model in models.values():
        model.decode_graph = None  # the next batch needs its memory
    return kinds


def _step(
    model: Step3p5ForCausalLM, graph: DecodeGraph | None, cache: KVCache, tokens: Tensor
) -> object:
    return graph.step(tokens) if graph else next_tokens(model, tokens, cache)


def _fill(cache: KVCache, seed: int) -> None:
    """Random numbers in all slots, which are reserved."""
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            if kept is not None:
                random = torch.Generator(kept.device).manual_seed(seed)
                kept.normal_(generator=random)
