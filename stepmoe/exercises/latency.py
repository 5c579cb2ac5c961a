"""Exercises of notebook 06: constants from two measurements, a roofline, where fusing pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stepmoe.comm.cost import LINKS
from stepmoe.exercises.exercise import call, exercise, fresh, require
from stepmoe.roofline import Chip

NOTEBOOK = "06_latency"


@exercise(
    NOTEBOOK,
    lines=5,
    hint="Hint: two measurements, two unknowns. Write the time of a ring all-reduce of S bytes as "
    "a straight line in S; what are its slope and its start, in latency and bandwidth?",
)
def fit_link(attempt: Callable[..., Any]) -> None:
    """Judges latency and bandwidth by the ones from which the two times were made."""
    numbers, _ = fresh()
    for ranks in (2, 8, numbers.randint(3, 16)):
        latency, bandwidth = numbers.uniform(1e-6, 1e-4), numbers.uniform(1e9, 1e12)
        sizes = numbers.randint(1, 9) * 2**20, numbers.randint(20, 200) * 2**20
        steps, share = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
        first, second = ((size, steps * latency + share * size / bandwidth) for size in sizes)
        answer = call(attempt, first, second, ranks)
        require(
            isinstance(answer, tuple) and len(answer) == 2,
            f"Return latency and bandwidth, not {answer!r}.",
        )
        on = f"On {ranks} ranks: "
        require(
            not _near(answer[0], steps * latency),
            f"{on}that is the latency of the whole call. A ring has 2 (n - 1) steps, and the "
            "latency is of one.",
        )
        require(
            _near(answer[0], latency),
            f"{on}the line starts at 2 (n - 1) latencies, {steps * latency:.3g} s; you say a "
            f"latency is {answer[0]:.3g} s.",
        )
        require(
            share == 1 or not _near(answer[1], bandwidth / share),
            f"{on}that divides the tensor's bytes by the time. A rank sends 2 (n - 1)/n of them.",
        )
        require(
            _near(answer[1], bandwidth),
            f"{on}the times were made with {bandwidth:.3g} bytes/s, you find {answer[1]:.3g}.",
        )


def _near(value: float, expected: float) -> bool:
    """Within a millionth: differences of float64 times lose a few of their 16 digits."""
    return abs(value - expected) <= 1e-6 * expected


@exercise(
    NOTEBOOK,
    lines=6,
    hint="Hint: for T tokens, how many operations are the three products with gate, up and down? "
    "Which bytes are read or written once: the weights, and what else?",
)
def first_compute_bound(attempt: Callable[..., Any]) -> None:
    """Judges the smallest number of tokens for which a SwiGLU MLP is limited by arithmetic.

    The chips are made up around the answer: an intensity between that of one token fewer and that
    of the answer.
    """
    numbers, _ = fresh()
    for tokens in (1, numbers.randint(50, 90), numbers.randint(100, 1500), None):
        hidden, size = 64 * numbers.randint(8, 64), 32 * numbers.randint(20, 64)
        if tokens is None:
            balance = 1.5 * size * 1.01  # more than any number of tokens reaches
        else:
            # Not halfway, where for one token some mistakes land exactly on a whole number.
            balance = 0.6 * _intensity(tokens - 1, size) + 0.4 * _intensity(tokens, size)
        bandwidth = numbers.uniform(1e12, 5e12)
        chip = Chip("made up", balance * bandwidth, bandwidth, "this exercise")
        answer = call(attempt, hidden, size, chip)
        where = f"size {size}, {balance:.1f} operations a byte: you say {answer}, it is {tokens}. "
        for mistake, hint in (
            ({"operations": 1}, "A multiply and an add are two operations."),
            ({"rows": 0}, "What goes in and what comes out has to be moved as well."),
            ({"matrices": 1}, "There are three matrices, gate, up and down."),
        ):
            wrong = _first(balance, size, **mistake)
            require(answer in (tokens, None) or answer != wrong, where + hint)
        require(
            tokens is not None or answer is None,
            f"{where}With more tokens the intensity comes ever nearer to 1.5 x size and never "
            "reaches it.",
        )
        require(answer == tokens, where)


def _intensity(tokens: int, size: int) -> float:
    """Operations a byte in bf16: 6 T h f over 2 (3 h f + 2 T h); the hidden size h cancels."""
    return 3 * tokens * size / (3 * size + 2 * tokens)


def _first(
    balance: float, size: int, operations: int = 2, matrices: int = 3, rows: int = 2
) -> int | None:
    """The first token count above the balance, for numbers of each that may be mistaken."""
    gain = operations * matrices * size / 2 - balance * rows
    return int(balance * matrices * size / gain) + 1 if gain > 0 else None


@exercise(
    NOTEBOOK,
    lines=10,
    hint="Hint: collective_time(operation, nbytes, ranks, link, algorithm) gives either "
    "all-reduce. Add launches, and bytes over the memory's bandwidth, and try one token, two, ...",
)
def first_that_pays(attempt: Callable[..., Any]) -> None:
    """Judges the smallest number of tokens for which the fused kernel is the faster one.

    The time it needs to begin is chosen around the answer: between what fusing saves for one token
    fewer and what it saves for the answer.
    """
    numbers, _ = fresh()
    gate, launch, memory = 2048, 2e-6, 3.02e12
    for tokens in (1, numbers.randint(3, 60), numbers.randint(100, gate - 1), gate + 10):
        ranks, hidden = numbers.choice([4, 8, 16]), 512 * numbers.randint(4, 16)
        link = replace(LINKS["nvlink4"], latency=numbers.uniform(0.5e-6, 4e-6))
        # Saved: two launches, all but two of the ring's steps, three of five passes over memory.
        pass_of_one = hidden * 2 / memory
        start = 2 * launch + 2 * (ranks - 2) * link.latency + 3 * pass_of_one * (tokens - 0.5)
        right = tokens if tokens <= gate else None
        answer = call(attempt, hidden, ranks, link, memory, launch, start, gate)
        where = f"hidden {hidden}, {ranks} ranks, {start * 1e6:.2f} µs to begin: "
        require(
            answer != tokens - 1 or tokens == 1,
            f"{where}for {answer} tokens the fused kernel is still the slower one.",
        )
        require(
            right is not None or answer != tokens,
            f"{where}it would pay from {tokens} tokens on, but the gate ends at {gate}: None.",
        )
        require(
            answer != 1 or right == 1,
            f"{where}you say that fusing pays at once. The fused kernel has to begin, too.",
        )
        require(
            answer is not None or right is None,
            f"{where}you say never; fusing saves 3 of 5 passes over memory, more for every token.",
        )
        require(answer == right, f"{where}you say {answer}, it is {right}.")
