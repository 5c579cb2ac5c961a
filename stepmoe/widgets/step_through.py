"""One decoder layer, operation by operation: which tensors exist, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from stepmoe.charts.flow import forward_layer
from stepmoe.charts.steps import layer_steps, steps
from stepmoe.comm.ledger import Ledger
from stepmoe.errors import ConfigError
from stepmoe.widgets.explorer import Explorer, choice, slider


class StepThrough(Explorer):
    """Step through one layer of a variant, as recorded.

    The ledgers come from real ranks:

        passes = ranks.run(lesson.forward_pass, "deferred", parallel, input_ids)
        widgets.StepThrough({"deferred": passes[0].ledger})

    Args:
        by_variant: a name, best one of sm.VARIANTS, to one rank's ledger of a model call.
        layer: decoder layer to begin with; None means the first with experts.

    Raises:
        ConfigError: no ledger, one without collectives, or one without this layer.
    """

    def __init__(self, by_variant: Mapping[str, Ledger], layer: int | None = None) -> None:
        if not by_variant:
            raise ConfigError("no variant to step through: give {'deferred': ledger, ...}")
        self.ledgers = dict(by_variant)
        layers = set.intersection(*(_layers(ledger) for ledger in self.ledgers.values()))
        first = _first_moe(next(iter(self.ledgers.values()))) if layer is None else layer
        for ledger in self.ledgers.values():
            layer_steps(ledger, first)  # names what is missing before anything is drawn
        self.variant = choice("variant", list(self.ledgers), next(iter(self.ledgers)))
        self.layer = choice("layer", sorted(layers), first)
        self.step = slider(ipywidgets.IntSlider, "operation", min=0, max=self._last(first), value=1)
        self.back = ipywidgets.Button(description="◀ back", tooltip="the operation before")
        self.on = ipywidgets.Button(description="next ▶", tooltip="the next operation")
        super().__init__([[self.variant, self.layer], [self.back, self.on, self.step]])
        self.watch(self.step)
        self.watch(self.variant, self.layer, then=self._other)
        self.back.on_click(lambda _: self._move(-1))
        self.on.on_click(lambda _: self._move(1))

    def figures(self) -> list[Figure]:
        """The moment after the present operation."""
        ledger, layer = self.ledgers[self.variant.value], self.layer.value
        title = (
            f"{self.variant.value}, layer {layer}: operation {self.step.value} of {self.step.max}"
        )
        return [steps(ledger, layer, self.step.value, title)]

    def summary(self) -> str:
        """The present operation, and every tensor with its placement."""
        moment = layer_steps(self.ledgers[self.variant.value], self.layer.value)[self.step.value]
        held = ", ".join(f"{value.name} {value.placement}" for value in moment.live)
        name = moment.node.op if moment.node else "on entry"
        return (
            f"{self.variant.value}, layer {self.layer.value}, operation {self.step.value} of "
            f"{self.step.max} ({name}): {held}"
        )

    def _last(self, layer: int) -> int:
        return len(layer_steps(self.ledgers[self.variant.value], layer)) - 1

    def _other(self, *_: Any) -> None:
        """Another variant or layer begins with its first operation."""
        with self.pause():
            self.step.value = 1
            self.step.max = self._last(self.layer.value)

    def _move(self, by: int) -> None:
        self.step.value = min(max(self.step.value + by, 0), self.step.max)


def _layers(ledger: Ledger) -> set[int]:
    layers = (forward_layer(step) for step in ledger.steps if step.site != "capture")
    return {layer for layer in layers if layer is not None}


def _first_moe(ledger: Ledger) -> int:
    layers = [step.layer for step in ledger.steps if step.op == "experts"]
    first = next((layer for layer in layers if layer is not None), None)
    if first is None:
        raise ConfigError(
            "the ledger holds no MoE layer: record it around a model call, or give layer=0"
        )
    return first
