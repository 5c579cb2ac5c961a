"""Ranks as the places of a list: collectives that count what goes from node to node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepmoe.exercises.exercise import ExerciseError, require


class Network:
    """Collectives over lists, one tensor a rank, that note what goes from node to node.

    Each is a ring in the order of its group: a rank sends to the next one.

    Attributes:
        calls: collectives so far.
        sent: entries that each rank has sent to another node.
    """

    def __init__(self, n: int, per_node: int) -> None:
        self.per_node, self.calls = per_node, 0
        self.sent = [0.0] * n

    def reduce_scatter(self, values: list[Tensor], groups: list[list[int]]) -> list[Tensor]:
        """Of each group's sum the rank at place i gets part i."""

        def parts(members: list[Tensor]) -> list[Tensor]:
            if len(members[0]) % len(members):
                raise ExerciseError(f"{len(members[0])} entries are no {len(members)} equal parts.")
            return list(torch.stack(members).sum(0).chunk(len(members)))

        return self._run(values, groups, parts, halves=1)

    def all_gather(self, values: list[Tensor], groups: list[list[int]]) -> list[Tensor]:
        """Every rank of a group gets the parts of all, one behind the other."""
        return self._run(values, groups, lambda m: [torch.cat(m)] * len(m), halves=1, is_part=True)

    def all_reduce(self, values: list[Tensor], groups: list[list[int]]) -> list[Tensor]:
        """Every rank of a group gets the group's sum."""
        return self._run(values, groups, lambda m: [torch.stack(m).sum(0)] * len(m), halves=2)

    def _run(
        self,
        values: list[Tensor],
        groups: list[list[int]],
        operation: Callable[[list[Tensor]], list[Tensor]],
        halves: int,
        is_part: bool = False,
    ) -> list[Tensor]:
        ranks = sorted(rank for group in groups for rank in group)
        require(
            ranks == list(range(len(values))),
            f"Every rank belongs to one group, here they are {[list(g) for g in groups]}.",
        )
        self.calls += 1
        results = list(values)
        for group in groups:
            members, n = [values[rank] for rank in group], len(group)
            whole = len(members[0]) * (n if is_part else 1)
            for place, rank in enumerate(group):
                if rank // self.per_node != group[(place + 1) % n] // self.per_node:
                    self.sent[rank] += halves * (n - 1) / n * whole
            for rank, result in zip(group, operation(members), strict=True):
                results[rank] = result
        return results
