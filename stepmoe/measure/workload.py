"""What a throughput measurement runs: prompts, cut into steps of so many tokens, and new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from stepmoe.checks import check_alignment, check_quantization, whole_number
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.fp8 import Quantization
from stepmoe.measure.source import Source, config_of
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import DecoderLayer, layer_class

Routing = Literal["uniform", "skewed"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(frozen=True)
class Batch:
    """Prompts that are prefilled together, `length` tokens of each in a step; the last may be
    shorter."""

    prompts: int
    length: int


@dataclass(frozen=True)
class Workload:
    """Prompts of equal length, and what is asked of them.

    Attributes:
        input_len, output_len: tokens of a prompt, and new ones; the first comes with the prefill.
        prompts: how many.
        chunk: most tokens of a prefill step. Several prompts share a step that has room for them; a
            longer one is cut, its earlier tokens then lie in the cache.
        warmup: batches before them that are not timed.
        decode: batch sizes at which decode steps are timed apart, each sequence after `context`
            tokens; decode_steps of each. 100, like the steps of 200 prompts, because with fewer
            rounds variants that are equal too often seem different (measure.speedup.gain).
    """

    input_len: int = 8192
    output_len: int = 1
    prompts: int = 200
    chunk: int = 16384
    warmup: int = 1
    decode: tuple[int, ...] = ()
    context: int = 4096
    decode_steps: int = 100

    def __post_init__(self) -> None:
        for name in (
            "input_len",
            "output_len",
            "prompts",
            "chunk",
            "warmup",
            "context",
            "decode_steps",
        ):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        batches = tuple(whole_number("a batch size of decode", size) for size in self.decode)
        object.__setattr__(self, "decode", batches)

    @property
    def batches(self) -> list[Batch]:
        """The prompts in the order they are run."""
        together = max(1, self.chunk // self.input_len)
        length = min(self.chunk, self.input_len)
        whole, rest = divmod(self.prompts, together)
        return [Batch(together, length)] * whole + ([Batch(rest, length)] if rest else [])

    @property
    def longest(self) -> int:
        """Most positions that a sequence takes."""
        decoded = self.context + self.decode_steps + 1 if self.decode else 0
        return max(self.input_len + self.output_len - 1, decoded)


@dataclass(frozen=True)
class ThroughputPlan:
    """Everything a rank needs to know. Made by `ThroughputPlan.of`, which checks it.

    Attributes:
        routing: None with a checkpoint, whose router is kept as it is.
        eager: let the host launch every step, also where CUDA graphs could be replayed.
    """

    source: Source
    config: Step3p5Config
    variants: dict[str, type[DecoderLayer]]
    workload: Workload
    parallel: ParallelConfig
    dtype: torch.dtype
    routing: Routing | None
    layers: tuple[int, ...] | None
    seed: int
    quantization: Quantization = None
    eager: bool = False

    @classmethod
    def of(
        cls,
        source: Source,
        variants: Sequence[str],
        workload: Workload,
        parallel: ParallelConfig,
        dtype: torch.dtype | None,
        routing: Routing | None,
        layers: tuple[int, ...] | None,
        seed: int,
        quantization: Quantization = None,
        eager: bool = False,
    ) -> ThroughputPlan:
        """Raise ConfigError, naming the value, for what cannot be run; starts nothing."""
        config = config_of(source, layers)
        quantization = check_quantization(quantization)
        dtype = dtype or getattr(torch, config.torch_dtype)
        parallel.check(config)
        check_alignment(config, parallel, dtype)
        if isinstance(source, Step3p5Config):
            routing = routing or "uniform"
        elif routing is not None:
            raise ConfigError(
                f"routing={routing!r} is for random weights: a checkpoint has its own"
            )
        if routing not in (None, *ROUTINGS):
            raise ConfigError(f"routing={routing!r}: use one of {', '.join(map(repr, ROUTINGS))}")
        if not variants or len(set(variants)) < len(variants):
            raise ConfigError(f"variants={list(variants)!r}: give at least one, and none twice")
        if workload.longest > config.max_position_embeddings:
            raise ConfigError(
                f"a sequence of {workload.longest} tokens exceeds max_position_embeddings = "
                f"{config.max_position_embeddings}: choose a shorter input, output or context"
            )
        seed = whole_number("seed", seed, least=0)
        named = {name: layer_class(name) for name in variants}
        return cls(
            source,
            config,
            named,
            workload,
            parallel,
            dtype,
            routing,
            layers,
            seed,
            quantization,
            eager,
        )

    def order(self, turn: int) -> list[str]:
        """The variants in the order of batch number `turn`: A B C D, then B C D A, ..."""
        names = list(self.variants)
        first = turn % len(names)
        return names[first:] + names[:first]
