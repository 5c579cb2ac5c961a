"""Times of a run on a GPU whose cache is cold, launched by the host or replayed from a graph."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator

import torch

from stepmoe.comm.graphs import capture
from stepmoe.measure.clock import seconds_of

_REPEATS = 11
_PAIRS = 15  # of the runs that are compared


class Flush:
    """Times on a GPU whose cache holds nothing of what is timed."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._other = torch.empty(size, dtype=torch.uint8, device=device)

    def median(self, run: Callable[[], object]) -> float:
        """Median seconds of a run, by CUDA events."""
        run()
        return statistics.median(self._times(run))

    def median_difference(
        self, longer: Callable[[], object], shorter: Callable[[], object]
    ) -> float:
        """Median seconds that `longer` takes more than `shorter`, of runs in turn.

        Each run is compared with those just before and after it, so that what slows down a stretch
        of runs of both (a busy host, a lower clock) drops out.
        """
        longer()
        shorter()
        times = [(self._time(longer), self._time(shorter)) for _ in range(_PAIRS)]
        within = [more - less for more, less in times]
        between = [more - less for (_, less), (more, _) in itertools.pairwise(times)]
        return statistics.median(within + between)

    def _times(self, run: Callable[[], object]) -> Iterator[float]:
        for _ in range(_REPEATS):
            yield self._time(run)

    def _time(self, run: Callable[[], object]) -> float:
        self._other.zero_()
        return seconds_of(run, self._device)


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """The same as one replay of a CUDA graph. It does not keep what `run` reads: keep `run`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
        stream.synchronize()
        with capture(stream=stream) as graph:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
