"""Exercises of notebook 09: what rounded figures allow, the busiest rank, all-reduce over nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepmoe.exercises.exercise import Traffic, call, exercise, fresh, require, same
from stepmoe.exercises.network import Network

NOTEBOOK = "09_eight_gpus"


@exercise(
    NOTEBOOK,
    lines=4,
    hint="Hint: turn tokens/s into seconds a step first. Which true figures, that round to the "
    "printed ones, make the saved time longest?",
)
def explained(attempt: Callable[..., Any]) -> None:
    """Judges the least and the most share of a rounded gain that a part explains."""
    numbers, _ = fresh()
    for _ in range(4):
        unit = numbers.choice([100.0, 500.0, 1000.0])
        before = unit * numbers.randint(20, 60)
        after = before + unit * numbers.randint(3, 12)
        tokens = 1024 * numbers.randint(4, 32)
        removed = numbers.uniform(0.2, 0.8) * (tokens / before - tokens / after)
        answer = call(attempt, before, after, unit, tokens, removed)
        require(
            isinstance(answer, tuple) and len(answer) == 2,
            f"Return the least and the most share, not {answer!r}.",
        )
        _judge_shares(answer, before, after, unit, removed / tokens)


def _judge_shares(
    answer: tuple[Any, Any], before: float, after: float, unit: float, removed: float
) -> None:
    """With `removed` in seconds a token."""

    def share(off_before: float, off_after: float) -> float:
        return removed / (1 / (before + off_before * unit) - 1 / (after + off_after * unit))

    where = f"{before:.0f} and {after:.0f} tokens/s, rounded to {unit:.0f}: "
    for mistake, hint in (
        (
            (share(0, 0), share(0, 0)),
            "that takes the printed figures for exact; each may be off by half a unit.",
        ),
        (
            (share(-1, 1), share(1, -1)),
            "a figure rounded to the nearest unit is off by half a unit at most.",
        ),
        ((share(0.5, -0.5), share(-0.5, 0.5)), "the least share first."),
        (
            tuple(sorted((share(-0.5, -0.5), share(0.5, 0.5)))),
            "one may have been rounded up and the other down. Move their ends apart, not along.",
        ),
    ):
        require(not all(map(_near, answer, mistake)), where + hint)
    right = share(-0.5, 0.5), share(0.5, -0.5)
    require(
        all(map(_near, answer, right)),
        f"{where}the shares are {right[0]:.4f} to {right[1]:.4f}, you say {answer}.",
    )


def _near(value: Any, expected: float) -> bool:
    """Within 1e-5: float32 means of whole numbers keep 7 digits, differences lose one or two."""
    return isinstance(value, int | float) and abs(value - expected) <= 1e-5 * expected


@exercise(
    NOTEBOOK,
    lines=4,
    hint="Hint: group g holds experts g * num_experts / ep and the next ones. A choice of an "
    "expert is a row for every rank of the group that holds it; torch.bincount counts.",
)
def busiest_rank(attempt: Callable[..., Any]) -> None:
    """Judges the rows of the busiest rank, and those over the mean rank's."""
    numbers, generator = fresh()
    for ep, is_last_empty in ((4, False), (2, False), (1, False), (4, True)):
        tp, num_experts = ep * numbers.choice([2, 4]), 16 * numbers.randint(2, 5)
        num_tokens, top_k = numbers.randint(20, 90), numbers.randint(3, 4)
        # Skewed, so that which group is busiest, and by how much, depends on who holds what.
        odds = torch.rand(num_experts, generator=generator) ** 3 + 1e-3
        if is_last_empty:
            odds[-(num_experts // ep) :] = 0
        topk_ids = torch.multinomial(odds.expand(num_tokens, -1), top_k, generator=generator)
        answer = call(attempt, topk_ids.clone(), num_experts, tp, ep)
        require(
            isinstance(answer, tuple) and len(answer) == 2,
            f"Return the rows and the imbalance, not {answer!r}.",
        )
        _judge_rows(answer, topk_ids, num_experts, tp, ep)


def _judge_rows(
    answer: tuple[Any, Any], topk_ids: Tensor, num_experts: int, tp: int, ep: int
) -> None:
    """topk_ids (T, K); the usual mistakes, each where it gives another number."""
    loads = topk_ids.flatten().bincount(minlength=num_experts)
    groups = loads.view(ep, -1).sum(1)
    rows, mean = int(groups.max()), topk_ids.numel() / ep
    holders = topk_ids // (num_experts // ep)
    tokens = max(int((holders == group).any(1).sum()) for group in range(ep))
    where = f"{num_experts} experts, tp={tp}, ep={ep}, {topk_ids.numel()} choices: "
    for mistake, hint in (
        (int(loads.max()), "that is the busiest expert; a rank holds several."),
        (
            int(loads.view(-1, ep).sum(0).max()),
            "experts are dealt in blocks, as in notebook 01: the first group holds the first ones.",
        ),
        (
            int((topk_ids * tp // num_experts).flatten().bincount().max()),
            "experts are dealt to ep groups, not to tp ranks. The tp / ep ranks of a group compute "
            "the same rows, each on its slice of the intermediate size.",
        ),
        (tokens, "a token that chose two experts of a group is two rows there."),
    ):
        require(mistake == rows or answer[0] != mistake, where + hint)
    require(answer[0] == rows, f"{where}the busiest rank has {rows} rows, you say {answer[0]}.")
    busy = int((groups > 0).sum())
    require(
        busy == ep or not _near(answer[1], rows / (topk_ids.numel() / busy)),
        f"{where}a group got no row at all. Its ranks wait: they belong to the mean.",
    )
    require(
        _near(answer[1], rows / mean),
        f"{where}{rows} rows, {mean:g} in the mean: {rows / mean:.3f}, you say {answer[1]}.",
    )


@exercise(
    NOTEBOOK,
    lines=6,
    hint="Hint: let every rank of a node be responsible for a part of the sum. Who holds the same "
    "part on the other nodes? Groups are lists of ranks, [[0, 1], [2, 3]] are two.",
)
def over_nodes(attempt: Callable[..., Any]) -> Traffic:
    """Judges an all-reduce over nodes by its sums, and by what the busiest rank sends to others."""
    numbers, generator = fresh()
    shapes = [(2, 4), (3, 2), (numbers.randint(2, 4), numbers.randint(2, 5))]
    traffic = []
    for nodes, per_node in shapes:
        n = nodes * per_node
        size = n * numbers.randint(1, 4)
        given = list(torch.randn(n, size, generator=generator, dtype=torch.float64))
        network = Network(n, per_node)
        answer = call(
            attempt,
            [value.clone() for value in given],
            nodes,
            per_node,
            network.reduce_scatter,
            network.all_reduce,
            network.all_gather,
        )
        where = f"{nodes} nodes of {per_node}: "
        _judge_sums(answer, given, per_node, where)
        busiest = max(network.sent) / size
        least = 2 * (nodes - 1) / nodes / per_node
        require(
            busiest <= least + 1e-9,
            f"{where}right, but one rank sends {busiest:.2f} x the tensor to another node, over "
            f"its one port; {least:.2f} will do if every port of a node carries its part.",
        )
        traffic.append(Traffic(network.calls, busiest))
    return traffic[0]


def _judge_sums(answer: Any, given: list[Tensor], per_node: int, where: str) -> None:
    """What every rank got, against the sum of all."""
    n, total = len(given), torch.stack(given).sum(0)
    require(
        isinstance(answer, list) and len(answer) == n,
        f"{where}return a list of {n} tensors, one a rank, not {type(answer).__name__}.",
    )
    for rank, value in enumerate(answer):
        require(
            isinstance(value, Tensor) and value.shape == total.shape,
            f"{where}rank {rank} does not hold a tensor of {len(total)} entries.",
        )
        first = rank // per_node * per_node
        require(
            not same(value, torch.stack(given[first : first + per_node]).sum(0)),
            f"{where}rank {rank} holds its own node's sum. The nodes never met.",
        )
        require(
            not same(value, per_node * total),
            f"{where}rank {rank} holds the sum {per_node} times: complete, and summed once more.",
        )
        require(same(value, total), f"{where}rank {rank} does not hold the sum of all.")
