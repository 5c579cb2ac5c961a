"""The lesson: one decoder layer a file, every collective a visible line of its forward."""

from __future__ import annotations

from stepmoe.errors import ConfigError
from stepmoe.variants.base import DecoderLayer, Step, expect_boundary
from stepmoe.variants.deferred import DeferredLayer
from stepmoe.variants.fused import FusedLayer
from stepmoe.variants.reduce_scatter import ReduceScatterLayer
from stepmoe.variants.three_all_reduces import ThreeAllReducesLayer

LAYERS: dict[str, type[DecoderLayer]] = {
    "three_all_reduces": ThreeAllReducesLayer,
    "deferred": DeferredLayer,
    "fused": FusedLayer,
    "reduce_scatter": ReduceScatterLayer,
}
VARIANTS = tuple(LAYERS)


def layer_class(variant: str | type[DecoderLayer]) -> type[DecoderLayer]:
    """The decoder layer of a named variant, or a class of one's own, passed through."""
    if isinstance(variant, type) and issubclass(variant, DecoderLayer):
        return variant
    if variant not in VARIANTS:
        raise ConfigError(
            f"variant {variant!r} is not known: use one of {', '.join(VARIANTS)}, "
            "or a subclass of stepmoe.variants.DecoderLayer"
        )
    return LAYERS[variant]


__all__ = [
    "LAYERS",
    "VARIANTS",
    "DecoderLayer",
    "DeferredLayer",
    "FusedLayer",
    "ReduceScatterLayer",
    "Step",
    "ThreeAllReducesLayer",
    "expect_boundary",
    "layer_class",
]
