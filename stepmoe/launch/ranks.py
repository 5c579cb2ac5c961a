"""`Ranks`: persistent ranks behind a notebook, or any Python process."""

import atexit
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stepmoe.errors import RankError
from stepmoe.launch.arguments import check_call, checked, packed, unpacked
from stepmoe.launch.failures import AFRESH, RESTARTED, error_from, how_it_ended

if TYPE_CHECKING:
    from stepmoe.launch.call import Call
    from stepmoe.launch.team import Team


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
    When this process is killed, they end by themselves, within a minute of their last call. Tried
    with Open MPI on one host; several hosts, ssh and batch systems have not been tried.

    Args:
        n: how many ranks.
        device: "cpu", "cuda" or "auto" (GPUs where there are some). Ranks that are more than the
            GPUs share them, and then communicate with gloo, because NCCL cannot.
        engines: ipyparallel's name for how they are started.
        options: further arguments for `ipyparallel.Cluster`: those in `launch.arguments.OPTIONS`.
    Raises:
        ConfigError: an argument that cannot work, before anything starts.
        ImportError: ipyparallel is not installed.
        RuntimeError: fewer than n started; with the end of their log.
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
        options = options or {}
        n = checked(n, device, engines, options)
        from stepmoe.launch.team import Wanted

        self._wanted = Wanted(n, device, engines, options)
        self._lock = threading.RLock()
        self._closed: str | None = None  # or why
        self._team = self._take_over(_current)
        _current = self
        atexit.register(self.close)
        try:
            self.run(_nothing)  # makes the process group
        except BaseException:
            self.close()
            raise

    def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        timeout: float | None = 60,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `fn(*args, **kwargs)` in every rank and wait.

        What the ranks print is printed here afterwards, rank by rank. To keep something in a
        rank until the next call, put it into the dict `stepmoe.launch.rank.state`; a call that
        fails or destroys the process group empties it, and the next has new groups. Arguments and
        results are copied: of a tensor that is a view only what it shows, so that views of one
        memory share none there.

        Args:
            fn: a function, defined anywhere: imported, in a notebook's cell, a lambda, a closure.
            timeout: seconds, or None for no limit. A function's own argument of this name has to
                be bound with functools.partial.
        Returns:
            One result a rank, in rank order; tensors on a GPU come back on the CPU.
        Raises:
            RankError: a rank raised or ended; names the first that did.
            RankTimeout: the limit passed; says what each rank was waiting in.
            ConfigError, TypeError: an argument that cannot work; nothing was sent.
        """
        check_call(fn, timeout)
        with self._lock:
            self._check_open()
            payload = packed(fn, args, kwargs)
            from stepmoe.launch.call import Call

            call = Call(self._ready_team(), payload, timeout)
            try:
                call.wait()
            except BaseException as error:  # an interrupt, or what another signal's handler raised
                self._clean_up(call)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                # A new one: the notebook then shows this call, not what waits inside it.
                raise KeyboardInterrupt("the ranks are free for the next call") from None
            if not call.succeeded:
                after = self._clean_up(call)
                raise error_from(call.outcome, self._wanted.n, timeout, after) from None
            _print(call.output())
            if call.outcome.left:
                self._team.result().forget()
            return unpacked(call.outcome.take_values())

    def restart(self) -> None:
        """End the ranks and start new ones, which import everything anew."""
        with self._lock:
            self._check_open()
            self._restart()
            self.run(_nothing)

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

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a Ranks cannot be used inside a rank: use torch.distributed there")

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

    def _take_over(self, previous: "Ranks | None") -> "Future[Team]":
        """The running ranks of an equal `Ranks`, emptied, else new ones."""
        if previous is None or previous._closed:
            return self._start()
        if previous._wanted != self._wanted:
            previous._close("a Ranks with other arguments was made")
            return self._start()
        with previous._lock:
            previous._closed = "a newer Ranks with the same arguments took its ranks over"
            atexit.unregister(previous.close)
            team = previous._team
        if team.result().cluster.deaths:
            return self._start(team)
        team.result().forget()
        return team

    def _ready_team(self) -> "Team":
        """The ranks, started if they are being restarted; reports one that ended in between."""
        team = self._team.result()
        if team.cluster.deaths:
            pid, code = team.cluster.deaths[0]
            rank = team.rank_of(pid)
            self._restart()
            raise RankError(
                f"rank {rank} {how_it_ended(code)} between two calls\n{RESTARTED}", rank=rank
            )
        return team

    def _clean_up(self, call: "Call") -> str:
        """Show what the ranks wrote and make the next call work; says how."""
        try:
            call.clean_up()
            _print(call.output())
        except KeyboardInterrupt:
            self._restart()
            raise
        if call.needs_restart:
            self._restart()
            return RESTARTED
        self._team.result().start_afresh()
        return AFRESH

    def _start(self, old: "Future[Team] | None" = None) -> "Future[Team]":
        from stepmoe.launch.team import start

        return start(self._wanted, old)

    def _restart(self) -> None:
        self._team = self._start(self._team)

    def _close(self, reason: str) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = reason
            atexit.unregister(self.close)
            if not self._team.exception():
                self._team.result().cluster.stop()


_current: Ranks | None = None


def _nothing() -> None:
    pass


def _print(written: dict[int, tuple[str, str]]) -> None:
    for rank, texts in sorted(written.items()):
        for text, stream in zip(texts, (sys.stdout, sys.stderr), strict=True):
            for line in text.splitlines():
                print(f"[rank {rank}] {line}", file=stream)
