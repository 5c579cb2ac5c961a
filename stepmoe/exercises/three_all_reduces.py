"""Exercises of notebook 02: what sums cost, predicted and placed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stepmoe.config import Step3p5Config
from stepmoe.exercises.exercise import Traffic, call, call_on, exercise, fresh, require, same
from stepmoe.exercises.wire import run_on_wire
from stepmoe.launch import Ranks
from stepmoe.lesson import forward_pass
from stepmoe.parallel import ParallelConfig

NOTEBOOK = "02_three_all_reduces"


@exercise(
    NOTEBOOK,
    lines=5,
    ranks=4,
    hint="Hint: count first. Which layers have three all-reduces, and how many have the others? "
    "All of them carry the same tensor.",
)
def predict_ledger(attempt: Callable[..., Any], ranks: Ranks) -> None:
    """Judges a prediction by the ledger of a model that really ran, of a random shape."""
    numbers, generator = fresh()
    for tp in (4, 2):  # at 4 the usual mistakes differ in their factors, at 2 some do not
        moe_layers = tuple(sorted(numbers.sample(range(5), numbers.randint(1, 4))))
        shape = Step3p5Config.tiny().replace(
            moe_layers=moe_layers, hidden_size=32 * numbers.randint(1, 3)
        )
        batch, length = numbers.randint(2, 3), numbers.randint(3, 9)
        answer = call(attempt, shape, tp, batch * length)
        require(
            isinstance(answer, tuple) and len(answer) == 2,
            f"Return two numbers, all-reduces and bytes, not {answer!r}.",
        )
        ids = torch.randint(shape.vocab_size, (batch, length), generator=generator)
        parallel = ParallelConfig(tp)
        passes = call_on(ranks, forward_pass, "three_all_reduces", parallel, ids, shape)
        ledger = passes[0].ledger
        _compare(answer, len(ledger.entries), ledger.bytes_sent(), tp, shape)


def _compare(
    answer: tuple[float, float], count: int, sent: float, tp: int, shape: Step3p5Config
) -> None:
    layers, moe = shape.num_hidden_layers, len(shape.moe_layers)
    what = f"{layers} layers, {moe} of them with experts"
    require(
        answer[0] == count,
        f"{what}: the ledger counts {count} all-reduces, you predict {answer[0]}. A layer with "
        "experts has three, a dense one has attention and one MLP.",
    )
    ratio = answer[1] / sent
    usual = {
        tp / (tp - 1): "A rank need not send the share that it sums itself: (n - 1)/n are left.",
        0.5: "Half of it: an all-reduce goes round the ring twice, to add and to hand out.",
        tp: "That is what all ranks send together; the ledger is of one.",
        1 / count: "That is a single all-reduce.",
        tp / (tp - 1) / 2: "An all-reduce sends 2 (n - 1)/n of its tensor, not the tensor once.",
    }
    for factor, hint in usual.items():
        require(
            factor == 1 or abs(ratio - factor) > 1e-9,
            f"{what}: your bytes are {ratio:.3g} x those of the ledger. {hint}",
        )
    require(
        abs(ratio - 1) < 1e-9,
        f"{what}, tp={tp}: the ledger has {sent:,.0f} bytes, you predict {answer[1]:,.0f}. The "
        "tensor is tokens x hidden_size, 4 bytes an entry, whatever the sub-layer's inner size.",
    )


@exercise(
    NOTEBOOK,
    lines=2,
    ranks=4,
    hint="Hint: weighting and adding the chosen experts are linear. Do they need complete values, "
    "or can they come before the sum over ranks?",
)
def routed_block(attempt: Callable[..., Any], ranks: Ranks) -> Traffic:
    """Judges where the routed experts' sum is completed: once, and after the top-k sum."""
    numbers, generator = fresh()
    cases, exact = [], []
    for tokens, top_k in ((15, 3), (numbers.randint(1, 9), numbers.randint(2, 5))):
        weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
        shape = (4, tokens, top_k, 6)
        pieces = torch.randn(shape, generator=generator, dtype=torch.float64)
        cases.append([(piece, weights) for piece in pieces])
        exact.append(torch.einsum("rtkd,tk->td", pieces, weights))
    outcomes = run_on_wire(attempt, ranks, cases, ["all_reduce"])
    for outcome, case, whole in zip(outcomes, cases, exact, strict=True):
        traffic, top_k = outcome.traffic(whole), case[0][1].shape[1]
        require(
            traffic.collectives > 0,
            "Nothing was sent: what a rank returns is its own piece of the sum.",
        )
        for answer in outcome.answers:
            require(
                same(answer, whole),
                "Not the routed output. For each token it is the sum over its top-k experts of "
                "weight x expert output, a (T, D) tensor, summed over the ranks.",
            )
        require(
            traffic.collectives == 1,
            f"Right, with {traffic.collectives} all-reduces. Sums do not mind their order: one is "
            "enough.",
        )
        require(
            traffic.sent < 2,
            f"Right, but it sends {top_k} x the bytes: the tensor before the top-k sum has "
            f"{top_k} rows a token, after it one.",
        )
    return outcomes[0].traffic(exact[0])
