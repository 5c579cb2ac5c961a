"""Window: memory of this rank that its peers can read and write, as the fused kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Programs of a fused kernel; row t always belongs to program t % PROGRAMS. Two on each of the 132
#: multiprocessors of an H100, and so all of them run at once.
PROGRAMS = 256


@dataclass(frozen=True, eq=False)
class Window:
    """Room for `capacity` rows of every rank, mapped into every rank of a group.

    Attributes:
        rows: for each rank, its (3, capacity, D) rows: two slots for partial sums, used in turn,
            and one for complete sums.
        flags: (world,) int64, the address of each rank's (PROGRAMS, world) int32 flags. Flag (p, r)
            holds the number of the last meeting that program p of rank r has come to.
        meetings: (PROGRAMS,) int32 of this rank alone: how many meetings each program has had.
        rank: this process's index in the group.
    """

    rows: tuple[Tensor, ...]
    flags: Tensor
    meetings: Tensor
    rank: int

    @property
    def capacity(self) -> int:
        return self.rows[0].shape[1]
