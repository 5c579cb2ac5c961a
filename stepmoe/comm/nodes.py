"""What a collective costs when ranks stand on several nodes: a fast link inside, another between.

Legend: N ranks, m of them on each node, n = N / m nodes, S bytes of the whole tensor. Every rank
has its own port to the other nodes, as in NVIDIA's DGX H100 (one 400 Gb/s port a GPU).
"""

from __future__ import annotations

from dataclasses import dataclass

from stepmoe.comm.cost import LINKS, Link, collective_time, terms
from stepmoe.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """How ranks are spread over nodes.

    Attributes:
        per_node: ranks on a node; rank 0 and the next ones are on the first.
        between: link between nodes, one rank's share of it.
    """

    per_node: int = 8
    between: Link = LINKS["infiniband"]

    def __post_init__(self) -> None:
        if self.per_node < 1:
            raise ConfigError(f"per_node={self.per_node} must be at least 1")

    def count(self, ranks: int) -> int:
        """Nodes that these ranks fill; 1 if they fit on one.

        Raises:
            ConfigError: several nodes of which one is not full.
        """
        return 1 if ranks <= self.per_node else _full_nodes(ranks, self.per_node)


def flat_time(
    operation: str,
    nbytes: float,
    ranks: int,
    ranks_per_node: int,
    link: Link,
    outer: Link,
    ports: int = 1,
) -> float:
    """Predicted seconds of rings through all ranks, node after node.

    A chunk passes on as soon as it arrives, so the latencies of its hops add up, of which one in m
    leaves the node; the bytes flow as fast as the narrowest place lets them. (So does NCCL add up
    its rings, src/graph/tuning.cc, with one inter-node hop fewer in each half.)

    Args:
        ranks: of all nodes; ranks_per_node (m) divides it.
        link: within a node; outer: between nodes, one rank's port.
        ports: rings, each with an equal part of the tensor, that leave a node through a port of
            their own. NCCL makes as many as there are ports.

    Raises:
        ConfigError: nodes that are not full, or more ports than ranks on a node.
    """
    nodes = Nodes(ranks_per_node, outer).count(ranks)
    if not 1 <= ports <= ranks_per_node:
        raise ConfigError(f"ports={ports} must be from 1 to the {ranks_per_node} ranks of a node")
    steps, sent = terms(operation, nbytes, ranks)
    crossing = -(-steps // ranks_per_node) if nodes > 1 else 0
    latency = (steps - crossing) * link.latency + crossing * outer.latency
    inside = sent / link.bandwidth if ranks_per_node > 1 else 0.0
    between = sent / ports / outer.bandwidth if nodes > 1 else 0.0
    return latency + max(inside, between)


def hierarchical_time(
    operation: str,
    nbytes: float,
    ranks: int,
    ranks_per_node: int,
    link: Link,
    outer: Link,
    algorithm: str = "ring",
) -> float:
    """Predicted seconds of a collective over nodes: rings within each node, and rings across.

    all_reduce: reduce_scatter within the node, all_reduce of each rank's S/m across nodes, then
    all_gather within; the other two are its halves. (The 2D-torus all-reduce of Mikami et al.,
    "Massively Distributed SGD: ImageNet/ResNet-50 Training in a Flash", 2018, on a grid of ranks.)
    Each rank sends as much as in one ring, but of it only 2 (n - 1)/n S/m leaves the node, over
    every port alike.

    Args:
        ranks: of all nodes; ranks_per_node (m) divides it.
        link: within a node; outer: between nodes, one rank's share.
        algorithm: within a node; between nodes it is a ring.
    """
    nodes = _full_nodes(ranks, ranks_per_node)
    across = collective_time(operation, nbytes / ranks_per_node, nodes, outer)
    if operation != "all_reduce":
        return collective_time(operation, nbytes, ranks_per_node, link, algorithm) + across
    halves = ("reduce_scatter", "all_gather")
    within = [collective_time(half, nbytes, ranks_per_node, link, algorithm) for half in halves]
    return across + sum(within)


def time_over_nodes(
    operation: str, nbytes: float, ranks: int, link: Link, nodes: Nodes, algorithm: str = "ring"
) -> tuple[float, str]:
    """Predicted seconds and the name of what runs: `algorithm` on one node; on several the faster
    of "hierarchical", which has the fewer steps, and "rings", one a port, whose bytes flow within
    and between nodes at once."""
    if nodes.count(ranks) == 1:
        return collective_time(operation, nbytes, ranks, link, algorithm), algorithm
    m, outer = nodes.per_node, nodes.between
    return min(
        (hierarchical_time(operation, nbytes, ranks, m, link, outer, algorithm), "hierarchical"),
        (flat_time(operation, nbytes, ranks, m, link, outer, ports=m), "rings"),
    )


def _full_nodes(ranks: int, per_node: int) -> int:
    """How many nodes the ranks fill; ConfigError if one is not full."""
    if per_node < 1 or ranks % per_node:
        raise ConfigError(
            f"{ranks} ranks do not fill nodes of {per_node}: the ranks per node must divide the "
            "ranks"
        )
    return ranks // per_node
