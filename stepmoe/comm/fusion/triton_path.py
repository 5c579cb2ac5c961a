"""The Triton kernels of all_reduce_norm_gpu.py for one group: probe, agree, open, run."""

from __future__ import annotations

import torch
from torch import Tensor

from stepmoe.comm.fusion.vote import first_problem
from stepmoe.comm.fusion.window import Room
from stepmoe.comm.groups import RankGroup
from stepmoe.kernels.window import Window

#: Rows of the first window of a group; more where a call needs more.
FIRST_CAPACITY = 256


class TritonPath:
    """Windows of one hidden size and dtype. One that became too small is kept, because a captured
    CUDA graph may still use it; sizes double, so all of them are less than twice the largest."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self._rooms: list[Room] = []  # hold the memory
        self._compiled: set[tuple[torch.dtype, int]] = set()

    def prepare(self, group: RankGroup, partial: Tensor, weight: Tensor, shots: int) -> str:
        """Make a call with these tensors possible. All ranks call it together.

        Returns:
            What keeps a rank from it, the same text on every rank; empty if nothing does.
        """
        compiled = (weight.dtype, shots)
        fits = bool(self.windows) and self.windows[-1].capacity >= partial.shape[0]
        if fits and compiled in self._compiled:
            return ""
        if partial.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the fused all-reduce of {partial.shape[0]} tokens has to be prepared, which a "
                "CUDA graph cannot capture: run the same call once before the capture"
            )
        try:
            room = None if fits else self._room(group, partial)
            problem = ""
        except Exception as error:
            room, problem = None, f"{type(error).__name__}: {error}"
        if agreed := first_problem(group, problem):
            return agreed
        if room is not None:
            self.windows.append(room.share(group))
            self._rooms.append(room)
        try:
            from stepmoe.kernels.all_reduce_norm_gpu import compile_fused

            compile_fused(partial.dtype, weight.dtype, self.windows[-1], shots)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if agreed := first_problem(group, problem):
            return agreed
        self._compiled.add(compiled)
        return ""

    def run(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float, shots: int
    ) -> tuple[Tensor, Tensor]:
        from stepmoe.kernels.all_reduce_norm_gpu import fused_all_reduce_add_rms_norm

        return fused_all_reduce_add_rms_norm(
            partial, residual, weight, eps, self.windows[-1], shots
        )

    def _room(self, group: RankGroup, partial: Tensor) -> Room:
        from stepmoe.kernels.all_reduce_norm_gpu import is_interpreted

        if is_interpreted() == partial.is_cuda:
            raise RuntimeError(
                "TRITON_INTERPRET is set, with which no kernel runs on the GPU"
                if partial.is_cuda
                else "on CPU, TRITON_INTERPRET=1 must be set before Triton is imported"
            )
        capacity = FIRST_CAPACITY
        while capacity < partial.shape[0]:
            capacity *= 2
        if 3 * capacity * partial.shape[1] >= 1 << 31:
            raise RuntimeError(f"{capacity} tokens of {partial.shape[1]}: offsets exceed 32 bits")
        return Room(group.size, capacity, partial.shape[1], partial.dtype, partial.device)
