"""Tiles of a grouped product: what a program computes at a time, and whose rows they are."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """`rows` of an expert x `columns`, in steps of `depth` inputs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def tiles_of_experts(
    ends_ptr, start, count, LOCAL: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    """First row, end and number of tiles of every expert within a pass: ceil(rows / ROWS) tiles."""
    expert = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + expert, mask=expert < LOCAL, other=0)
    begins = tl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert < LOCAL), other=0)
    ends = tl.minimum(tl.maximum(ends, start), start + count)
    begins = tl.minimum(tl.maximum(begins, start), start + count)
    return begins, ends, (ends - begins + ROWS - 1) // ROWS


@triton.jit
def find_tile(
    tile, ends_ptr, start, count, LOCAL: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    """Expert, first row and end of its rows, for tile number `tile` of a pass; no row if past all.

    Tiles are counted through, those of one expert after the other.
    """
    begins, ends, tiles = tiles_of_experts(ends_ptr, start, count, LOCAL, BLOCK_E, ROWS)
    tiles_up_to = tl.cumsum(tiles, 0)
    found = tl.sum((tiles_up_to <= tile).to(tl.int32), 0)
    is_found = tl.arange(0, BLOCK_E) == found
    first = tl.sum(tl.where(is_found, begins + (tile - tiles_up_to + tiles) * ROWS, 0), 0)
    return found, first, tl.sum(tl.where(is_found, ends, 0), 0)
