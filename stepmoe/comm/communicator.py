"""Communicator: the collectives a decoder layer may use, over one group.

Every method takes and returns Placed tensors, checks that the collective fits the placement, and
writes one ledger entry. With a group of one rank nothing is sent and nothing is recorded: the sum
of one addend is complete.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepmoe.comm import wire
from stepmoe.comm.fusion import FINALIZE, Choice, Rows, Unsummed, fusion_of
from stepmoe.comm.groups import RankGroup
from stepmoe.comm.ledger import Entry, note, record
from stepmoe.comm.placement import PARTIAL, REPLICATE, TOKEN_SHARD, Placed
from stepmoe.errors import ConfigError, PlacementError
from stepmoe.kernels.norm import add_gemma_rms_norm


class Communicator:
    """Collectives over `group`, which is passed in and never looked up."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self._simulated = _simulation(group) if group.simulated else None

    def replicated(self, tensor: Tensor, name: str, layer: int | None = None) -> Placed:
        """Declare that every rank holds this same (T, D) tensor."""
        return Placed(tensor, REPLICATE, self.group, tensor.shape[0], name, layer)

    def partial(self, tensor: Tensor, name: str, layer: int | None = None) -> Placed:
        """Declare that the value is the sum of every rank's (T, D) tensor."""
        return Placed(tensor, PARTIAL, self.group, tensor.shape[0], name, layer)

    def sharded(
        self, tensor: Tensor, num_tokens: int, name: str, layer: int | None = None
    ) -> Placed:
        """Declare that this rank holds (T_local, D) of num_tokens tokens, all T_local equal."""
        return Placed(tensor, TOKEN_SHARD, self.group, num_tokens, name, layer)

    def all_reduce(self, partial: Placed, site: str) -> Placed:
        """Partial (T, D) to Replicate (T, D): the sum, on every rank.

        The partial tensor's memory is overwritten with the sum.
        """
        self._expect_partial(partial, "all_reduce")
        done = partial.with_(partial.tensor, REPLICATE)
        partial.fate.spent = True
        if self.group.size > 1:
            entry = self._entry("all_reduce", done, partial.tensor, site)
            with record(entry, partial.tensor.device, self.group):
                wire.all_reduce(partial.tensor, self.group)
        return done

    def reduce_scatter(self, partial: Placed, tokens_per_rank: int, site: str) -> Placed:
        """Partial (T, D) to Shard (tokens_per_rank, D): each rank gets the sum of its own tokens.

        T is padded with zeros to group size x tokens_per_rank; ConfigError if they are fewer. The
        partial tensor is taken over.
        """
        self._expect_partial(partial, "reduce_scatter")
        self._expect_room(partial, tokens_per_rank, "reduce_scatter")
        partial.fate.spent = True
        padded = _pad(partial.take_over(), self.group.size * tokens_per_rank)
        if self.group.size == 1:
            return partial.with_(padded, TOKEN_SHARD)
        own = padded.new_empty(tokens_per_rank, padded.shape[1])
        done = partial.with_(own, TOKEN_SHARD)
        entry = self._entry("reduce_scatter", done, padded, site)
        with record(entry, padded.device, self.group):
            wire.reduce_scatter(own, padded, self.group)
        return done

    def all_gather(self, shard: Placed, site: str) -> Placed:
        """Shard (T_local, D) to Replicate (T, D): every rank's tokens, the padding taken off."""
        shard.complete("all_gather")
        self._expect_own_group(shard, "all_gather")
        if not shard.is_sharded:
            raise PlacementError(
                f"{shard} is {shard.describe()}: every rank holds it already, and gathering it "
                f"would repeat every token {self.group.size} times. Leave the all_gather out."
            )
        if self.group.size == 1:
            return shard.with_(shard.tensor[: shard.num_tokens], REPLICATE)
        own = shard.tensor.contiguous()
        every = own.new_empty(self.group.size * own.shape[0], own.shape[1])
        done = shard.with_(every[: shard.num_tokens], REPLICATE)
        entry = self._entry("all_gather", done, every, site)
        with record(entry, own.device, self.group):
            wire.all_gather(every, own, self.group)
        return done

    def all_reduce_add_rms_norm(
        self, partial: Placed, residual: Placed, weight: Tensor, eps: float, site: str
    ) -> tuple[Placed, Placed]:
        """Complete a pending sum, add it to the residual and normalise, as one operation.

        weight (D,) and eps are the Gemma norm's. Returns (normalised, residual), both Replicate and
        in the dtype of partial. stepmoe.comm.fusion chooses the implementation, and the ledger's
        entry says which ran and why. Both inputs are taken over.
        """
        self._expect_partial(partial, "all_reduce_add_rms_norm")
        residual.replicated("all_reduce_add_rms_norm")
        rows = self._rows(partial, weight)
        tensor, addend = partial.take_over(), residual.take_over()
        done = partial.with_(tensor, REPLICATE)
        partial.fate.spent = True
        choice = self._simulated or (FINALIZE if rows else self._choose(tensor, weight))
        entry = self._entry("all_reduce_add_rms_norm", done, tensor, site, choice)
        with record(entry, tensor.device, self.group):
            if rows:
                finalize = fusion_of(self.group).finalize
                normed, total = finalize(rows, tensor, addend, weight, eps)
            elif choice.implementation in ("unfused", "simulated"):
                if self.group.size > 1:
                    wire.all_reduce(tensor, self.group)
                normed, total = add_gemma_rms_norm(tensor, addend, weight, eps)
            else:
                fusion = fusion_of(self.group)
                normed, total = fusion.run(choice, tensor, addend, weight, eps)
        return done.with_(normed, name="hidden_states"), residual.with_(total)

    def keep_own_tokens(self, whole: Placed, tokens_per_rank: int) -> Placed:
        """Replicate (T, D) to Shard (tokens_per_rank, D) without communication."""
        whole.replicated("keep_own_tokens")
        self._expect_room(whole, tokens_per_rank, "keep_own_tokens")
        padded = _pad(whole.tensor, self.group.size * tokens_per_rank)
        start = self.group.index * tokens_per_rank
        return whole.with_(padded[start : start + tokens_per_rank], TOKEN_SHARD)

    def _choose(self, partial: Tensor, weight: Tensor) -> Choice:
        """What carries out a fused operation; the ranks agree on it at the first of its kind."""
        if self.group.size == 1:
            return Choice("unfused", "one rank: there is no sum to complete")
        return fusion_of(self.group).choose(self.group, partial, weight)

    def _rows(self, partial: Placed, weight: Tensor) -> Rows | None:
        """Experts' rows for the kernel that also adds these up; None if it is not to run."""
        if not isinstance(partial, Unsummed) or self.group.size == 1 or self._simulated:
            return None
        assert partial.held is not None
        if why := fusion_of(self.group).why_no_finalize(self.group, partial.held, weight):
            note(f"experts' rows were summed before the all-reduce: moe-finalize {why}")
            return None
        return partial.take_rows()

    def _expect_own_group(self, placed: Placed, op: str) -> None:
        if placed.group != self.group:
            raise PlacementError(
                f"{placed} is {placed.describe()}, but the {op} runs over {self.group}: "
                f"the result would leave out ranks or count some twice. Use the communicator of "
                f"{placed.group.name}."
            )

    def _expect_partial(self, placed: Placed, op: str) -> None:
        placed.unspent(op)
        if not placed.is_partial:
            raise PlacementError(
                f"{placed} is {placed.describe()}: its sum is complete, and another {op} would "
                f"multiply it by {self.group.size}. Leave the {op} out."
            )
        self._expect_own_group(placed, op)

    def _expect_room(self, whole: Placed, tokens_per_rank: int, op: str) -> None:
        needed = -(-whole.tensor.shape[0] // self.group.size)
        if tokens_per_rank < needed:
            raise ConfigError(
                f"{whole}: {op} of {whole.tensor.shape[0]} tokens over {self.group.size} ranks "
                f"with tokens_per_rank={tokens_per_rank}: give at least {needed}"
            )

    def _entry(
        self, op: str, done: Placed, wire: Tensor, site: str, choice: Choice | None = None
    ) -> Entry:
        """Ledger entry: `wire` is the whole tensor that crosses the group."""
        choice = choice or self._simulated or Choice("", "")
        return Entry(
            op=op,
            kind="collective" if self.group.size > 1 else "local",
            layer=done.layer,
            site=site,
            group=self.group.name,
            group_size=self.group.size,
            shape=tuple(wire.shape),
            dtype=wire.dtype,
            bytes=wire.numel() * wire.element_size(),
            tensor=done.name,
            placement=done.placement.value,
            implementation=choice.implementation,
            reason=choice.reason,
        )


def _simulation(group: RankGroup) -> Choice:
    """What the ledger says of every collective of a simulated rank."""
    return Choice(
        "simulated",
        f"rank {group.index} of {group.size} runs alone and nothing was sent: sizes and "
        "computation are a real rank's, values are not the model's",
    )


def _pad(tensor: Tensor, num_tokens: int) -> Tensor:
    """(T, D) with rows of zeros appended up to num_tokens."""
    missing = num_tokens - tensor.shape[0]
    return F.pad(tensor, (0, 0, 0, missing)) if missing else tensor.contiguous()
