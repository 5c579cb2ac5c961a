"""Exercises of notebook 03: which sums can wait for each other, and which cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepmoe.exercises.exercise import Traffic, call, exercise, fresh, require, same
from stepmoe.exercises.wire import run_on_wire
from stepmoe.kernels.norm import gemma_rms_norm
from stepmoe.launch import Ranks

NOTEBOOK = "03_deferred"


@exercise(
    NOTEBOOK,
    lines=3,
    ranks=4,
    hint="Hint: three of the four inputs are partial sums or lead to one, and the residual is "
    "complete. What may be added before the all-reduce, and what must wait until after it?",
)
def moe_block(attempt: Callable[..., Any], ranks: Ranks) -> Traffic:
    """Judges the end of a layer: residual + shared + routed experts, with a single all-reduce."""
    numbers, generator = fresh()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    cases, exact, counted_often = [], [], []
    for tokens, top_k in ((15, 3), (numbers.randint(1, 9), numbers.randint(2, 5))):
        residual, weights = random(tokens, 6), random(tokens, top_k)
        shared, experts = random(4, tokens, 6), random(4, tokens, top_k, 6)
        cases.append([(residual, shared[r], experts[r], weights) for r in range(4)])
        sums = shared.sum(0) + torch.einsum("rtkd,tk->td", experts, weights)
        exact.append(sums + residual)
        counted_often.append(sums + 4 * residual)
    outcomes = run_on_wire(attempt, ranks, cases, ["all_reduce"])
    for outcome, whole, wrong in zip(outcomes, exact, counted_often, strict=True):
        traffic = outcome.traffic(whole)
        require(traffic.collectives > 0, "Nothing was sent: each rank still has its own pieces.")
        for answer in outcome.answers:
            require(
                not same(answer, wrong),
                "The residual is in it four times. It is complete on every rank: added to a "
                "partial sum, it is counted once a rank.",
            )
            require(
                same(answer, whole),
                "Not residual + shared + routed, where shared and the expert outputs are summed "
                "over the ranks and the experts weighted.",
            )
        require(
            traffic.collectives == 1,
            f"Right, with {traffic.collectives} all-reduces. Partial + partial is partial: add the "
            "partial sums first.",
        )
        require(
            traffic.sent < 2,
            "Right, but more than one row a token was sent: weight and add the chosen experts "
            "before the all-reduce.",
        )
    return outcomes[0].traffic(exact[0])


@exercise(
    NOTEBOOK,
    lines=2,
    hint="Hint: a norm keeps a vector's direction and forgets its length. Which two pieces, one "
    "long and one short, have norms that cancel although the pieces do not?",
)
def counterexample(attempt: Callable[..., Any]) -> None:
    """Judges two pieces by whether any factor c makes c (norm(a) + norm(b)) the norm of a + b."""
    numbers, _ = fresh()
    for size in (2, numbers.randint(3, 40)):
        answer = call(attempt, size)
        require(
            isinstance(answer, tuple)
            and len(answer) == 2
            and all(isinstance(piece, Tensor) and piece.shape == (size,) for piece in answer),
            f"Return two tensors of {size} entries, the pieces of two ranks.",
        )
        one, other = (piece.double() for piece in answer)
        total = one + other
        require(
            min(float(x.norm()) for x in (one, other, total)) > 0.1,
            "A piece, or the sum of both, is zero or nearly: the norm of nothing refutes nothing.",
        )
        apart, together = _norm(one) + _norm(other), _norm(total)
        factor = float(apart @ together / apart.square().sum().clamp_min(1e-12))
        error = float((factor * apart - together).norm() / together.norm())
        require(
            error > 0.5,
            f"With c = {factor:.3g} your colleague is right up to {error:.0%}: the pieces point "
            "too much the same way. Turn one of them round.",
        )


def _norm(x: Tensor) -> Tensor:
    return gemma_rms_norm(x, torch.zeros_like(x), eps=1e-12)
