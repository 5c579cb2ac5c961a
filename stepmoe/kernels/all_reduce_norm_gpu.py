"""All-reduce + residual add + RMSNorm as one kernel, in Triton, over a `Window`.

Every rank copies its partial sums into its own window, waits until the others have done so, and
reads theirs. One shot: every rank sums every row. Two shots: every rank sums its part of the
columns, and hands the sums to all.

A program waits only for the program of the same number in the other ranks, and row t always belongs
to program t % PROGRAMS; so rows of different programs never meet. What keeps a fast rank from
overwriting what a slow one still reads:
- partial sums go into two slots in turn; whoever passes meeting n + 1 knows that all ranks have
  left call n, so the slot of call n is free in call n + 2;
- complete sums are written after a call's first meeting, when all ranks have left the call before.
Meetings are counted in device memory, so that a captured CUDA graph can be replayed.

Both sum in rank order, in float32, and round the sum to the tensors' dtype before the residual is
added: each row's result has the same bits on every rank, in one shot or two, whatever rows travel
with it.

    T tokens, D hidden, COLUMNS and PART_COLUMNS the next powers of two of D and D // WORLD.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepmoe.kernels.window import PROGRAMS, Window

#: Looks at the flags before a rank gives its peers up: about six minutes on an H100.
MAX_LOOKS = 1 << 30


@triton.jit
def put_row(window, source, at, inside):
    """Copy one row of the partial sums to where the other ranks can read it."""
    tl.store(window, tl.load(source + at, mask=inside), mask=inside)


@triton.jit
def meet(flags, number, RANK: tl.constexpr, WORLD: tl.constexpr, MAX_LOOKS: tl.constexpr):
    """Tell this program's peers that it is here, and wait until all are.

    What any of them wrote before is visible to all of them after.
    """
    program = tl.program_id(0)
    ranks = tl.arange(0, WORLD)
    tl.debug_barrier()  # every thread's stores come before the flags
    theirs = tl.load(flags + ranks).to(tl.pointer_type(tl.int32)) + program * WORLD + RANK
    tl.atomic_xchg(theirs, number, sem="release", scope="sys")
    mine = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + program * WORLD + ranks
    missing = WORLD
    looks = 0
    while (missing > 0) & (looks < MAX_LOOKS):
        seen = tl.atomic_add(mine, 0, sem="acquire", scope="sys")
        # A difference, not a comparison: the count may wrap around, and a peer may be one ahead.
        missing = tl.sum((seen - number < 0).to(tl.int32))
        looks += 1
    tl.device_assert(missing == 0, "a rank did not come to the meeting")
    tl.debug_barrier()  # no thread reads before the flags were seen


@triton.jit
def sum_in_rank_order(windows, at, inside, WORLD: tl.constexpr):
    """The sum over the ranks of what each has at this place, in float32."""
    total = tl.load(windows[0] + at, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, WORLD):
        total += tl.load(windows[rank] + at, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def add_norm_row(total, residual, gain, normed, new_residual, at, inside, eps, D: tl.constexpr):
    """Add a complete sum to the residual, normalise, and write both."""
    dtype = residual.dtype.element_ty
    before = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    after = (total.to(dtype).to(tl.float32) + before).to(dtype)
    tl.store(new_residual + at, after, mask=inside)
    wide = after.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / D + eps)
    tl.store(normed + at, (wide * scale * gain).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "capacity"])
def one_shot_kernel(
    partial, residual, weight, normed, new_residual, windows, flags, meetings, capacity,
    num_tokens, eps, D: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
    RANK: tl.constexpr, WORLD: tl.constexpr, MAX_LOOKS: tl.constexpr,
):  # fmt: skip
    """Every rank reads all rows of all ranks: one meeting, WORLD - 1 times the bytes."""
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < D
    gain = 1.0 + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    number = tl.load(meetings + program) + 1
    slot = (number & 1) * capacity * D

    token = program
    while token < num_tokens:
        at = token * D + columns
        put_row(windows[RANK] + slot + at, partial, at, inside)
        token += PROGRAMS
    meet(flags, number, RANK, WORLD, MAX_LOOKS)
    token = program
    while token < num_tokens:
        at = token * D + columns
        total = sum_in_rank_order(windows, slot + at, inside, WORLD)
        add_norm_row(total, residual, gain, normed, new_residual, at, inside, eps, D)
        token += PROGRAMS
    tl.store(meetings + program, number)


@triton.jit(do_not_specialize=["num_tokens", "capacity"])
def two_shot_kernel(
    partial, residual, weight, normed, new_residual, windows, flags, meetings, capacity,
    num_tokens, eps, D: tl.constexpr, COLUMNS: tl.constexpr, PART_COLUMNS: tl.constexpr,
    PROGRAMS: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, MAX_LOOKS: tl.constexpr,
):  # fmt: skip
    """Every rank sums its D / WORLD columns and hands them to all: two meetings, fewer bytes."""
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < D
    # A part of a row is too short for wide loads by all threads: WORLD rows' parts at a time.
    rows = program + PROGRAMS * tl.arange(0, WORLD)[:, None]
    part = tl.arange(0, PART_COLUMNS)[None, :]
    gain = 1.0 + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    number = tl.load(meetings + program) + 1
    slot = (number & 1) * capacity * D
    sums = 2 * capacity * D

    token = program
    while token < num_tokens:
        at = token * D + columns
        put_row(windows[RANK] + slot + at, partial, at, inside)
        token += PROGRAMS
    meet(flags, number, RANK, WORLD, MAX_LOOKS)
    token = program
    while token < num_tokens:
        at = rows * D + RANK * (D // WORLD) + part
        is_own = (rows < num_tokens) & (part < D // WORLD)
        total = sum_in_rank_order(windows, slot + at, is_own, WORLD)
        for rank in tl.static_range(WORLD):
            tl.store(windows[rank] + sums + at, total.to(partial.dtype.element_ty), mask=is_own)
        rows += PROGRAMS * WORLD
        token += PROGRAMS * WORLD
    meet(flags, number + 1, RANK, WORLD, MAX_LOOKS)
    token = program
    while token < num_tokens:
        at = token * D + columns
        total = tl.load(windows[RANK] + sums + at, mask=inside, other=0.0)
        add_norm_row(total, residual, gain, normed, new_residual, at, inside, eps, D)
        token += PROGRAMS
    tl.store(meetings + program, number + 1)


def fused_all_reduce_add_rms_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, window: Window, shots: int
) -> tuple[Tensor, Tensor]:
    """Complete the sum, add it to the residual, normalise. Returns (normalised, residual).

    Every rank of the window calls it with the same shapes; nothing here waits on the host.

    Args:
        partial, residual: (T, D) contiguous, float32, bfloat16 or float16, T at most the window's
            capacity, D a multiple of the number of ranks.
        weight: (D,) of any floating dtype: the norm multiplies by 1 + weight, in float32.
        shots: 1 or 2.
    """
    normed, new_residual = torch.empty_like(residual), torch.empty_like(residual)
    arguments = _arguments(partial, residual, weight, normed, new_residual, eps, window)
    kernel, constants = _kernel(window, shots)
    grid = (min(partial.shape[0], PROGRAMS),)
    if grid[0]:
        kernel[grid](*arguments, **constants)
    return normed, new_residual


def compile_fused(
    dtype: torch.dtype, weight_dtype: torch.dtype, window: Window, shots: int
) -> None:
    """Compile what a call with these dtypes will launch, and launch nothing.

    A rank that compiles within a call keeps its peers' GPUs waiting.
    """
    if is_interpreted():
        return
    device, hidden_size = window.rows[0].device, window.rows[0].shape[2]
    row = torch.empty(1, hidden_size, dtype=dtype, device=device)
    weight = torch.empty(hidden_size, dtype=weight_dtype, device=device)
    kernel, constants = _kernel(window, shots)
    arguments = _arguments(row, row, weight, row, row, 1e-5, window)
    kernel.warmup(*arguments, grid=(1,), **constants)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs these kernels, on CPU tensors (TRITON_INTERPRET=1)."""
    return not isinstance(one_shot_kernel, triton.JITFunction)


def _arguments(
    partial: Tensor, residual: Tensor, weight: Tensor, normed: Tensor, new_residual: Tensor,
    eps: float, window: Window,
) -> tuple[Any, ...]:  # fmt: skip
    tensors = (partial, residual, weight, normed, new_residual)
    return (
        *tensors,
        window.rows,
        window.flags,
        window.meetings,
        window.capacity,
        partial.shape[0],
        eps,
    )


def _kernel(window: Window, shots: int) -> tuple[Any, dict[str, Any]]:
    """The kernel and its compile-time constants."""
    world, hidden_size = len(window.rows), window.rows[0].shape[2]
    constants: dict[str, Any] = {
        "D": hidden_size,
        "COLUMNS": triton.next_power_of_2(hidden_size),
        "PROGRAMS": PROGRAMS,
        "RANK": window.rank,
        "WORLD": world,
        "MAX_LOOKS": MAX_LOOKS,
    }
    if shots == 2:
        constants["PART_COLUMNS"] = triton.next_power_of_2(hidden_size // world)
    if not is_interpreted():
        # debug: device_assert ends a rank whose peers are gone. It would also check every integer
        # for overflow, which the meetings' wrap-around must not fail on.
        constants |= {"num_warps": 8, "debug": True, "sanitize_overflow": False}
    return (one_shot_kernel if shots == 1 else two_shot_kernel), constants
