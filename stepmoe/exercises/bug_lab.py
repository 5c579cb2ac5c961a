"""Exercises of notebook 08: name a fault by what it did, and write the guard that catches it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.ledger import Ledger
from stepmoe.config import Step3p5Config
from stepmoe.exercises.exercise import call, call_on, exercise, fresh, require
from stepmoe.faults import FAULTS, unchecked
from stepmoe.launch import Ranks
from stepmoe.parallel import ParallelConfig

NOTEBOOK = "08_bug_lab"

SIGNS = {
    "right": "every rank holds the sum",
    "reduced twice": "every rank holds the sum times the number of ranks",
    "never reduced": "each rank holds its own addend",
    "wrong group": "ranks of a group hold the sum over that group alone",
}


@exercise(
    NOTEBOOK,
    lines=8,
    hint="Hint: compare the first rank's output with the exact one, and the ranks with each other. "
    "Only where they differ do you need to know how many different outputs there are.",
)
def name_the_fault(attempt: Callable[..., Any]) -> None:
    """Judges the names given to the outputs of 4 or 8 ranks, in float32 and with its rounding."""
    numbers, generator = fresh()
    for sign in numbers.sample([*SIGNS, *SIGNS], 2 * len(SIGNS)):
        n = numbers.choice([4, 8])
        exact, found = _outputs(sign, n, numbers.randint(2, 7), generator)
        answer = call(attempt, exact, found)
        require(
            answer in SIGNS,
            f"Return one of {', '.join(map(repr, SIGNS))}, not {answer!r}.",
        )
        require(
            answer == sign,
            f"{n} ranks, of which {SIGNS[sign]}: that is {sign!r}, you say {answer!r}. "
            + ("Mind the rounding of float32." if sign in ("right", "reduced twice") else ""),
        )


def _outputs(
    sign: str, n: int, tokens: int, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """The exact sum (T, D) in float64 and what each of n ranks holds, in float32."""
    addends = torch.randn(n, tokens, 6, generator=generator)
    exact, n_groups = addends.double().sum(0), n // 2
    total = addends.flip(0).sum(0)  # in float32, in another order
    if sign == "right":
        return exact, [total] * n
    if sign == "reduced twice":
        return exact, [torch.stack([total] * n).sum(0)] * n
    if sign == "never reduced":
        return exact, list(addends)
    group_sums = addends.view(2, n_groups, tokens, 6).sum(0)
    return exact, [group_sums[rank % n_groups] for rank in range(n)]


@exercise(
    NOTEBOOK,
    lines=8,
    ranks=4,
    hint="Hint: what has deferred promised? Two all-reduces a layer, in order, each of tokens x "
    "hidden_size, float32, over all ranks. Compare entry by entry.",
)
def ledger_guard(attempt: Callable[..., Any], ranks: Ranks) -> None:
    """Judges a guard by ledgers of real passes of `deferred`: right ones, and with three faults."""
    numbers, generator = fresh()
    shape = Step3p5Config.tiny().replace(
        moe_layers=tuple(sorted(numbers.sample(range(5), numbers.randint(2, 4)))),
        hidden_size=32 * numbers.randint(2, 4),
    )
    ids = torch.randint(
        shape.vocab_size, (numbers.randint(2, 3), numbers.randint(3, 9)), generator=generator
    )
    names = [None, "dense_reduced_twice", "wrong_group", "bf16_accumulation"]
    ledgers = call_on(ranks, _ledgers, shape, ids, names)[0]
    require(
        bool(call(attempt, ledgers[0], shape, ids.numel())),
        f"It objects to a right pass of {ids.numel()} tokens, {shape.num_hidden_layers} layers, "
        f"hidden size {shape.hidden_size}: a guard that cries wolf is turned off.",
    )
    for name, ledger in zip(names[1:], ledgers[1:], strict=True):
        assert name is not None
        require(
            not call(attempt, ledger, shape, ids.numel()),
            f"It lets {name} pass: {FAULTS[name].what}.",
        )
    right = ledgers[0].entries
    moved = Ledger([*right[:2], right[0], *right[3:]])
    require(
        not call(attempt, moved, shape, ids.numel()),
        "It lets a sum pass that was made twice in layer 0 and never in layer 1: the total is "
        "right, the layers are not.",
    )


def _ledgers(shape: Step3p5Config, ids: Tensor, names: list[str | None]) -> list[Ledger]:
    """In a rank: the ledger of one pass for every fault; None is none."""
    ledgers = []
    for name in names:
        model = Step3p5ForCausalLM.from_config(shape, "deferred", ParallelConfig(4, 2))
        injected = nullcontext() if name is None else FAULTS[name].inject(model)
        with unchecked(), injected, Ledger() as ledger:
            model(ids)
        ledgers.append(ledger)
    return ledgers
