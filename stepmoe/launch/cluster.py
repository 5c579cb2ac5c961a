"""An ipyparallel cluster of engines: started, watched, stopped."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, TypeVar

import ipyparallel
import psutil
from traitlets.config import Config

from stepmoe.launch import watch

Result = TypeVar("Result")

LOCAL = "local"
LOOPBACK = ("", "127.0.0.1", "localhost", "::1")
# Engines import torch; a slow disk or a batch queue takes its time.
_START_TIMEOUT = {LOCAL: 120.0, "": 900.0}
_END_TIMEOUT = 3.0  # for their answer that they have; the launcher's own way follows

_CONTROLLER_ARGUMENTS = (
    "--log-level=WARN",
    "--nodb",  # by default the controller keeps every result for ever
    "--IPController.use_threads=True",  # one process instead of eight
    # Engines are registered at a heartbeat, so beats are short (ms); and a busy rank misses some,
    # so many may be missed: deaths are noticed by other means.
    "--HeartMonitor.period=200",
    "--HeartMonitor.max_heartmonitor_misses=300",
)

_log = logging.getLogger(__name__)
_log.setLevel(logging.CRITICAL)  # ipyparallel's "Starting 4 engines" belongs in no notebook


class Cluster:
    """A controller and its engines, until `stop`.

    Attributes:
        folder: private to this user; holds keys, logs and the rendezvous.
        engines: a view on each engine, in ipyparallel's order.
        deaths: (process id, exit code) of each local engine that has ended.
        on_death: called with the same when it happens, from a thread.
        umask: of this process.
    """

    def __init__(self, n: int, engines: str, options: dict[str, Any]) -> None:
        self.local = engines == LOCAL
        self.folder = Path(tempfile.mkdtemp(prefix="stepmoe-"))  # mode 0700
        self.deaths: list[tuple[int, int | None]] = []
        self.on_death: Callable[[int, int | None], None] = lambda pid, code: None
        # IPython puts one here that others may read, unless it exists.
        readme = self.folder / "startup" / "README"
        readme.parent.mkdir(mode=0o700)
        readme.touch(mode=0o600)
        self._stopping = False
        self._loop = _LoopThread()
        self._client: Any = None
        self._first_death: Future[tuple[int, int | None]] = Future()
        self._cluster = ipyparallel.Cluster(
            n=n, engines=engines, **_settings(self.folder, self.local, options)
        )
        try:
            self._start(n, engines)
        except BaseException:
            self.stop()
            raise

    def _start(self, n: int, engines: str) -> None:
        self.umask = os.umask(0o077)  # ipyparallel's log files, too, are for this user alone
        try:
            self._loop.run(self._cluster.start_cluster())
        finally:
            os.umask(self.umask)
        for launcher in self._launchers():
            launcher.on_stop(self._ended)
        self._client = self._loop.run(self._cluster.connect_client())
        limit = _START_TIMEOUT[LOCAL if self.local else ""]
        ready = self._client.wait_for_engines(n, block=False, interactive=False)
        wait([ready, self._first_death], timeout=limit, return_when=FIRST_COMPLETED)
        if not ready.done() or ready.exception():
            raise RuntimeError(
                f"{len(self._client.ids)} of {n} ranks started with engines={engines!r}"
                f" (waited for {limit:g} s at most). The end of the log:\n{self._log_tail()}"
            )
        self.engines = [self._client[identity] for identity in self._client.ids]

    def interrupt(self, engine: Any, pid: int) -> None:
        """Send SIGINT to one engine."""
        with contextlib.suppress(ProcessLookupError):
            if self.local:
                os.kill(pid, signal.SIGINT)
            else:
                self._client.send_signal(signal.SIGINT, engine.targets, block=False)

    def stop(self) -> None:
        """End all processes and remove the folder; again does nothing."""
        if self._stopping:
            return
        self._stopping = True
        if self._client is not None:
            if not self.local:
                self._end_engines()
            self._client.close(linger=0)
        controller = self._cluster.controller
        for launcher in [*self._launchers(), *([controller] if controller else [])]:
            _end_session(launcher.pid)
        with contextlib.suppress(Exception):  # ended already, or never begun
            self._loop.run(self._cluster.stop_cluster(), timeout=10)
        self._loop.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_engines(self) -> None:
        """End engines by way of the controller, which can reach those on other hosts."""
        with contextlib.suppress(Exception):  # the controller may be gone
            self._client.send_signal(signal.SIGKILL, block=False)
        limit = time.monotonic() + _END_TIMEOUT
        while self._client.ids and time.monotonic() < limit:
            time.sleep(0.02)

    def _launchers(self) -> list[Any]:
        """Of each local engine; those of a batch system are one."""
        engine_set = self._cluster.engine_set
        return list(engine_set.launchers.values()) if self.local and engine_set else []

    def _ended(self, data: dict[str, Any]) -> None:
        if self._stopping:
            return
        death = int(data["pid"]), data.get("exit_code")
        self.deaths.append(death)
        if not self._first_death.done():
            self._first_death.set_result(death)
        self.on_death(*death)

    def _log_tail(self) -> str:
        engine_set = self._cluster.engine_set
        logs = sorted((self.folder / "log").glob("*.log"), key=lambda path: path.stat().st_mtime)
        texts = [path.read_text(errors="replace") for path in logs]
        if engine_set is not None:
            texts.append(engine_set.get_output())
        return "\n".join("".join(texts).splitlines()[-15:])


def _settings(folder: Path, local: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for ipyparallel.Cluster; `options` come last, so that they decide."""
    config = Config()
    settings: dict[str, Any] = {
        "profile_dir": str(folder),
        "cluster_id": "ranks",
        "load_profile": False,
        "shutdown_atexit": False,
        "delay": 0,
        "log": _log,
    }
    me = psutil.Process()
    watched = [sys.executable, "-P", watch.__file__]
    watched += [str(me.pid), str(me.create_time()), str(folder)]
    config.LocalControllerLauncher.controller_cmd = [*watched, "controller"]
    if local:
        settings["send_engines_connection_env"] = False  # the engines wait for it themselves
        settings["controller_location"] = "127.0.0.1"
        config.LocalEngineSetLauncher.engine_cmd = [*watched, "engine"]
        config.LocalEngineSetLauncher.delay = 0
        config.LocalEngineSetLauncher.engine_args = [
            "--log-level=WARN",  # it writes a line a call otherwise
            "--IPEngine.enable_nanny=False",  # a process beside each engine, to see it end
            "--IPEngine.timeout=60",
        ]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        config.LocalEngineSetLauncher.environment = {"PYTHONPATH": path}
    config.merge(options.get("config", Config()))
    arguments = [*_CONTROLLER_ARGUMENTS, *options.get("controller_args", ())]
    if not local or options.get("controller_ip", "") not in LOOPBACK:
        arguments.append("--IPController.enable_curve=True")
    return settings | options | {"config": config, "controller_args": arguments}


def _end_session(pid: int) -> None:
    """End an engine and what it started: the launcher made it the leader of a session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


class _LoopThread:
    """An event loop in a thread; ipyparallel's launchers tell of ended processes through it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="stepmoe cluster", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
