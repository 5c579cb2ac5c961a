"""FlashInfer's fused all-reduce (trtllm backend) for one group: probe, agree, open, run."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from stepmoe.comm.fusion.vote import first_problem
from stepmoe.comm.groups import RankGroup


class FlashInferPath:
    """FlashInfer's workspace of one hidden size and dtype: sized once, grown where a call needs it.

    A workspace that became too small is kept, because a captured CUDA graph may still use it.
    """

    #: Rows of a group's first workspace, sglang's limit; more where a call needs more.
    first_capacity = 2048

    def __init__(self) -> None:
        self.workspaces: list[Any] = []

    def prepare(self, group: RankGroup, partial: Tensor, weight: Tensor, shots: int | None) -> str:
        """Make a call with these tensors possible. All ranks call it together.

        Returns:
            What keeps a rank from it, the same text on every rank; empty if nothing does.
        """
        num_tokens, hidden_size = partial.shape
        if self.workspaces and self.workspaces[-1].is_buffer_size_sufficient(
            group.size, num_tokens, hidden_size, partial.dtype
        ):
            return ""
        if partial.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the fused all-reduce of {num_tokens} tokens needs a larger workspace, which a "
                "CUDA graph cannot capture: run the same call once before the capture"
            )
        capacity = self.first_capacity
        while capacity < num_tokens:
            capacity *= 2
        if agreed := first_problem(group, _problem(group, capacity, partial)):
            return agreed
        from flashinfer.comm import create_allreduce_fusion_workspace

        problem = ""
        try:
            workspace = create_allreduce_fusion_workspace(
                backend="trtllm",
                world_size=group.size,
                rank=group.index,
                max_token_num=capacity,
                hidden_dim=hidden_size,
                dtype=partial.dtype,
                group=group.process_group,
            )
            self.workspaces.append(workspace)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return first_problem(group, problem)

    def run(
        self,
        partial: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        shots: int | None = None,
        pattern: str = "kARResidualRMSNorm",
        **more: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Complete the sum, add it to the residual, normalise. Returns (normalised, residual).

        Args:
            shots: 1, 2 (which needs more tokens than ranks), or None for FlashInfer's own choice.
            pattern: FlashInfer's name of what is fused.
            more: what another pattern takes besides.
        """
        from flashinfer.comm import AllReduceFusionPattern, allreduce_fusion

        adds_one = _adds_one()
        normed, new_residual = torch.empty_like(residual), torch.empty_like(residual)
        allreduce_fusion(
            input=partial,
            workspace=self.workspaces[-1],
            pattern=getattr(AllReduceFusionPattern, pattern),
            launch_with_pdl=True,
            residual_in=residual,
            residual_out=new_residual,
            norm_out=normed,
            # The kernel reads the weight as the tensors' dtype, whatever it is: a float32 weight
            # would be misread, and every second column with it (vLLM #48324).
            rms_gamma=(weight if adds_one else weight + 1).to(partial.dtype),
            rms_eps=eps,
            use_oneshot=None if shots is None else shots == 1,
            fp32_acc=True,
            **({"weight_bias": 1.0} if adds_one else {}),
            **more,
        )
        return normed, new_residual

    def __del__(self) -> None:
        """Free the workspaces: FlashInfer keeps a reference of its own, which destroy() leaves."""
        for workspace in self.workspaces:
            trtllm_ar = sys.modules.get("flashinfer.comm.trtllm_ar")
            if trtllm_ar is not None:
                trtllm_ar.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace.ipc_handles)
            workspace.destroy()


@functools.cache
def _adds_one() -> bool:
    """Whether the kernel can do Gemma's 1 + weight itself; releases before 0.6.13 cannot."""
    from flashinfer.comm import allreduce_fusion

    return "weight_bias" in inspect.signature(allreduce_fusion).parameters


def _problem(group: RankGroup, capacity: int, partial: Tensor) -> str:
    """What keeps this rank from opening a workspace; compiles FlashInfer's module if need be."""
    # One shot uses three buffers in turn, and clears the last of them at 2 x their size, an int
    # (clear_buf in FlashInfer's trtllm_allreduce_fusion.cuh).
    each = group.size * capacity * partial.shape[1] * partial.dtype.itemsize
    if 2 * each >= 1 << 31:
        return f"{capacity} tokens on {group.size} ranks: offsets in its buffers exceed 32 bits"
    try:
        from flashinfer.comm.trtllm_ar import get_trtllm_comm_module

        get_trtllm_comm_module()
        free, _ = torch.cuda.mem_get_info(partial.device)
    except Exception as error:
        text = str(error).splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    # Three Lamport buffers and one for two shots, each of a tensor for every rank.
    needed = 4 * each
    if needed > free:
        return f"the workspace needs {needed >> 20} MiB, {free >> 20} MiB are free"
    return ""
