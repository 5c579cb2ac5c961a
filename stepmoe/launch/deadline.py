"""The time limit of a call, kept inside each rank: it alone can say where it is."""

import math
import signal
import threading
import time
from typing import Any

from stepmoe.launch.where import where_is_main_thread

# Between telling where it is and stopping (s): the first rank to stop frees its peers, and they
# should have told by then.
_PAUSE = 0.25


class Deadline:
    """A thread that, when a call outlasts its limit, reports where it is and interrupts it.

    One thread for all calls, woken only when a limit is nearer than the one it sleeps for: a
    short call costs no more than taking a lock.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at = math.inf  # when the current call's limit is, on the monotonic clock
        self._wakes_at = math.inf
        self._call = 0
        self._where = ""

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def begin(self, timeout: float | None) -> None:
        """A call starts that may take `timeout` seconds (None: any time)."""
        with self._changed:
            self._call += 1
            self._where = ""
            self._at = math.inf if timeout is None else time.monotonic() + timeout
            if self._at < self._wakes_at:
                self._changed.notify()

    def end(self) -> str:
        """The call has ended; where it was at its limit, or "" if it kept it."""
        with self._changed:
            self._at = math.inf
            return self._where

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._wakes_at = self._at
                left = self._at - time.monotonic()
                if left > 0:
                    self._changed.wait(None if math.isinf(left) else left)
                    continue
                self._at = math.inf
                self._where = where_is_main_thread()
                call = self._call
            publish({"where": self._where})
            time.sleep(_PAUSE)
            with self._changed:
                over = call != self._call
            if not over:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def publish(data: dict[str, Any]) -> None:
    """Send news of the running call to the notebook, which need not have asked."""
    from ipyparallel.engine.datapub import publish_data

    publish_data(data)
