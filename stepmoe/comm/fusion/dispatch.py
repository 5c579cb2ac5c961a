"""One fused operation of a group: which implementation, agreed on by all ranks, and its run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepmoe.comm.fusion.finalize import FinalizePath, Rows, why_not
from stepmoe.comm.fusion.flashinfer_path import FlashInferPath
from stepmoe.comm.fusion.gate import (
    REQUIREMENTS,
    Choice,
    Place,
    choose,
    with_shots,
)
from stepmoe.comm.fusion.triton_path import TritonPath
from stepmoe.comm.fusion.vote import find_place
from stepmoe.comm.groups import RankGroup
from stepmoe.errors import ConfigError

#: What `force` takes: without a number of shots, the size decides.
IMPLEMENTATIONS = (
    "unfused",
    "triton",
    "triton one-shot",
    "triton two-shot",
    "flashinfer",
    "flashinfer one-shot",
    "flashinfer two-shot",
)
_PATHS = {"triton": TritonPath, "flashinfer": FlashInferPath, "finalize": FinalizePath}
_SHOTS = {"one-shot": 1, "two-shot": 2, "": None}

_forced: str | None = None


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Inside, every fused operation of this process runs in this way, or raises ConfigError.

    All ranks must be inside together. On CPU ranks "triton" runs in Triton's interpreter, which
    `Ranks` and `init_distributed` switch on there (TRITON_INTERPRET=1).
    """
    global _forced
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"force({implementation!r}): use one of {', '.join(IMPLEMENTATIONS)}")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


class Fusion:
    """What the ranks of one group have agreed on and opened. `fusion_of` keeps one a group.

    Holds no reference to the torch group, so that everything goes when the group does.
    """

    def __init__(self) -> None:
        self._place: Place | None = None
        self._refused: dict[str, str] = {}
        self._paths: dict[tuple[str, int, torch.dtype], Any] = {}
        self._known: dict[tuple[Any, ...], Choice] = {}
        self._no_finalize: dict[tuple[Any, ...], str] = {}

    def choose(self, group: RankGroup, partial: Tensor, weight: Tensor) -> Choice:
        """The implementation for these (T, D) and (D,) tensors, ready to run on every rank.

        All ranks of the group call it together, with tensors of the same shape and dtypes. The
        first call of a kind sends a few bytes between the ranks, a repeated one does not.

        Raises:
            ConfigError: the implementation that `force` demands cannot run; on every rank.
        """
        key = (_forced, partial.shape, partial.dtype, weight.dtype)
        if (known := self._known.get(key)) is not None:
            return known
        if self._place is None:
            self._place = find_place(group, partial.device)
        if _forced is not None:
            choice = self._forced_choice(group, partial, weight, _forced)
        else:
            choice = self._own_choice(group, partial, weight)
        self._known[key] = choice
        return choice

    def run(
        self, choice: Choice, partial: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Run a choice of `choose` that is not "unfused". Returns (normalised, residual)."""
        name, shots = _split(choice.implementation)
        path = self._path(name, partial)
        result: tuple[Tensor, Tensor] = path.run(
            partial.contiguous(), residual.contiguous(), weight, eps, shots
        )
        return result

    def why_no_finalize(self, group: RankGroup, partial: Tensor, weight: Tensor) -> str:
        """Why `finalize` cannot run for such tensors; empty if it can. All ranks call it together,
        as they do `choose`."""
        key = (_forced, partial.shape, partial.dtype)
        if key not in self._no_finalize:
            self._place = self._place or find_place(group, partial.device)
            why = why_not(self._place, partial, _forced)
            self._no_finalize[key] = why or self._prepare(group, partial, weight, "finalize")
        return self._no_finalize[key]

    def finalize(
        self, rows: Rows, shared: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """FinalizePath.finalize, after `why_no_finalize` had nothing against it."""
        path: FinalizePath = self._path("finalize", shared)
        return path.finalize(rows, shared, residual, weight, eps)

    def _own_choice(self, group: RankGroup, partial: Tensor, weight: Tensor) -> Choice:
        assert self._place is not None
        num_tokens, hidden_size = partial.shape
        while True:
            choice = choose(num_tokens, hidden_size, partial.dtype, self._place, self._refused)
            name, _ = _split(choice.implementation)
            if name == "unfused":
                return choice
            problem = self._prepare(group, partial, weight, choice.implementation)
            if not problem:
                return choice
            self._refused[name] = f"cannot run: {problem}"

    def _forced_choice(
        self, group: RankGroup, partial: Tensor, weight: Tensor, forced: str
    ) -> Choice:
        name, shots = _split(forced)
        if name == "unfused":
            return Choice("unfused", "forced")
        assert self._place is not None
        problem = REQUIREMENTS[name].unmet(self._place, partial.shape[1], partial.dtype)
        if name == "flashinfer" and shots == 2 and partial.shape[0] <= group.size:
            problem = f"needs more tokens than ranks for two shots, here: {partial.shape[0]}"
        implementation = forced
        if shots is None:
            size = partial.numel() * partial.dtype.itemsize
            implementation = with_shots(name, size, group.size)
        problem = problem or self._prepare(group, partial, weight, implementation)
        if problem:
            raise ConfigError(f"force({forced!r}): {problem}")
        return Choice(implementation, "forced")

    def _prepare(
        self, group: RankGroup, partial: Tensor, weight: Tensor, implementation: str
    ) -> str:
        name, shots = _split(implementation)
        path = self._path(name, partial)
        problem: str = path.prepare(group, partial, weight, shots)
        return problem

    def _path(self, name: str, partial: Tensor) -> Any:
        kind = (name, partial.shape[1], partial.dtype)
        if kind not in self._paths:
            self._paths[kind] = _PATHS[name]()
        return self._paths[kind]


def fusion_of(group: RankGroup) -> Fusion:
    """The group's own Fusion, shared by all communicators of the group."""
    assert group.process_group is not None
    if group.process_group not in _fusions:
        _fusions[group.process_group] = Fusion()
    return _fusions[group.process_group]


_fusions: weakref.WeakKeyDictionary[dist.ProcessGroup, Fusion] = weakref.WeakKeyDictionary()


def _split(implementation: str) -> tuple[str, int | None]:
    """Name and number of shots of "triton two-shot"."""
    name, _, shots = implementation.partition(" ")
    return name, _SHOTS[shots]
