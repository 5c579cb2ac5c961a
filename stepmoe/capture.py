"""Capture: named intermediate values of chosen layers, complete and the same for every variant."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from stepmoe.checks import whole_number
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.placement import Placed
from stepmoe.errors import ConfigError

# In the order in which a layer computes them; layer_output is post_attn_residual + mlp_output.
NAMES = (
    "attn_input",
    "attn_output",
    "post_attn_residual",
    "mlp_input",
    "mlp_output",
    "layer_output",
)


class Capture:
    """Records intermediate values of a forward pass.

        capture = sm.Capture(layers=[0, 3])
        model(input_ids, capture=capture)
        capture[3]["attn_output"]      # (batch, length, hidden), on every rank the same

    The values of a layer are those in NAMES, in the model's dtype, on its device. A value that is a
    pending sum or cut by tokens is completed by an extra collective on a copy; it shows in the
    ledger with site "capture". Every rank must capture the same layers.

    Args:
        layers: which decoder layers; None means all.
    Raises:
        ConfigError: no layer's number; or, in the pass, a layer that the model does not have.
        KeyError: on reading a layer that was not captured.
    """

    def __init__(self, layers: int | Iterable[int] | None = None) -> None:
        if layers is not None:
            given = layers if isinstance(layers, Iterable) else [layers]
            layers = [whole_number("a layer", layer, least=0) for layer in given]
        self.layers = None if layers is None else frozenset(layers)
        self.states: dict[int, dict[str, Tensor]] = {}
        self._shape: tuple[int, ...] = ()

    def begin(self, batch: int, length: int, num_layers: int) -> None:
        """Start over for a forward pass over (batch, length) tokens."""
        unknown = sorted(layer for layer in self.layers or () if not 0 <= layer < num_layers)
        if unknown:
            raise ConfigError(f"capture of layers {unknown}: the model has 0 to {num_layers - 1}")
        self.states = {}
        self._shape = (batch, length, -1)

    def wants(self, layer: int) -> bool:
        """Whether values of this layer are recorded."""
        return self.layers is None or layer in self.layers

    def record(self, comm: Communicator, layer: int, name: str, value: Placed) -> None:
        """Keep a complete copy of a layer's value."""
        if self.wants(layer):
            copy = value.with_(value.tensor.clone())
            if copy.is_partial:
                copy = comm.all_reduce(copy, "capture")
            elif copy.is_sharded:
                copy = comm.all_gather(copy, "capture")
            self.states.setdefault(layer, {})[name] = copy.tensor.view(self._shape)

    def record_layer(
        self, comm: Communicator, layer: int, mlp_output: Placed, residual: Placed
    ) -> None:
        """Keep what leaves a layer: the residual is complete, the MLP's part may be pending."""
        for name, value in (("post_attn_residual", residual), ("mlp_output", mlp_output)):
            self.record(comm, layer, name, value)
        states = self.states[layer]
        states["layer_output"] = states["post_attn_residual"] + states["mlp_output"]

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        if layer not in self.states:
            raise KeyError(f"layer {layer} was not captured; there are {sorted(self.states)}")
        return self.states[layer]
