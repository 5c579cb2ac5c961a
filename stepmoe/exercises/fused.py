"""Exercises of notebook 04: who completes a pending sum, a borrowed kernel, and a vote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepmoe.comm.ledger import Ledger
from stepmoe.comm.placement import Placed
from stepmoe.exercises.exercise import (
    ExerciseError,
    Traffic,
    call,
    call_on,
    exercise,
    fresh,
    require,
    same,
)
from stepmoe.exercises.wire import Outcome, run_on_wire
from stepmoe.launch import Ranks
from stepmoe.lesson import forward_pass
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import FusedLayer, Step

NOTEBOOK = "04_fused"


@exercise(
    NOTEBOOK,
    lines=4,
    ranks=4,
    hint="Hint: what leaves a fused layer is a partial sum, what leaves the embedding is not; "
    "hidden_states.is_partial tells. comm.all_reduce(hidden_states, site) completes it.",
)
def hand_over(attempt: Callable[..., Any], ranks: Ranks) -> Traffic:
    """Judges the tensor that goes over a pipeline cut, and the logits of the stages behind it."""
    numbers, generator = fresh()
    ids = torch.randint(256, (3, 5), generator=generator)
    seed = numbers.getrandbits(31)
    oracle = forward_pass("deferred", ParallelConfig(), ids, dtype=torch.float64, seed=seed)
    score = Traffic(0, 0)
    for cut in (0, 4, numbers.randint(1, 3)):
        stages = call_on(ranks, _cut_pass, attempt, cut, ids, seed)
        sent = [one.answers[0] for one in (stage[0] for stage in stages)]
        where = f"Cut before layer {cut}: "
        if cut:
            states = {k: v.flatten(0, 1) for k, v in oracle.states[cut - 1].items()}
            _compare(sent, states, where)
            score = stages[0][0].traffic(sent[0])
        require(
            all(same(logits, oracle.logits) for _, logits in stages),
            f"{where}the logits behind the cut are wrong.",
        )
    return score


def _compare(sent: list[Tensor], states: dict[str, Tensor], where: str) -> None:
    """What every rank sent, with the layer's exact states (T, D)."""
    residual, output = states["post_attn_residual"], states["mlp_output"]
    require(
        all(torch.equal(one, sent[0]) for one in sent),
        f"{where}every rank sends something else: the sum is still pending, and the next stage "
        "takes what arrives for complete.",
    )
    require(
        not same(sent[0], output),
        f"{where}the residual stream stayed behind. One tensor goes over the cut, the sum of both.",
    )
    require(
        not same(sent[0], output + 4 * residual),
        f"{where}the residual is in it four times: it is complete, and was added to a partial sum.",
    )
    require(same(sent[0], residual + output), f"{where}not residual + hidden_states, completed.")


def _cut_pass(
    attempt: Callable[..., Any], cut: int, ids: Tensor, seed: int
) -> tuple[Outcome, Tensor]:
    """In a rank: what it sends before layer `cut`, and the logits behind it."""
    outcomes: list[Outcome] = []

    class CutLayer(FusedLayer):
        def forward(
            self, hidden_states: Placed, residual: Placed | None, step: Step
        ) -> tuple[Placed, Placed]:
            if self.index != cut:
                return super().forward(hidden_states, residual, step)
            with Ledger() as ledger:
                sent = attempt(self.comm, hidden_states, residual)
            if not isinstance(sent, Placed):
                raise ExerciseError(f"Return one Placed, not {type(sent).__name__}.")
            outcomes.append(Outcome([sent.tensor], ledger))
            # A wire carries numbers and no placements: the next stage takes them for complete.
            arrived = self.comm.replicated(sent.tensor, "from the stage before")
            return super().forward(arrived, None, step)

    done = forward_pass(CutLayer, ParallelConfig(4, 2), ids, dtype=torch.float64, seed=seed)
    return outcomes[-1], done.logits


@exercise(
    NOTEBOOK,
    lines=2,
    hint="Hint: x / rms(x) * w is Gemma's norm for another w. Which? And in which dtype can it be "
    "written down?",
)
def gemma_from_plain(attempt: Callable[..., Any]) -> None:
    """Judges Gemma's norm made with a kernel that knows only the plain one, bf16 weights."""
    numbers, generator = fresh()
    for tokens, hidden in ((7, 64), (numbers.randint(1, 5), 32 * numbers.randint(1, 4))):
        x, residual = torch.randn(2, tokens, hidden, generator=generator)
        weight = (0.05 * torch.randn(hidden, generator=generator)).bfloat16()
        given = x.clone(), residual.clone(), weight.clone(), 1e-5
        answer = call(attempt, _plain_kernel, *given)
        require(
            isinstance(answer, tuple) and len(answer) == 2,
            "Return what the kernel returns: the normalised values and the new residual.",
        )
        normed, total = answer
        require(_near(total, x + residual), "The new residual is x + residual.")
        require(
            not _near(normed, _plain_kernel(x, residual, weight, 1e-5)[0]),
            "That is x / rms(x) * weight. Gemma's weights are small numbers around 0, to which the "
            "norm adds 1.",
        )
        require(
            not _near(normed, _plain_kernel(x, residual, 1 + weight, 1e-5)[0]),
            "Nearly. 1 + weight was rounded to bfloat16, which knows no number between 1 and "
            "1.0078: of a weight of 0.003 nothing is left. Add in float32.",
        )
        exact, _ = _plain_kernel(x.double(), residual.double(), 1 + weight.double(), 1e-5)
        require(_near(normed, exact), "That is not x / rms(x) * (1 + weight) of x + residual.")


def _plain_kernel(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add and normalise, the weight taken as it is: what most fused kernels compute."""
    total = x + residual
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight, total


def _near(value: Any, exact: Tensor) -> bool:
    """Within 1e-5: float32 rounding of values of size 1; bfloat16 weights would be off by 2e-3."""
    return (
        isinstance(value, Tensor)
        and value.shape == exact.shape
        and torch.allclose(value.double(), exact.double(), rtol=1e-5, atol=1e-5)
    )


@exercise(
    NOTEBOOK,
    lines=3,
    ranks=4,
    hint="Hint: a sum over the ranks can count those that cannot. Every rank has to take part in "
    "it, the one that cannot above all.",
)
def agree(attempt: Callable[..., Any], ranks: Ranks) -> Traffic:
    """Judges a vote: fused only if every rank can, and every rank knows."""
    numbers, _ = fresh()
    alone, all_but_one = [False] * 4, [True] * 4
    # Not the same rank: one that stays away must not find a peer in a later vote.
    yes, no = numbers.sample(range(4), 2)
    alone[yes], all_but_one[no] = True, False
    votes = [[True] * 4, all_but_one, alone, [False] * 4]
    cases = [[(can,) for can in vote] for vote in votes]
    # The time limit is the attempt's: fresh ranks import what they need in a round before it.
    run_on_wire(_abstain, ranks, cases[:1], ["all_reduce"])
    outcomes = run_on_wire(attempt, ranks, cases, ["all_reduce"], timeout=10)
    for vote, outcome in zip(votes, outcomes, strict=True):
        answers = [bool(answer) for answer in outcome.answers]
        where = f"Can fuse, rank by rank: {vote}. You answer {answers}: "
        require(
            len(set(answers)) == 1,
            f"{where}ranks that disagree enter different collectives, and wait for ever.",
        )
        require(answers[0] == all(vote), f"{where}a rank that cannot would have to.")
        messages = len(outcome.ledger.entries)
        require(messages <= 1, f"Right, with {messages} messages. One will do.")
        require(messages == 1, "Right by chance: nothing was sent, so nobody knows of the others.")
    entry = outcomes[0].ledger.entries[0]
    return outcomes[0].traffic(torch.zeros(entry.shape, dtype=entry.dtype))


def _abstain(can_fuse: bool, all_reduce: Callable[[Tensor], Tensor]) -> None:
    """A round in which nothing is asked."""
