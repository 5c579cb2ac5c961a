"""CUDA graphs that may hold collectives: they have to go before the communicator does.

NCCL gives a communicator up only when every graph that captured one of its collectives is destroyed
(commDestroySync in its init.cc), also where torch aborts it at the end of the process. A graph that
is alive by then, in a variable of a script or in the frames of an error, would keep the process for
ever, and its peers waiting for it.
"""

from __future__ import annotations

import atexit
import weakref

import torch

_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def new_graph() -> torch.cuda.CUDAGraph:
    """A graph to capture into, which `end_graphs` will end if nothing else has."""
    graph = torch.cuda.CUDAGraph()
    _graphs.add(graph)
    return graph


def end_graphs() -> None:
    """Destroy what was captured. Such a graph cannot be replayed any more."""
    for graph in list(_graphs):
        graph.reset()
    _graphs.clear()


atexit.register(end_graphs)
