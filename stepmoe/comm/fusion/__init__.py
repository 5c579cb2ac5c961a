"""All-reduce + residual add + RMSNorm as one operation: three implementations, and who chooses.

gate.py             the limits and requirements as data, and `choose`
vote.py             how the ranks agree before any of them enters
window.py           memory that every rank of a group can read
triton_path.py      stepmoe.kernels.all_reduce_norm_gpu over such a window
flashinfer_path.py  FlashInfer's kernel over its own workspace
dispatch.py         what a Communicator calls
finalize.py         an extra: FlashInfer's kernel that also sums the experts' rows
"""

from stepmoe.comm.fusion.dispatch import IMPLEMENTATIONS, Fusion, force, fusion_of
from stepmoe.comm.fusion.finalize import FINALIZE, FINALIZE_MAX_TOKENS, Rows, Unsummed
from stepmoe.comm.fusion.gate import (
    GATES,
    ONE_SHOT_MAX_BYTES,
    REQUIREMENTS,
    TRITON_FASTER_FROM_BYTES,
    Choice,
    Gate,
    Place,
    Requirement,
    choose,
)

__all__ = [
    "FINALIZE",
    "FINALIZE_MAX_TOKENS",
    "GATES",
    "IMPLEMENTATIONS",
    "ONE_SHOT_MAX_BYTES",
    "REQUIREMENTS",
    "TRITON_FASTER_FROM_BYTES",
    "Choice",
    "Fusion",
    "Gate",
    "Place",
    "Requirement",
    "Rows",
    "Unsummed",
    "choose",
    "force",
    "fusion_of",
]
