"""The ranks of a cluster: who is which, on what device, over which backend."""

import socket
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from stepmoe.errors import ConfigError
from stepmoe.launch import rank, worker
from stepmoe.launch.answers import Setup
from stepmoe.launch.cluster import Cluster

_ANSWER = 60.0  # for a few lines in each rank; generous, because it bounds a hang, not a wait


@dataclass(frozen=True)
class Wanted:
    """The arguments of `Ranks`."""

    n: int
    device: str
    engines: str
    options: dict[str, Any] = field(hash=False)


@dataclass
class Member:
    """One rank as the notebook knows it: its ipyparallel engine and its process id."""

    engine: Any
    pid: int


class Team:
    """Started ranks.

    Attributes:
        members: in rank order.
        epoch: counts the process groups; ranks make a new one when a call brings a new number.
        always_restart: no failed call leaves these ranks usable.
        description: what runs where, over which backend and why.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.cluster = Cluster(wanted.n, wanted.engines, wanted.options)
        try:
            self._assemble(wanted)
            self.epoch = -1
            self.start_afresh()
        except BaseException:
            self.cluster.stop()
            raise

    def start_afresh(self) -> None:
        """Let the next call make new process groups."""
        self.epoch += 1
        # Made here, for this user alone; in the ranks the notebook's umask holds.
        self._rendezvous(self.epoch).touch(mode=0o600)
        self._rendezvous(self.epoch - 1).unlink(missing_ok=True)

    def forget(self) -> None:
        """Empty the ranks of what they hold."""
        for result in [member.engine.apply_async(worker.let_go) for member in self.members]:
            result.get(_ANSWER)
        self.start_afresh()

    def rank_of(self, pid: int) -> int:
        """The rank of a process."""
        return next(i for i, member in enumerate(self.members) if member.pid == pid)

    def _rendezvous(self, epoch: int) -> Any:
        return self.cluster.folder / f"rendezvous-{epoch}"

    def _assemble(self, wanted: Wanted) -> None:
        greetings = [engine.apply_async(worker.hello) for engine in self.cluster.engines]
        found = [
            (*greeting.get(_ANSWER), engine)
            for greeting, engine in zip(greetings, self.cluster.engines, strict=True)
        ]
        found.sort(key=lambda entry: entry[0])  # by host; ipyparallel's order within one
        ranks_on = Counter(host for host, *_ in found)
        gpus_on = {host: gpus if wanted.device != "cpu" else 0 for host, _, gpus, _ in found}
        if wanted.device == "cuda" and not all(gpus_on.values()):
            missing = ", ".join(host for host, gpus in gpus_on.items() if not gpus)
            raise ConfigError(f'device="cuda": torch sees no GPU on {missing}')
        on_gpu = all(gpus_on.values())
        shares = any(ranks_on[host] > gpus_on[host] for host in ranks_on)
        backend = rank.backend_name(shares_gpus=shares, on_gpu=on_gpu)
        self.always_restart = "nccl" in backend
        self.members = [Member(engine, pid) for _, pid, _, engine in found]
        self.description = _describe(ranks_on, gpus_on if on_gpu else None, backend, shares)
        self._set_up(found, gpus_on if on_gpu else {}, backend)

    def _set_up(self, found: list[Any], gpus_on: dict[str, int], backend: str) -> None:
        if self.cluster.local:
            rendezvous = str(self._rendezvous(0)).removesuffix("-0")
        else:
            rendezvous = self.members[0].engine.apply_async(worker.serve).get(_ANSWER)
        ranks_on = Counter(host for host, *_ in found)
        seen: Counter[str] = Counter()
        results = []
        for number, (host, _, _, engine) in enumerate(found):
            setup = Setup(
                rank=number,
                world=len(found),
                local_rank=seen[host],
                ranks_here=ranks_on[host],
                device=rank.device_name(seen[host], gpus_on.get(host, 0)),
                backend=backend,
                rendezvous=rendezvous,
                one_host=self.cluster.local,
                keep_groups=self.always_restart,
                umask=self.cluster.umask,
            )
            seen[host] += 1
            results.append(engine.apply_async(worker.set_up, setup))
        for result in results:
            result.get(_ANSWER)


def start(wanted: Wanted, old: Future[Team] | None = None) -> Future[Team]:
    """Stop the old team and start another one, while the caller goes on."""
    future: Future[Team] = Future()

    def work() -> None:
        try:
            if old is not None and not old.exception():
                old.result().cluster.stop()
            future.set_result(Team(wanted))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="stepmoe start", daemon=True).start()
    return future


def _describe(
    ranks_on: Counter[str], gpus_on: dict[str, int] | None, backend: str, shares: bool
) -> str:
    where = ", ".join(
        f"{count} on {'this host' if host == socket.gethostname() else host}"
        + (f" with {gpus_on[host]} GPU" if gpus_on else "")
        for host, count in ranks_on.items()
    )
    if not gpus_on:
        return f"{where}; cpu; backend gloo"
    if shares:
        return f"{where}; cuda; backend gloo, because ranks share a GPU and NCCL refuses that"
    return f"{where}; cuda, one GPU a rank; backend {backend}"
