"""Prefill steps of every variant: on a GPU from CUDA graphs, unless the plan is eager.

A serving engine prepares a step while the GPU runs the last one, so its GPU need not wait for the
launches of this library's many small Python calls: a replayed step is the nearer to it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.ledger import note
from stepmoe.generation import StepGraph, can_replay, next_tokens
from stepmoe.measure.rounds import time_call
from stepmoe.measure.workload import Batch, ThroughputPlan
from stepmoe.model.kv_cache import KVCache

PARTLY = (
    "prefill: steps of as many prompts and tokens as the first were replayed from a CUDA graph; "
    "what was left of prompts, a last batch of fewer, and decode steps were launched by the host"
)

# By the tokens in the cache before the step: what a graph was captured with.
Graphs = dict[int, StepGraph]


class Prefills:
    """Runs batches of a workload's prompts, and the decode steps that follow, with each variant.

    Only full steps are replayed, those of as many prompts and tokens as the first: one graph for
    each place in the prompt at which one begins. An uneven last batch, what is left of a prompt
    and the decode steps are launched by the host.

    The variants take turns, so their graphs share one cache, and the memory of what a step computes
    on the way: together they hold no more of it than one step launched by the host.
    """

    def __init__(self, plan: ThroughputPlan, first: Step3p5ForCausalLM) -> None:
        self._plan = plan
        self._cache = self.new_cache(first)
        self._last: StepGraph | None = None
        self._graphs: dict[str, Graphs] = {}

    def new_cache(self, model: Step3p5ForCausalLM) -> KVCache:
        work = self._plan.workload
        return model.new_cache(work.input_len + work.output_len - 1)

    def capture(self, name: str, model: Step3p5ForCausalLM) -> bool:
        """Capture a variant's full steps, where they are to be replayed and can be; whether that
        was so. An open ledger's notes say why they cannot, or what else is not replayed."""
        if self._plan.eager or not can_replay(model, "prefill"):
            return False
        work, batch = self._plan.workload, self._plan.workload.batches[0]
        graphs = self._graphs.setdefault(name, {})
        for start in range(0, work.input_len - batch.length + 1, batch.length):
            self._last = graphs[start] = StepGraph(
                model, batch.prompts, batch.length, self._cache, start, self._last
            )
        if work.batches[-1] != batch or work.input_len % batch.length or work.output_len > 1:
            note(PARTLY)
        return True

    def run(self, name: str, model: Step3p5ForCausalLM, batch: Batch, turn: int) -> list[float]:
        """Seconds of every prefill step of a batch, then of the decode steps that follow."""
        work, group = self._plan.workload, model.comm.group
        device = model.lm_head.weight.device
        parts = prompts_of(self._plan, batch, turn).to(device).split(batch.length, dim=1)
        graphs: Graphs = self._graphs.get(name, {}) if batch == work.batches[0] else {}
        cache, seconds = self._cache if graphs else self.new_cache(model), []
        cache.clear()
        new = parts[-1][:, -1:]

        def run(tokens: Tensor) -> None:
            nonlocal new
            graph = graphs.get(cache.length)
            new = graph.step(tokens) if graph else next_tokens(model, tokens, cache)

        for part in parts:
            seconds.append(time_call(partial(run, part), device, group))
        for _ in range(work.output_len - 1):
            seconds.append(time_call(partial(run, new), device, group))
        return seconds


def prompts_of(plan: ThroughputPlan, batch: Batch, turn: int) -> Tensor:
    """Random prompts (prompts, input_len), on every rank the same, others in every turn."""
    random = torch.Generator().manual_seed(plan.seed + 1000 + turn)
    shape = (batch.prompts, plan.workload.input_len)
    return torch.randint(plan.config.vocab_size, shape, generator=random)
