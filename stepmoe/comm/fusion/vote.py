"""How the ranks of a group agree, so that no one enters a kernel that another will not."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist

from stepmoe.comm.fusion.gate import Place, Topology
from stepmoe.comm.groups import RankGroup


def first_problem(group: RankGroup, problem: str) -> str:
    """Every rank says what keeps it from going on (empty: nothing). Returns the first such answer.

    All ranks of the group call it together and get the same text: "rank 2: no nvcc", or "".
    """
    problems: list[str] = [""] * group.size
    dist.all_gather_object(problems, problem, group=group.process_group)
    for rank, found in zip(group.ranks, problems, strict=True):
        if found:
            return f"rank {rank}: {found}"
    return ""


def find_place(group: RankGroup, device: torch.device) -> Place:
    """Where the ranks of the group run. All of them call it together and get the same answer."""
    if device.type != "cuda":
        return Place("cpu", group.size)
    properties = torch.cuda.get_device_properties(device)
    mine = (socket.gethostname(), str(properties.uuid), (properties.major, properties.minor))
    every: list[tuple[str, str, tuple[int, int]]] = [mine] * group.size
    dist.all_gather_object(every, mine, group=group.process_group)
    unreachable = first_problem(group, _unreachable(device, [uuid for _, uuid, _ in every]))
    topology: Topology
    if len({host for host, *_ in every}) > 1:
        topology = "several hosts"
    elif unreachable:
        topology = "no peer access"
    elif len({uuid for _, uuid, _ in every}) < group.size:
        topology = "shared GPU"
    else:
        topology = "one GPU a rank"
    return Place(topology, group.size, min(capability for *_, capability in every))


def expected_place(device: torch.device, world_size: int) -> Place:
    """What `find_place` will most likely answer, from what one rank of one host sees by itself."""
    if device.type != "cuda":
        return Place("cpu", world_size)
    shared = torch.cuda.device_count() < world_size
    capability = torch.cuda.get_device_capability(device)
    return Place("shared GPU" if shared else "one GPU a rank", world_size, capability)


def _unreachable(device: torch.device, uuids: list[str]) -> str:
    """The first of these GPUs whose memory this rank cannot read; empty if it can read all."""
    visible = {
        str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())
    }
    own = device.index if device.index is not None else torch.cuda.current_device()
    for uuid in uuids:
        # A GPU hidden from this process may still be reachable: only the attempt would tell.
        other = visible.get(uuid, own)
        if other != own and not torch.cuda.can_device_access_peer(own, other):
            return f"GPU {own} cannot read GPU {other}"
    return ""
