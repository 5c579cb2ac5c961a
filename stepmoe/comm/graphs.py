"""CUDA graphs: what they need to stay right, and to end in time.

They may hold collectives, and have to go before the communicator does. NCCL gives a communicator up
only when every graph that captured one of its collectives is destroyed (commDestroySync in its
init.cc), also where torch aborts it at the end of the process. A graph that is alive by then, in a
variable of a script or in the frames of an error, would keep the process for ever, and its peers
waiting for it.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


@contextmanager
def capture(
    pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what the block launches into a graph, which `end_graphs` ends if nothing else has.

    cuBLAS gets its workspace from the graph's own memory. torch keeps one for each stream, captures
    on one and the same unless told otherwise, and frees that stream's when any graph captured there
    ends, though others go on to write into it (pytorch #193402). torch's own trees of graphs clear
    the workspaces before and after a capture, too.

    Args:
        pool: of another graph, whose memory this one may take while that is not replayed.
        stream: to capture on; None for torch's own.
    """
    graph = new_graph()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # Other threads, NCCL's watchdog for one, may ask CUDA meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            yield graph
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def new_graph() -> torch.cuda.CUDAGraph:
    """A graph to capture into, known to `end_graphs`."""
    graph = torch.cuda.CUDAGraph()
    _graphs.add(graph)
    return graph


def end_graphs() -> None:
    """Destroy what was captured. Such a graph cannot be replayed any more."""
    for graph in list(_graphs):
        graph.reset()
    _graphs.clear()


atexit.register(end_graphs)
