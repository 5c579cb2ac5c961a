"""Greedy decoding: the prompt in one pass, then a token a step, on a GPU by replaying a CUDA graph.

A decode step is some hundred small kernels, and to launch them one by one takes the host longer
than the GPU needs to run them. A CUDA graph launches all of them at once. It replays the same
kernels on the same memory, so tokens, cache slots and the position stay in place, on the device.
Measurements replay prefill steps as well (`StepGraph`): a large one, too, can be over sooner than
the host has launched it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepmoe.comm.graphs import capture
from stepmoe.comm.groups import backend_for
from stepmoe.comm.ledger import Entry, note, record, repeat, untimed
from stepmoe.errors import ConfigError
from stepmoe.kernels.dispatch import takes_kernel
from stepmoe.model.kv_cache import KVCache

if TYPE_CHECKING:
    from stepmoe.causal_lm import Step3p5ForCausalLM

REPLAYED = (
    "{phase} steps were replayed from a CUDA graph: their collectives are listed with 0 seconds, "
    "and the time of a whole step is that of the local step {op}"
)


def generate(model: Step3p5ForCausalLM, input_ids: Tensor, max_new_tokens: int) -> Tensor:
    """See Step3p5ForCausalLM.generate."""
    batch, length = input_ids.shape
    eos = torch.tensor(model.config.eos_token_ids, device=input_ids.device, dtype=torch.int64)
    ended = torch.zeros(batch, 1, dtype=torch.bool, device=input_ids.device)
    tokens = input_ids.new_empty(batch, length + max_new_tokens)
    tokens[:, :length] = input_ids
    graph = graph_for(model, batch, length + max_new_tokens)
    cache = graph.cache if graph else model.new_cache(length + max_new_tokens)
    new = next_tokens(model, input_ids, cache)
    for end in range(length, length + max_new_tokens):
        if end > length:
            new = graph.step(new) if graph else next_tokens(model, new, cache)
        if len(eos):
            new = torch.where(ended, tokens[:, end - 1 : end], new)
            ended |= torch.isin(new, eos)
        tokens[:, end : end + 1] = new
        if len(eos) and bool(ended.all()):
            return tokens[:, : end + 1]
    return tokens


def next_tokens(model: Step3p5ForCausalLM, tokens: Tensor, cache: KVCache) -> Tensor:
    """The likeliest next token of each sequence: (batch, L) new tokens to (batch, 1)."""
    return model(tokens, cache, last_only=True).argmax(-1)


class StepGraph:
    """One step of a model, captured once; `step` replays it with other tokens.

    How many tokens are in the cache before a step of several is a number that the host hands to its
    kernels. So it is captured with them, and the graph is good for steps after that many only. A
    single token's kernels read the position on the device: such a step can be anywhere.

    Attributes:
        batch, length: sequences, and new tokens of each.
        cache: what it reads and writes, with its slots where they were at the capture.
        start: tokens of each sequence that are in the cache before the step; None for any number.
    """

    op, remark = "prefill_graph", REPLAYED.format(phase="prefill", op="prefill_graph")

    def __init__(
        self,
        model: Step3p5ForCausalLM,
        batch: int,
        length: int,
        cache: KVCache,
        start: int | None,
        beside: StepGraph | None = None,
    ) -> None:
        """Capture the step; the cache is empty afterwards.

        Args:
            beside: a graph that is never replayed at the same time; what both compute on the way
                then takes the same memory.
        """
        device = model.lm_head.weight.device
        self.batch, self.length, self.cache, self.start = batch, length, cache, start
        self._tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
        # Kernels are compiled, slots reserved and libraries set up in ordinary steps, on a stream
        # of their own as torch asks of what comes before a capture.
        stream = _stream_before_captures(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with untimed() as self._captured, torch.cuda.stream(stream):
            for _ in range(2):
                cache.move_to(start or 0)
                next_tokens(model, self._tokens, cache)
            cache.move_to(start or 0)
            self._captured.steps.clear()
            pool = beside._graph.pool() if beside else None
            with capture(pool) as graph:
                self._next = next_tokens(model, self._tokens, cache)
        self._graph: torch.cuda.CUDAGraph = graph
        torch.cuda.current_stream(device).wait_stream(stream)
        cache.clear()

    def step(self, tokens: Tensor) -> Tensor:
        """New tokens (batch, length) int64 of each sequence in, the next one (batch, 1) out.

        Raises:
            ConfigError: the cache holds another number of tokens than at the capture, or the tokens
                are of another shape.
        """
        if tokens.shape != self._tokens.shape or self.start not in (None, self.cache.length):
            raise ConfigError(
                f"a graph of {self.batch} x {self.length} tokens after {self.start} cached ones "
                f"cannot be replayed with {' x '.join(map(str, tokens.shape))} after "
                f"{self.cache.length}: call the model"
            )
        self._tokens.copy_(tokens)
        with record(Entry(self.op, "local", None), tokens.device):
            self._graph.replay()
        self.cache.length += self.length
        repeat(self._captured)
        note(self.remark)
        return self._next.clone()


class DecodeGraph(StepGraph):
    """One decode step of `batch` sequences.

    Attributes:
        cache: prefill it, and clear it before the next prompt.
        capacity: tokens of a sequence that the cache holds; a graph cannot make it grow.
    """

    op, remark = "decode_graph", REPLAYED.format(phase="decode", op="decode_graph")

    def __init__(
        self, model: Step3p5ForCausalLM, batch: int, capacity: int, cache: KVCache | None = None
    ) -> None:
        self.capacity = capacity
        cache = model.new_cache(capacity) if cache is None else cache
        super().__init__(model, batch, 1, cache, start=None)


@functools.cache
def _stream_before_captures(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: every stream that multiplies matrices keeps memory for that."""
    return torch.cuda.Stream(device)


def graph_for(
    model: Step3p5ForCausalLM, batch: int, capacity: int, cache: KVCache | None = None
) -> DecodeGraph | None:
    """The model's decode graph with an empty cache; None where decode steps run one by one.

    The model keeps one: another batch size, or more tokens than it has slots for, replace it.

    Args:
        cache: the one to read and write, of this batch and capacity, where models that take turns
            share it; None for one of its own.
    """
    if not can_replay(model, "decode"):
        return None
    kept = model.decode_graph
    fits = kept is not None and kept.batch == batch and kept.capacity >= capacity
    if kept is None or not fits or cache not in (None, kept.cache):
        model.decode_graph = None  # free its memory first
        model.decode_graph = kept = DecodeGraph(model, batch, capacity, cache)
    kept.cache.clear()
    return kept


def can_replay(model: Step3p5ForCausalLM, phase: str) -> bool:
    """Whether the model's "decode" or "prefill" steps can be replayed from a CUDA graph. Where they
    are on a GPU and cannot, an open ledger's notes say why."""
    if not model.lm_head.weight.is_cuda:
        return False
    if reason := _why_not(model):
        note(f"{phase} steps ran without a CUDA graph: {reason}")
    return not reason


def _why_not(model: Step3p5ForCausalLM) -> str:
    """What keeps a step of this model from being captured; empty if nothing does."""
    group, weight = model.comm.group, model.lm_head.weight
    if not takes_kernel(weight):
        return "it needs kernels that only Triton in float32, bfloat16 or float16 provides"
    if model.config.moe_layers and weight.dtype is not torch.bfloat16:
        return f"the experts' grouped products wait for the host in {weight.dtype}, not in bfloat16"
    if group.process_group is not None:
        backend = backend_for(weight.device, group.process_group)
        if backend != "nccl":
            return f"the ranks of {group} communicate over {backend}, which copies through the host"
    return ""
