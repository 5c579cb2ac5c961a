"""What is to be measured: the arguments, checked, and the steps they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from stepmoe.checks import check_alignment, whole_number
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import DecoderLayer, layer_class

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
BASELINE = "three_all_reduces"

#: Tokens of each sequence that a decode step finds in the cache.
CONTEXT = 16

#: The fewest rounds whose median has a 95 % interval: it lies outside the extremes of n rounds once
#: in 2^(n-1), and 1/16 is more than 5 %, 1/32 is not.
FEWEST_ROUNDS = 6


@dataclass(frozen=True)
class Case:
    """One kind of step: `tokens` new tokens, as (batch, length), after `context` cached ones."""

    phase: Phase
    tokens: int
    batch: int
    length: int
    context: int

    @classmethod
    def of(cls, phase: Phase, tokens: int, parallel: ParallelConfig) -> Case:
        """Prefill: one sequence, or under attention="dp" as many equal ones as the ranks can share.

        Decode: one new token for each of `tokens` sequences.
        """
        if phase == "decode":
            return cls(phase, tokens, tokens, 1, CONTEXT)
        batch = math.gcd(tokens, parallel.tp) if parallel.attention == "dp" else 1
        return cls(phase, tokens, batch, tokens // batch, 0)


@dataclass(frozen=True)
class Plan:
    """Everything a rank needs to know. Made by `Plan.of`, which checks it.

    Attributes:
        variants: name to what `Step3p5ForCausalLM` takes as variant, in the order given.
    """

    config: Step3p5Config
    variants: dict[str, type[DecoderLayer]]
    cases: tuple[Case, ...]
    parallel: ParallelConfig
    repeats: int
    warmup: int
    dtype: torch.dtype
    seed: int

    @classmethod
    def of(
        cls,
        config: Step3p5Config,
        variants: Sequence[str | type[DecoderLayer]],
        tokens: Iterable[int],
        parallel: ParallelConfig,
        phases: Sequence[str],
        repeats: int,
        warmup: int,
        dtype: torch.dtype | None,
        seed: int,
    ) -> Plan:
        """Raise ConfigError, naming the value, for what cannot be measured; starts nothing."""
        dtype = dtype or getattr(torch, config.torch_dtype)
        parallel.check(config)
        check_alignment(config, parallel, dtype)
        repeats = whole_number("repeats", repeats, FEWEST_ROUNDS)
        warmup = whole_number("warmup", warmup)
        seed = whole_number("seed", seed, least=0)
        cases = tuple(
            Case.of(phase, count, parallel)
            for phase in _phases(phases)
            for count in _tokens(tokens, config, phases)
        )
        return cls(config, named_layers(variants), cases, parallel, repeats, warmup, dtype, seed)

    def order(self, turn: int) -> list[str]:
        """The variants in the order of round number `turn`: A B C D, then B C D A, ..."""
        names = list(self.variants)
        first = turn % len(names)
        return names[first:] + names[:first]


def named_layers(
    given: Sequence[str | type[DecoderLayer]],
) -> dict[str, type[DecoderLayer]]:
    """Variants by name; ConfigError for none, an unknown one, or two of one name."""
    if isinstance(given, (str, type)):
        raise ConfigError(f"variants={given!r}: give a list, [{given!r}]")
    named = {v if isinstance(v, str) else v.__name__: layer_class(v) for v in given}
    if not named:
        raise ConfigError("variants is empty: give at least one of sm.VARIANTS")
    if len(named) < len(given):
        raise ConfigError(f"variants={list(given)!r}: two of them have the same name")
    return named


def _phases(given: Sequence[str]) -> list[Phase]:
    if isinstance(given, str) or not given or set(given) - set(PHASES):
        raise ConfigError(f"phases={given!r}: give a list of {' and '.join(map(repr, PHASES))}")
    return [phase for phase in PHASES if phase in given]


def _tokens(given: Iterable[int], config: Step3p5Config, phases: Sequence[str]) -> list[int]:
    if not isinstance(given, Iterable) or not (tokens := list(given)):
        raise ConfigError(f"tokens={given!r}: give a list of token counts, [1, 64, 1024]")
    tokens = [whole_number("a token count", count) for count in tokens]
    longest = config.max_position_embeddings
    if "prefill" in phases and max(tokens) > longest:
        raise ConfigError(
            f"tokens: a prefill of {max(tokens)} exceeds max_position_embeddings = {longest}"
        )
    if "decode" in phases and longest <= CONTEXT:
        raise ConfigError(
            f"a decode step needs {CONTEXT} cached tokens and a new one, and "
            f"max_position_embeddings is {longest}"
        )
    return sorted(set(tokens))
