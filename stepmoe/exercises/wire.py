"""Run an attempt in every rank, with plain collectives that a ledger counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import build_groups, world_size
from stepmoe.comm.ledger import Ledger
from stepmoe.exercises.exercise import ExerciseError, Traffic, call_on
from stepmoe.launch import Ranks
from stepmoe.parallel import ParallelConfig


class Wire:
    """The collectives of `comm` on plain tensors (rows, ...), which they leave as they are."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, on every rank."""
        flat = partial.flatten().clone()  # of any shape, a single number's included
        return self._comm.all_reduce(self._comm.partial(flat, "partial"), "").tensor.view_as(
            partial
        )

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        """This rank's share of the sum's rows, which must divide by the number of ranks."""
        rows, n = len(partial), self._comm.group.size
        if rows % n:
            raise ExerciseError(
                f"reduce_scatter cannot deal {rows} rows to {n} ranks: every rank's share must be "
                "as large. Rows of zeros can fill up what is missing."
            )
        shard = self._comm.reduce_scatter(self._comm.partial(partial, "partial"), rows // n, "")
        return shard.tensor

    def all_gather(self, share: Tensor) -> Tensor:
        """The rows of all ranks, in rank order, on every rank."""
        whole = len(share) * self._comm.group.size
        return self._comm.all_gather(self._comm.sharded(share, whole, "share"), "").tensor


@dataclass(frozen=True)
class Outcome:
    """One case: the answer of each rank, and what rank 0's ledger holds."""

    answers: list[Any]
    ledger: Ledger

    def traffic(self, whole: Tensor) -> Traffic:
        """Collectives and bytes, in units of the tensor `whole`."""
        sent = self.ledger.bytes_sent() / (whole.numel() * whole.element_size())
        return Traffic(len(self.ledger.entries), sent)


def run_on_wire(
    attempt: Callable[..., Any],
    ranks: Ranks,
    cases: Sequence[Sequence[tuple[Any, ...]]],
    collectives: Sequence[str],
    timeout: float = 60,
) -> list[Outcome]:
    """Call attempt(*cases[i][rank], *collectives) for every case in every rank.

    Args:
        collectives: names of Wire's methods, passed on in this order.
        timeout: seconds for all cases together.

    Raises:
        ExerciseError: the attempt failed in a rank, or the ranks wait for each other.
    """
    by_rank = call_on(ranks, _run_cases, attempt, cases, collectives, timeout=timeout)
    return [
        Outcome([answer for answer, _ in results], results[0][1])
        for results in zip(*by_rank, strict=True)
    ]


def _run_cases(
    attempt: Callable[..., Any],
    cases: Sequence[Sequence[tuple[Any, ...]]],
    collectives: Sequence[str],
) -> list[tuple[Any, Ledger]]:
    """In a rank."""
    comm = Communicator(build_groups(ParallelConfig(tp=world_size()))["tp"])
    wire = Wire(comm)
    results = []
    for arguments in cases:
        with Ledger() as ledger:
            given = [getattr(wire, name) for name in collectives]
            answer = attempt(*arguments[comm.group.index], *given)
        results.append((answer, ledger))
    return results
