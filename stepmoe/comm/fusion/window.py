"""Opens a `Window`: torch's symmetric memory on GPUs, a shared file on CPU ranks of one host."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepmoe.comm.groups import RankGroup
from stepmoe.kernels.window import PROGRAMS, Window


class Room:
    """This rank's memory for a window, allocated but not yet shared with the others.

    Allocating is this rank's own affair and may fail; `share` needs every rank of the group.
    Between the two the ranks can agree to go on. The room has to live as long as the window.
    """

    def __init__(
        self,
        world_size: int,
        capacity: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.shape = (3, capacity, hidden_size)
        # The flags come first, in a multiple of 128 bytes: rows stay aligned for wide loads.
        self.flag_bytes = -(-PROGRAMS * world_size * 4 // 128) * 128
        size = self.flag_bytes + 3 * capacity * hidden_size * dtype.itemsize
        self.handle: Any = None  # of a GPU's memory: the mapping lasts as long as this
        self.file: Path | None = None  # of a CPU's
        if device.type == "cuda":
            import torch.distributed._symmetric_memory as symmetric_memory

            self.memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        else:
            folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
            number, name = tempfile.mkstemp(prefix="stepmoe-window-", dir=folder)
            os.close(number)
            self.file, self.memory = Path(name), _mapped(name, size)
        self.memory[: self.flag_bytes].zero_()

    def share(self, group: RankGroup) -> Window:
        """Map every rank's room into this process. All ranks of the group call it together.

        No rank may use the window before all have returned from this.
        """
        whole = self._of_gpus(group) if self.device.type == "cuda" else self._of_cpus(group)
        flags = [room[: self.flag_bytes].data_ptr() for room in whole]
        return Window(
            tuple(room[self.flag_bytes :].view(self.dtype).view(self.shape) for room in whole),
            torch.tensor(flags, dtype=torch.int64, device=self.device),
            torch.zeros(PROGRAMS, dtype=torch.int32, device=self.device),
            group.index,
        )

    def _of_gpus(self, group: RankGroup) -> list[Tensor]:
        """The memory of every rank, in rank order."""
        import torch.distributed._symmetric_memory as symmetric_memory

        assert group.process_group is not None
        torch.cuda.synchronize(self.device)  # the flags are zero before a peer can reach them
        self.handle = symmetric_memory.rendezvous(self.memory, group.process_group)
        shape = tuple(self.memory.shape)
        return [self.handle.get_buffer(r, shape, torch.uint8) for r in range(group.size)]

    def _of_cpus(self, group: RankGroup) -> list[Tensor]:
        """The memory of every rank, in rank order."""
        names: list[str] = [""] * group.size
        dist.all_gather_object(names, str(self.file), group=group.process_group)
        whole = [_mapped(name, self.memory.numel()) for name in names]
        dist.barrier(group.process_group)
        assert self.file is not None
        self.file.unlink()  # the mappings stay
        return whole


def _mapped(name: str, size: int) -> Tensor:
    """A file of `size` bytes as a uint8 tensor that every process which maps it shares."""
    return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
