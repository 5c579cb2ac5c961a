"""What a lost rank costs: how the others end, and how long until the team is usable again.

Runs in the process that has the `Ranks`, which this measures as much as the ranks.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stepmoe.comm.communicator import Communicator
from stepmoe.comm.fusion import force
from stepmoe.comm.groups import build_groups, world_size
from stepmoe.errors import ConfigError, RankError, RankTimeout
from stepmoe.launch import Ranks, rank_device
from stepmoe.measure.environment import Place, look_around
from stepmoe.measure.fused_calls import TOLERANCE, call_of, error_of, make_inputs
from stepmoe.parallel import ParallelConfig

#: How a rank is lost, half way through some calls.
LOSSES = ("killed", "absent")
# So many calls; the time limit (s) of "absent"; and of everything else, in which kernels may have
# to be compiled: FlashInfer's take minutes.
_CALLS, _LIMIT, _PATIENCE = 20, 5.0, 600.0


@dataclass(frozen=True)
class Loss:
    """What became of the ranks when the last one was lost in the middle of fused all-reduces.

    Attributes:
        implementation: that ran, as `force` names it.
        how: "killed": by SIGKILL, while its peers enter the next call or wait in it; "absent": it
            never enters that call, and a time limit of 5 s ends the others.
        ended: what `Ranks.run` raised, in a line.
        error_seconds: to that error, from the kill, or from the time limit.
        usable_seconds: from there until the next call had returned the right sum on every rank.
        refusal: why it was not tried.
    """

    implementation: str
    how: str
    ended: str = ""
    error_seconds: float = math.nan
    usable_seconds: float = math.nan
    refusal: str = ""


def measure_recovery(
    ranks: Ranks, implementations: Sequence[str], tokens: int = 64, hidden_size: int = 4096
) -> tuple[list[Loss], list[Place]]:
    """Lose the last rank in every way in every implementation; and say where the ranks were.

    Raises:
        RankError, RankTimeout: a call failed in which no rank was lost.
        RuntimeError: a call succeeded without a rank, or a sum was wrong afterwards.
    """
    places = ranks.run(_place)
    losses: list[Loss] = []
    for name in implementations:
        refusal = ranks.run(_refusal, name, tokens, hidden_size, timeout=_PATIENCE)[0]
        for how in LOSSES:
            known = Loss(name, how, refusal=refusal)
            losses.append(known if refusal else _lose(ranks, known, tokens, hidden_size))
    return losses, places


def _lose(ranks: Ranks, loss: Loss, tokens: int, hidden_size: int) -> Loss:
    name, how = loss.implementation, loss.how
    ranks.run(_sums, name, tokens, hidden_size, timeout=_PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "lost"
        limit = _LIMIT if how == "absent" else _PATIENCE
        begun = time.time()
        try:
            ranks.run(_sums, name, tokens, hidden_size, how, str(mark), timeout=limit)
        except (RankError, RankTimeout) as error:
            failed = time.time()
            ended = _in_words(error)
        else:
            raise RuntimeError(f"{name}: a rank was {how}, and the call succeeded")
        lost = float(mark.read_text()) if how == "killed" else begun + limit
    errors = ranks.run(_sums, name, tokens, hidden_size, timeout=_PATIENCE)
    usable = time.time() - failed
    if not all(error < TOLERANCE for error in errors):  # so that NaN is wrong, too
        off = ", ".join(f"{error:.2g}" for error in errors)
        raise RuntimeError(f"{name}: a rank was {how}, and the next sum was off by {off}")
    return replace(loss, ended=ended, error_seconds=failed - lost, usable_seconds=usable)


def _in_words(error: RankError | RankTimeout) -> str:
    if isinstance(error, RankTimeout):
        return f"RankTimeout: rank 0: {error.waiting[0]}"
    return f"RankError: {str(error).splitlines()[0]}"


def _place() -> Place:
    return look_around(rank_device())


def _refusal(name: str, tokens: int, hidden_size: int) -> str:
    """What keeps an implementation from running here; on every rank the same."""
    try:
        _sums(name, tokens, hidden_size)
    except ConfigError as error:
        return str(error)
    return ""


def _sums(name: str, tokens: int, hidden_size: int, how: str = "", mark: str = "") -> float:
    """Fused all-reduces one after the other; the relative error of the last.

    Args:
        how: the last rank is lost in this way half way through.
        mark: the file in which it then leaves the time.
    """
    comm = Communicator(build_groups(ParallelConfig(world_size()))["tp"])
    inputs = make_inputs(comm.group, tokens, hidden_size, torch.bfloat16, _CALLS)
    inputs.fill()
    call = call_of(name, rehearsal=False)
    with force(name):
        for number in range(_CALLS):
            if how and number == _CALLS // 2 and comm.group.index == comm.group.size - 1:
                _vanish(how, mark)
            result = call(comm, inputs, number)
    return error_of(inputs, *result)


def _vanish(how: str, mark: str) -> None:
    Path(mark).write_text(str(time.time()))
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2 * _LIMIT)
