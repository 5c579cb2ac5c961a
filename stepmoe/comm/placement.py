"""Placed: a tensor together with where its value lives, so that a wrong sum cannot pass in silence.

The words are torch.distributed.tensor's. Over a group of n ranks a tensor is
  Replicate   whole and equal on every rank,
  Shard       cut by tokens: each rank holds its own,
  Partial     of the full shape on every rank, the value being the *sum* of all n.
Only the words: importing theirs brings sympy along, and makes each rank start 0.7 s of CPU later.
The check compares Python objects: it sends nothing and touches no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from stepmoe.comm.groups import RankGroup
from stepmoe.errors import PlacementError


class Placement(Enum):
    """Where a value lives over a group; see the head of this module."""

    REPLICATE = "Replicate"
    TOKEN_SHARD = "Shard"
    PARTIAL = "Partial"


REPLICATE, TOKEN_SHARD, PARTIAL = Placement.REPLICATE, Placement.TOKEN_SHARD, Placement.PARTIAL


@dataclass(slots=True, eq=False)
class Fate:
    """What became of a value, for all that describe it: one sum must not be counted twice.

    Attributes:
        spent: a reduction has overwritten the tensor.
        taken_over: so has another operation, or may have.
    """

    spent: bool = False
    taken_over: bool = False


@dataclass(slots=True, eq=False)
class Placed:
    """A tensor of tokens x hidden and its placement over a group.

    Attributes:
        held: `tensor`, or None once the last operation that needed it has taken it over.
        placement: Replicate, Shard or Partial.
        group: the ranks the placement speaks of.
        num_tokens: T, the tokens of the whole tensor (without padding).
        name: what it is, for messages and the ledger ("attn_output").
        layer: decoder layer it belongs to; None outside the layers.
        fate: shared by all `Placed` of the same tensor and placement made with `with_`.
    """

    held: Tensor | None
    placement: Placement
    group: RankGroup
    num_tokens: int
    name: str
    layer: int | None = None
    fate: Fate = field(default_factory=Fate)

    @property
    def tensor(self) -> Tensor:
        """What this rank holds: (T, D), or (T_local, D) under Shard."""
        if self.held is None:
            raise self._taken_over("reading")
        return self.held

    @property
    def is_partial(self) -> bool:
        return self.placement is PARTIAL

    @property
    def is_sharded(self) -> bool:
        return self.placement is TOKEN_SHARD

    def with_(
        self, tensor: Tensor, placement: Placement | None = None, name: str | None = None
    ) -> Placed:
        """The same tokens of the same layer with another value, placement or name."""
        placement = placement or self.placement
        is_same = tensor is self.held and placement is self.placement
        fate = self.fate if is_same else Fate()
        # Not `replace`: what a subclass has pending belongs to the old value.
        return Placed(
            tensor, placement, self.group, self.num_tokens, name or self.name, self.layer, fate
        )

    def complete(self, operation: str) -> Placed:
        """Self, unless its sum is pending: a nonlinear operation must not see a partial sum."""
        self.unspent(operation)
        if self.is_partial:
            raise PlacementError(
                f"{self}: {operation} needs the complete value, but this is a partial sum over "
                f"{self.group}. First all_reduce or reduce_scatter it over {self.group.name}."
            )
        return self

    def unspent(self, operation: str) -> Placed:
        """Self, unless a reduction already overwrote it: another would count it twice."""
        if self.fate.spent:
            raise PlacementError(
                f"{self}: {operation} of a partial sum that was already reduced over {self.group}. "
                "Use what the reduction returned."
            )
        if self.fate.taken_over:
            raise self._taken_over(operation)
        return self

    def take_over(self) -> Tensor:
        """The tensor, for the last operation that needs it, which may overwrite its memory.

        A layer's caller holds on to the layer's inputs until it returns, and the layer to all that
        it has named. What is taken over is free as soon as that operation is done with it.
        """
        tensor, self.held = self.tensor, None
        self.fate.taken_over = True
        return tensor

    def _taken_over(self, operation: str) -> PlacementError:
        return PlacementError(
            f"{self}: {operation} of a value that an addition before has taken over, and its "
            "memory with it. Use what that addition returned."
        )

    def replicated(self, operation: str) -> Placed:
        """Self, if every rank holds all of it; the operation needs every token."""
        if self.complete(operation).is_sharded:
            raise PlacementError(
                f"{self}: {operation} needs every token on every rank, but each rank of "
                f"{self.group} holds only its own. all_gather it first."
            )
        return self

    def addable(self, other: Placed) -> Placed:
        """Self, if the sum with `other` means something: one placement, over one group."""
        self.unspent("the sum")
        other.unspent("the sum")
        if self.placement != other.placement or self.group != other.group:
            raise PlacementError(
                f"{self} is {self.describe()} and {other} is {other.describe()}: their sum has no "
                f"meaning. {self._why_not_added(other)}"
            )
        return self

    def _why_not_added(self, other: Placed) -> str:
        if self.group != other.group:
            return "Complete each over its own group first."
        if self.is_partial or other.is_partial:
            return (
                f"A complete value added to a partial sum would be counted {self.group.size} times "
                "by the reduction that follows; complete the sum first."
            )
        return (
            "One has every token and the other only this rank's own: all_gather that one, or "
            "keep_own_tokens of the whole one."
        )

    def __add__(self, other: Placed) -> Placed:
        """Sum of two tensors of one placement; partial + partial stays partial."""
        self.addable(other)
        return self.with_(self.tensor + other.tensor, name=f"{self.name} + {other.name}")

    def describe(self) -> str:
        """The placement in words, with its group."""
        word = "Partial" if self.is_partial else "Shard(tokens)" if self.is_sharded else "Replicate"
        return f"{word} over {self.group}"

    def __str__(self) -> str:
        where = "outside the layers" if self.layer is None else f"layer {self.layer}"
        return f"{where}, {self.name}"
