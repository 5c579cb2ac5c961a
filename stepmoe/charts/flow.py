"""Which value flows where in a decoder layer, worked out from the steps of a ledger.

A ledger names what each step makes, not what it reads. What it reads follows from the order:
  - hidden states pass from step to step; `add` puts them on the residual stream, `norm` reads it;
  - shared and routed experts read the same value and open a branch each; a collective on a branch
    names its tensor ("experts_output"); where both branches go on as one ("a + b") they were added;
  - a value that is Replicate and is next read as Shard was cut to this rank's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from stepmoe.comm.ledger import Entry, Ledger
from stepmoe.errors import ConfigError

_BRANCHES = ("share_expert", "experts")
_FUSED = "all_reduce_add_rms_norm"


@dataclass(frozen=True)
class Value:
    """A tensor on its way from one step to the next, and its placement."""

    name: str
    placement: str


@dataclass(frozen=True)
class Node:
    """One operation: a step of the ledger, or a sum or cut that follows from its neighbours.

    Attributes:
        op: as in the ledger; "+" where branches meet; "keep_own_tokens".
        entry: the step; None for what was inferred.
        reads: what flows in, from the main line or the branches.
        makes: what flows out. For an `add` this is the residual stream.
    """

    op: str
    entry: Entry | None
    reads: tuple[Value, ...]
    makes: Value


@dataclass(frozen=True)
class Branches:
    """Chains of nodes that start from the same value, side by side."""

    chains: tuple[tuple[Node, ...], ...]


@dataclass
class LayerFlow:
    """The data flow of one layer's forward.

    Attributes:
        enters: what the previous layer (or the embedding) hands over.
        residual: the residual stream on entry; None before the first add, where it is what enters.
        items: operations in order.
        leaves: what the next layer gets.
    """

    layer: int
    enters: Value
    residual: Value | None
    items: list[Node | Branches] = field(default_factory=list)
    leaves: Value | None = None

    @property
    def nodes(self) -> list[Node]:
        """Every operation, branches included, in the order in which they ran."""
        flat: list[Node] = []
        for item in self.items:
            chains = item.chains if isinstance(item, Branches) else ((item,),)
            flat += [node for chain in chains for node in chain]
        return flat


def layer_flow(ledger: Ledger, layer: int) -> LayerFlow:
    """The data flow of decoder layer `layer` in the ledger's first forward pass.

    Raises:
        ConfigError: the ledger holds no collective, or nothing of this layer.
    """
    if not ledger.entries:
        raise ConfigError(
            "the ledger holds no collective, so there is no flow between ranks to draw: record it "
            "around a model call on at least two ranks, "
            "`with sm.Ledger() as ledger: model(input_ids)`, parallel=ParallelConfig(tp=2)"
        )
    # What a capture sends are copies made for debugging, beside the flow.
    steps = _first_pass(step for step in ledger.steps if step.site != "capture")
    flows = {flow.layer: flow for flow in _Walk().run(steps)}
    if layer not in flows:
        held = ", ".join(map(str, flows)) or "none: record it around a model call"
        raise ConfigError(f"layer {layer} is not in this ledger; layers it holds: {held}")
    return flows[layer]


def forward_layer(step: Entry) -> int | None:
    """The layer whose forward ran this step.

    A ledger books a collective under the layer whose sum it completes. Only the fused operation
    before a layer's first norm completes the sum of the layer before.
    """
    if step.layer is not None and step.op == _FUSED and step.site == "input_layernorm":
        return step.layer + 1
    return step.layer


def _first_pass(steps: Iterable[Entry]) -> list[Entry]:
    """Steps up to where a layer starts that is not behind the one before it."""
    kept: list[Entry] = []
    last = -1
    for step in steps:
        layer = forward_layer(step)
        follows_add = bool(kept) and kept[-1].op == "add" and kept[-1].site == step.site
        if layer is not None and step.site == "input_layernorm" and not follows_add:
            if layer <= last:
                break
            last = layer
        kept.append(step)
    return kept


class _Walk:
    """Follows the values through the steps of one forward pass."""

    def __init__(self) -> None:
        self.flows: list[LayerFlow] = []
        self.main: Value | None = None
        self.residual: Value | None = None
        self.chains: list[list[Node]] = []

    def run(self, steps: list[Entry]) -> list[LayerFlow]:
        for step in steps:
            layer = forward_layer(step)
            if layer is None:
                self._read_by_stack(step)
                continue
            if not self.flows or self.flows[-1].layer != layer:
                self._begin(layer, step)
            self._step(step)
        self._end()
        return self.flows

    def _begin(self, layer: int, first: Entry) -> None:
        if self.flows:
            if first.op == "add":
                self._cut_if_sharded(first)
            self._end()
        before_sum = "Partial" if first.op == _FUSED else first.placement
        enters = self.main or Value("hidden_states", before_sum)
        if first.op in ("add", _FUSED) and self.residual is None:  # recorded from the middle on
            self.residual = Value("residual", first.placement)
        self.main = enters
        self.flows.append(LayerFlow(layer, enters, self.residual))

    def _end(self) -> None:
        if self.flows:
            self._join()
            self.flows[-1].leaves = self.main

    def _read_by_stack(self, step: Entry) -> None:
        """The final norm reads what the last layer left; it may need only this rank's tokens."""
        if self.flows and step.op == "add":
            self._cut_if_sharded(step)

    def _step(self, step: Entry) -> None:
        if step.op in _BRANCHES and step.kind == "local":
            node = Node(step.op, step, (self._main(),), Value(step.tensor, step.placement))
            self.chains.append([node])
            return
        if step.kind == "collective" and step.op != _FUSED:
            for chain in self.chains:
                if chain[-1].makes.name == step.tensor:
                    makes = Value(step.tensor, step.placement)
                    chain.append(Node(step.op, step, (chain[-1].makes,), makes))
                    return
        self._join()
        if step.op == "add":
            self._cut_if_sharded(step)
            self.residual = Value(step.tensor, step.placement)
            self._append(Node("add", step, (self._main(),), self.residual))
        elif step.op == "norm":
            if self.residual is None:  # the first layer's: what enters becomes the residual stream
                self.residual = replace(self._main(), name="residual")
            makes = Value(step.tensor, step.placement)
            self._append(Node("norm", step, (self.residual,), makes))
            self.main = makes
        else:
            makes = Value(step.tensor, step.placement)
            if step.op == _FUSED:  # the ledger names the sum that goes in; two tensors come out
                makes = Value("hidden_states", step.placement)
                self.residual = Value("residual", step.placement)
            self._append(Node(step.op, step, (self._main(),), makes))
            self.main = makes

    def _join(self) -> None:
        """End the open branches: one goes on by itself, several are added."""
        if not self.chains:
            return
        chains, self.chains = tuple(map(tuple, self.chains)), []
        ends = tuple(chain[-1].makes for chain in chains)
        if len(chains) == 1:
            for node in chains[0]:
                self._append(node)
            self.main = ends[0]
            return
        self._append(Branches(chains))
        self.main = Value(" + ".join(value.name for value in ends), ends[0].placement)
        self._append(Node("+", None, ends, self.main))

    def _cut_if_sharded(self, reader: Entry) -> None:
        """Every rank holds all tokens and the reader has only its own: the others' were dropped."""
        self._join()
        main = self._main()
        if main.placement == "Replicate" and reader.placement == "Shard":
            self.main = replace(main, placement="Shard")
            self._append(Node("keep_own_tokens", None, (main,), self.main))

    def _append(self, item: Node | Branches) -> None:
        self.flows[-1].items.append(item)

    def _main(self) -> Value:
        assert self.main is not None  # _begin sets it before any step
        return self.main
