"""RankGroup: a named set of ranks that can sum together. Groups are passed, never global."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig

_NAMES = ("tp", "moe_tp", "ep")


@dataclass(frozen=True)
class RankGroup:
    """Ranks that communicate with each other. Groups of the same ranks are equal.

    Attributes:
        name: "tp", "moe_tp" or "ep".
        ranks: their numbers within the torch.distributed world, in group order.
        index: the position of this process in `ranks`.
        process_group: the torch.distributed group; None where there is nobody to talk to.
        simulated: the other ranks do not exist (ParallelConfig.simulate_rank).
    """

    name: str = field(compare=False)
    ranks: tuple[int, ...]
    index: int = 0
    process_group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    simulated: bool = False

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __str__(self) -> str:
        return f"{self.name} (ranks {', '.join(map(str, self.ranks))})"


def world_size() -> int:
    """Ranks in this torch.distributed job; 1 where it is not initialised."""
    return dist.get_world_size() if dist.is_initialized() else 1


def backend_for(device: torch.device, process_group: dist.ProcessGroup | None = None) -> str:
    """What carries tensors of this device between the ranks: "nccl" or "gloo".

    A group can have one for each kind of device, and `dist.get_backend` then names none of them:
    groups of `Ranks` and `init_distributed` are "cpu:gloo,cuda:nccl" where each rank has a GPU.

    Args:
        process_group: None for that of the whole job.
    """
    pairs = (pair.split(":") for pair in dist.get_backend_config(process_group).split(","))
    return {kind: name for kind, name in pairs}[device.type]


def meet(group: RankGroup, device: torch.device) -> None:
    """Let no rank of the group pass before all have come: a sum of one number, which needs all.

    On a GPU under NCCL it is the GPU that waits, in the order of its stream; the host goes on.
    """
    if group.size > 1 and not group.simulated:
        dist.all_reduce(torch.zeros(1, device=device), group=group.process_group)


def build_groups(parallel: ParallelConfig) -> dict[str, RankGroup]:
    """The groups of this process: "tp", and within it "moe_tp" and "ep".

    With more ranks than tp, every tp consecutive ranks are one replica of the model. Every rank of
    the job must call this together, as torch.distributed demands of new groups. A simulated rank
    needs nobody: its peers are numbers.

    Raises:
        ConfigError: the job's rank count is not a multiple of tp; no rank waits for another.
    """
    if (alone := parallel.simulate_rank) is not None:
        return {name: _simulated_group(name, parallel, alone) for name in _NAMES}
    world = world_size()
    if world % parallel.tp:
        raise ConfigError(
            f"tp={parallel.tp} needs a multiple of {parallel.tp} ranks, this job has {world}: "
            f"use Ranks({parallel.tp}) or torchrun --nproc-per-node {parallel.tp}"
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {
        name: _own_group(name, _all_groups(name, parallel, world), rank, world) for name in _NAMES
    }


def _simulated_group(name: str, parallel: ParallelConfig, rank: int) -> RankGroup:
    ranks = next(group for group in _all_groups(name, parallel, parallel.tp) if rank in group)
    return RankGroup(name, ranks, ranks.index(rank), simulated=True)


def _all_groups(name: str, parallel: ParallelConfig, world: int) -> list[tuple[int, ...]]:
    """Every group of this kind in the job: tp ranks in a row; in it moe_tp in a row, ep across."""
    groups = []
    for start in range(0, world, parallel.tp):
        block = tuple(range(start, start + parallel.tp))
        if name == "tp":
            groups.append(block)
        elif name == "moe_tp":
            groups += [
                block[i : i + parallel.moe_tp] for i in range(0, parallel.tp, parallel.moe_tp)
            ]
        else:
            groups += [block[i :: parallel.moe_tp] for i in range(parallel.moe_tp)]
    return groups


def _own_group(name: str, groups: list[tuple[int, ...]], rank: int, world: int) -> RankGroup:
    ranks = next(group for group in groups if rank in group)
    process_group = None
    if len(ranks) == world and world > 1:
        process_group = dist.group.WORLD
    elif len(ranks) > 1:
        process_group = _process_group(groups, rank)
    return RankGroup(name, ranks, ranks.index(rank), process_group)


# torch.distributed never frees a subgroup by itself, so models of one layout share theirs. Held
# weakly: a rank that leaves a failed job must let go of its connections, or its peers wait on.
_subgroups: dict[tuple[tuple[int, ...], ...], weakref.ref[dist.ProcessGroup]] = {}


def _process_group(groups: list[tuple[int, ...]], rank: int) -> dist.ProcessGroup:
    known = _subgroups.get(tuple(groups))
    own = known() if known is not None else None
    if own is not None and _is_registered(own):
        return own
    for ranks in groups:  # every rank takes part in the making of every group
        made = dist.new_group(list(ranks))
        if rank in ranks:
            own = made
    assert own is not None
    _subgroups[tuple(groups)] = weakref.ref(own)
    return own


def _is_registered(group: dist.ProcessGroup) -> bool:
    """Whether the group is of the current job, and not from before a re-initialisation."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True
