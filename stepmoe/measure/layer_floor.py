"""One MoE layer's share on one GPU: how long every operation takes, and how near a floor that is.

The floor of an operation is the larger of its operations over the matrix rate and its fewest bytes
over the copy bandwidth, both measured in the same run (operations.py, chip.py). A layer is timed
within a stack, as the difference between a model of several such layers and one of a single layer:
inputs, weights and caches then differ from layer to layer, as in a model, and together exceed the
cache of the GPU. How the time spreads over operations comes from a profile of the same passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.config import Step3p5Config
from stepmoe.measure.flush import Flush, graph_of
from stepmoe.measure.kernel_times import profile_layers
from stepmoe.measure.operations import RANGES, Work, operations, unavoidable_bytes
from stepmoe.parallel import ParallelConfig
from stepmoe.roofline import Chip, SubLayer

VOCAB = 1024  # embedding and head are not measured: small


@dataclass(frozen=True)
class OperationTime:
    """One row: what an operation needs at least, and the seconds of its kernels."""

    needs: SubLayer
    seconds: float

    def ratio(self, chip: Chip) -> float:
        return self.seconds / self.needs.floor(chip)


@dataclass(frozen=True)
class LayerTime:
    """One layer's share in one step.

    Attributes:
        seconds: of a whole layer replayed from a CUDA graph, gaps between kernels included.
        eager_seconds: the same launched by the host, kernel by kernel; None in decoding.
        operations: those that ran as kernels of their own, in the order of the layer.
        other: seconds of the kernels that belong to none of them.
        activation_bytes: most memory a layer held beyond its weights and cache; None in decoding,
            whose memory is small and belongs to a graph.
    """

    work: Work
    phase: str
    seconds: float
    operations: list[OperationTime]
    other: float
    activation_bytes: int | None = None
    eager_seconds: float | None = None

    def floor(self, chip: Chip) -> float:
        """Seconds that the operations take at least, one after the other."""
        return sum(row.needs.floor(chip) for row in self.operations)

    def ratio(self, chip: Chip) -> float:
        return self.seconds / self.floor(chip)

    def memory_ratio(self) -> float | None:
        """Memory held over the buffers that cannot be avoided."""
        held = self.activation_bytes
        return None if held is None else held / unavoidable_bytes(self.work)


class Stack:
    """A model of `depth` equal layers and one of a single one, of one rank of many."""

    def __init__(
        self, config: Step3p5Config, layer: int, parallel: ParallelConfig, variant: str, depth: int
    ) -> None:
        device = torch.device("cuda")
        self.config, self.layer, self.parallel = config, layer, parallel
        self.device, self.depth = device, depth
        self.adds_shared = variant != "three_all_reduces"
        shape = config.replace(vocab_size=VOCAB)
        self.models = [
            Step3p5ForCausalLM.from_config(
                shape.with_layers(*[layer] * count), variant, parallel, torch.bfloat16, device
            )
            for count in (depth, 1)
        ]
        for decoder_layer in self.models[0].model.decoder_layers:
            decoder_layer.moe.router_bias.zero_()  # a trained bias balances; a random one does not
        self.flush = Flush(device)

    def prefill(self, batch: int, length: int) -> LayerTime:
        """All tokens of `batch` sequences at once, without a cache."""
        ids = self._tokens(batch, length)
        runs = [partial(model, ids, last_only=True) for model in self.models]
        eager = self._per_layer(runs)
        held = self._activation_bytes(runs[0], 2 * batch * length * self.config.hidden_size * 2)
        seconds = self._per_layer([graph_of(run) for run in runs])
        result = self._result("prefill", seconds, runs[0], batch, length, length)
        return replace(result, activation_bytes=held, eager_seconds=eager)

    def decode(self, batch: int, context: int) -> LayerTime:
        """One token for each of `batch` sequences, the `context`-th, replayed from a CUDA graph."""
        ids = self._tokens(batch, 1)
        runs, eager = [], []
        for model in self.models:
            eager.append(_decode_step(model, ids, context))
            runs.append(graph_of(eager[-1]))
        seconds = self._per_layer(runs)
        return self._result("decode", seconds, eager[0], batch, 1, context)

    def growth(self, batch: int, steps: int) -> int:
        """Bytes by which the memory in use grows over that many passes of `batch` tokens."""
        ids, model = self._tokens(batch, 1), self.models[0]
        for _ in range(3):
            model(ids, last_only=True)
        before = torch.cuda.memory_allocated(self.device)
        for _ in range(steps):
            model(ids, last_only=True)
        return torch.cuda.memory_allocated(self.device) - before

    def _tokens(self, batch: int, length: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(batch)
        return torch.randint(VOCAB, (batch, length), device=self.device, generator=generator)

    def _per_layer(self, runs: Sequence[Callable[[], object]]) -> float:
        deep, single = (self.flush.median(run) for run in runs)
        return (deep - single) / (self.depth - 1)

    def _result(
        self,
        phase: str,
        seconds: float,
        run: Callable[[], object],
        batch: int,
        length: int,
        context: int,
    ) -> LayerTime:
        work = Work(
            self.config,
            self.layer,
            self.parallel,
            batch,
            length,
            context,
            *self._routed(run),
            adds_shared=self.adds_shared,
        )
        times = profile_layers(self.models[0], run, passes=5)
        rows = []
        for needs in operations(work):
            spent = sum(times.pop(name, 0.0) for name in RANGES[needs.name])
            if spent:
                rows.append(OperationTime(needs, spent))
        return LayerTime(work, phase, seconds, rows, sum(times.values()))

    def _routed(self, run: Callable[[], object]) -> tuple[float, float, float]:
        """Rows, experts and tokens of this rank, the mean over the layers that are measured."""
        chosen: list[Tensor] = []
        layers = self.models[0].model.decoder_layers[1:]
        handles = [
            layer.moe.gate.register_forward_hook(lambda _, __, made: chosen.append(made[0]))
            for layer in layers
        ]
        run()
        for handle in handles:
            handle.remove()
        moe = layers[0].moe
        last = moe.first_expert + len(moe.down_proj.weight)
        here = [(ids >= moe.first_expert) & (ids < last) for ids in chosen]
        rows = [int(mine.sum()) for mine in here]
        experts = [len(ids[mine].unique()) for ids, mine in zip(chosen, here, strict=True)]
        tokens = [int(mine.any(-1).sum()) for mine in here]
        return statistics.mean(rows), statistics.mean(experts), statistics.mean(tokens)

    def _activation_bytes(self, run: Callable[[], object], inputs: int) -> int:
        """Most memory within the second layer, its inputs included (the layer before made them)."""
        layer, at_entry = self.models[0].model.decoder_layers[1], [0, 0]

        def enter(*_: object) -> None:
            at_entry[0] = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

        def leave(*_: object) -> None:
            at_entry[1] = torch.cuda.max_memory_allocated(self.device)

        handles = layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)
        run()
        for handle in handles:
            handle.remove()
        return at_entry[1] - at_entry[0] + inputs


def _decode_step(model: Step3p5ForCausalLM, ids: Tensor, context: int) -> Callable[[], object]:
    """The step that reads ids (B, 1) at position context - 1, after random keys and values."""
    cache = model.new_cache(context)
    model(ids, cache)  # reserves the slots
    for kept in cache.layers:
        for tensor in (kept.keys, kept.values):
            if tensor is not None:
                tensor.normal_()

    def step() -> object:
        cache.length = context - 1
        cache.position.fill_(context - 1)
        return model(ids, cache, last_only=True)

    return step
