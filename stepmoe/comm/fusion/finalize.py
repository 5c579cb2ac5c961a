"""One step further: the experts' weighted sum and the shared expert in the fused kernel as well.

FlashInfer's MoE-finalize kernel takes the rows of the experts as they come out of down_proj, sums
those of each token, adds the shared expert, and then does what the fused all-reduce does: one
kernel where there are two, and the partial sum never in memory. Its indices are `RowOrder`'s
positions, -1 where another rank has the expert. Read in the source of 0.6.13:

- Weights, products and sums are in the tensors' dtype, each rounded. The same arithmetic in torch
  errs 1.3 (2 ranks) to 1.7 times (8 ranks) as much in bfloat16 as that of the two kernels. The
  weights are read as that dtype, whatever they are. `fp32_acc` and `use_oneshot` do not reach it.
- A hidden size that is no multiple of 256 reads and writes beyond a token (1344, say).
- It reads each rank's addend in *that rank's* buffer, where the one it is derived from, TensorRT-
  LLM's, reads its own. A rank clears its buffer at the start of its next call on this workspace; a
  slower one that has not read it yet would wait for ever. So the workspace is one that nothing else
  uses, and between two calls the group must run another collective, which no rank leaves before
  all have left the first call. A layer has one: that of its attention.

With that release it was right on one H200 that 2, 4 or 8 ranks shared, also in a CUDA graph. Its
speed has not been measured here: FlashInfer #2269 reports a gain for 6 tokens of DeepSeek-V3, and a
loss from 16 on. So it is an extra: `FusedLayer` never asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.comm.entry import Entry
from stepmoe.comm.fusion.flashinfer_path import FlashInferPath
from stepmoe.comm.fusion.gate import Choice, Place, Requirement
from stepmoe.comm.ledger import record
from stepmoe.comm.placement import Placed
from stepmoe.kernels.permute import RowOrder, unpermute_rows

#: FlashInfer's kOneShotMaxToken; it warns beyond. A layer sums larger inputs at once.
FINALIZE_MAX_TOKENS = 128
_REQUIREMENT = Requirement(
    ("one GPU a rank", "shared GPU"), (9, 10), (2, 4, 8), (torch.bfloat16, torch.float16), 256,
    "FlashInfer 0.6.13, trtllm backend",
)  # fmt: skip
FINALIZE = Choice("flashinfer moe-finalize", "the experts' rows were still to be summed")


@dataclass(frozen=True)
class Rows:
    """This rank's experts' outputs (rows, D), which of them each token has, and (T, K) weights."""

    outputs: Tensor
    order: RowOrder
    weights: Tensor


@dataclass(eq=False, kw_only=True)
class Unsummed(Placed):
    """A partial sum of which `rows` still have to be added up on this rank, onto `held`.

    Whoever asks for the tensor has it added up; only the finalize kernel does not ask.
    """

    rows: Rows | None

    @property
    def tensor(self) -> Tensor:
        """(T, D): this rank's addend of the sum."""
        if rows := self.take_rows():
            entry = Entry("sum of the experts' rows", "local", self.layer, tensor=self.name)
            with record(entry, rows.outputs.device):
                self.held = unpermute_rows(rows.outputs, rows.order, rows.weights, 0, self.held)
        return super().tensor

    def take_rows(self) -> Rows | None:
        """The rows, for who adds them up; None if that has been done."""
        rows, self.rows = self.rows, None
        return rows


class FinalizePath(FlashInferPath):
    """The kernel for one group, on workspaces of its own."""

    first_capacity = FINALIZE_MAX_TOKENS

    def finalize(
        self, rows: Rows, shared: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Sum the rows onto the shared expert's output, complete the sum, add it to the residual
        and normalise: all (T, D). Returns (normalised, residual)."""
        return self.run(
            rows.outputs.contiguous(),
            residual.contiguous(),
            weight,
            eps,
            pattern="kMoEFinalizeARResidualRMSNorm",
            expanded_idx_to_permuted_idx=rows.order.positions,
            expert_scale_factor=rows.weights.to(residual.dtype),
            shared_expert_output=shared.contiguous(),
        )


def why_not(place: Place, partial: Tensor, forced: str | None) -> str:
    """Why the kernel is not for (T, D) tensors like this; empty if it is. One answer on all ranks.

    Args:
        forced: what an open `force` demands. "flashinfer" in any form is this kernel, too.
    """
    if forced is not None and not forced.startswith("flashinfer"):
        return f"is not what force({forced!r}) demands"
    if forced is None and place.topology == "shared GPU":
        return "would gain nothing: ranks take turns on a shared GPU"
    return _REQUIREMENT.unmet(place, partial.shape[1], partial.dtype)
