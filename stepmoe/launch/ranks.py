"""`Ranks`: persistent ranks behind a notebook, or any Python process."""

import atexit
import importlib.util
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stepmoe.errors import ConfigError, RankError
from stepmoe.launch import rank as in_rank
from stepmoe.launch.answers import Setup
from stepmoe.launch.failures import AFRESH, RESTARTED, Outcome, error_from, how_it_ended

if TYPE_CHECKING:
    from stepmoe.launch.call import Call, Member
    from stepmoe.launch.cluster import Cluster


class Ranks:
    """Processes with torch.distributed initialised, ready to run a notebook's functions.

        with Ranks(4) as ranks:
            ranks.run(lambda: torch.distributed.get_rank())     # [0, 1, 2, 3]

    Without `with`, `close` ends them, and so does the end of this process, however it ends.

    One process has one set of ranks. Making a second `Ranks` with the same arguments (running a
    notebook's cell again) takes over the running ones, emptied of what they held; with other
    arguments it closes the first. Either way the first object can no longer be used.

    Ranks import modules once: after an edit to an imported module call `restart`. Functions and
    classes of the notebook itself are sent with each call.

    On this host everything stays on the loopback interface, with signed messages, and keys and
    logs in a folder that only this user can read. `engines` names another launcher of ipyparallel
    ("ssh", "slurm", "mpi", "pbs", ...), which `options` configures as for `ipyparallel.Cluster`:

        config = traitlets.config.Config()
        config.SlurmEngineSetLauncher.queue = "gpu"
        Ranks(16, engines="slurm", options={"controller_ip": "*", "config": config})

    stepmoe must be installed on those hosts. Their connections are encrypted (CURVE), and the
    ranks meet in a store on rank 0's host, which has no password: use a network you trust.
    These launchers have not been tried, for want of such hosts.

    Args:
        n: how many ranks.
        device: "cpu", "cuda" or "auto" (GPUs where there are some). Ranks that are more than the
            GPUs share them, and then communicate with gloo, because NCCL cannot.
        engines: ipyparallel's name for how they are started.
        options: further arguments for `ipyparallel.Cluster`.
    Raises:
        ConfigError: an argument that cannot work, before anything starts.
        ImportError: ipyparallel is not installed.
    """

    def __init__(
        self,
        n: int,
        device: str = "auto",
        *,
        engines: str = "local",
        options: dict[str, Any] | None = None,
    ) -> None:
        global _current
        self._closed: str | None = "they were not started"
        _check(n, device, engines)
        self._wanted = _Wanted(n, device, engines, options or {})
        self._lock = threading.RLock()
        self._closed = None
        previous, _current = _current, self
        if previous is not None and previous._closed is None and previous._wanted == self._wanted:
            self._team = previous._hand_over()
            self._epoch = previous._epoch
            self._start_afresh()
        else:
            if previous is not None:
                previous._close("a Ranks with other arguments was made")
            self._epoch = 0
            self._team = _started(self._wanted)
        atexit.register(self.close)
        try:
            self.run(_nothing, timeout=_JOIN)
        except BaseException:
            self.close()
            raise

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = 60,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(*args, **kwargs)` in every rank and wait.

        What the ranks print is printed here afterwards, rank by rank. To keep something in a
        rank until the next call, put it into the dict `stepmoe.launch.rank.state`; a call that
        fails empties it and makes the process groups anew.

        Args:
            fn: a function, defined anywhere: imported, in a notebook's cell, a lambda, a closure.
            timeout: seconds, or None for no limit.
        Returns:
            One result a rank, in rank order; tensors on a GPU come back on the CPU.
        Raises:
            RankError: a rank raised or ended; names the first that did.
            RankTimeout: the limit passed; says what each rank was waiting in.
            ConfigError, TypeError: an argument that cannot work; nothing was sent.
        """
        _check_call(fn, timeout)
        with self._lock:
            self._check_open()
            payload = _packed(fn, args, kwargs)
            team = self._ready_team()
            from stepmoe.launch.call import Call

            call = Call(team.cluster, team.members, payload, self._epoch, timeout)
            try:
                call.wait()
            except KeyboardInterrupt:
                self._clean_up(call)
                raise
            if call.outcome.failed or len(call.outcome.answers) < self._wanted.n:
                after = self._clean_up(call)
                _print(call.output())
                raise error_from(call.outcome, self._wanted.n, timeout, after) from None
            _print(call.output())
            return _unpacked(call.outcome)

    def restart(self) -> None:
        """End the ranks and start new ones, which import everything anew."""
        with self._lock:
            self._check_open()
            self._restart()
            self._ready_team()

    def close(self) -> None:
        """End the ranks; again does nothing."""
        self._close("close() was called")

    def describe(self) -> str:
        """What runs where, over which backend and why."""
        with self._lock:
            return self._closed or self._ready_team().description

    def __repr__(self) -> str:
        if self._closed:
            return f"Ranks(closed: {self._closed})"
        return f"Ranks({self._wanted.n}, device={self._wanted.device!r}): {self.describe()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                f"these ranks are closed ({self._closed}): make new ones with "
                f"Ranks({self._wanted.n}, device={self._wanted.device!r})"
            )

    def _ready_team(self) -> "_Team":
        """The ranks, started if they are being restarted; reports one that ended in between."""
        team = self._team.result()
        if team.deaths:
            pid, code = team.deaths[0]
            rank = next(i for i, member in enumerate(team.members) if member.pid == pid)
            self._restart()
            raise RankError(
                f"rank {rank} {how_it_ended(code)} between two calls\n{RESTARTED}", rank=rank
            )
        return team
