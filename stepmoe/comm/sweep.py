"""The layer's predicted time over many numbers of tokens, and which variant is fastest where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepmoe.comm.layer_cost import LayerTime, Machine, layer_time


@dataclass(frozen=True)
class Span:
    """Numbers of tokens in a row for which the same variants are predicted fastest."""

    variants: tuple[str, ...]  # several where they are equal
    first: int
    last: int


def fastest(by_variant: dict[str, Sequence[LayerTime]]) -> list[Span]:
    """Which variant is predicted fastest where, over tokens that all variants have in common."""
    spans: list[Span] = []
    for times in zip(*by_variant.values(), strict=True):
        best = min(time.seconds for time in times)
        # Equal within rounding: the same steps in another order.
        winners = tuple(time.variant for time in times if time.seconds <= best * (1 + 1e-9))
        tokens = times[0].tokens
        if spans and spans[-1].variants == winners:
            spans[-1] = Span(winners, spans[-1].first, tokens)
        else:
            spans.append(Span(winners, tokens, tokens))
    return spans


def sweep(
    tokens: Iterable[int],
    hidden: int,
    tp: int,
    dtype_bytes: int = 2,
    machine: Machine | None = None,
    attention: str = "tp",
    variants: Sequence[str] = ("three_all_reduces", "deferred", "fused", "reduce_scatter"),
) -> dict[str, Sequence[LayerTime]]:
    """`layer_time` of every variant for every number of tokens."""
    numbers = list(tokens)
    return {
        variant: [
            layer_time(variant, number, hidden, tp, dtype_bytes, machine, attention)
            for number in numbers
        ]
        for variant in variants
    }
