"""Scaling on paper: a prefill step of every variant over tokens, ranks and nodes.

    sub-layers   their floors (stepmoe.roofline) x one factor, how far above its floor a recorded
                 rank of eight was (`rule_of`); taken to be the same for every size: modelled
    the rest     collectives, adds, norms and their launches (stepmoe.comm.layer_cost): modelled

The floors know what a smaller share costs: the products shrink with the ranks; the rows, the router
and the key-value heads, which every rank has, do not. Nothing here was measured on more than one
GPU, and what predict.LEFT_OUT lists is left out here, too.

Legend: T tokens of a step, tp ranks, ep expert groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from stepmoe.comm.cost import LINKS
from stepmoe.comm.layer_cost import LayerTime, Machine, layer_time
from stepmoe.comm.nodes import Nodes
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig
from stepmoe.predict import RANKS, TOKENS, Compute
from stepmoe.roofline import CHIPS, Chip, SubLayer, layer_roofline
from stepmoe.variants import VARIANTS

_PASSES = ("norms", "residual adds")  # sub-layers whose time layer_cost predicts
_BASE = {"deferred": "three_all_reduces", "fused": "deferred", "reduce_scatter": "deferred"}


def _eight_a_node() -> Machine:
    return Machine(LINKS["nccl_sm90"], "pipelined", nodes=Nodes(8))


@dataclass(frozen=True)
class Rule:
    """What a scaled step rests on.

    Attributes:
        factor: time of the sub-layers over their floor.
        chip: whose floor.
        machine: links, nodes, gate of the fused kernel, memory.
        imbalance: rows of the busiest rank over the mean, where ep > 1.
        prompt: tokens of a prompt; a step of more tokens has several.
    """

    factor: float = 1.0
    chip: Chip = CHIPS["h100"]
    machine: Machine = field(default_factory=_eight_a_node)
    imbalance: float = 1.0
    prompt: int = 8192

    def __post_init__(self) -> None:
        if not self.factor > 0 or not self.imbalance >= 1 or self.prompt < 1:
            raise ConfigError(
                f"factor={self.factor} must be above 0, imbalance={self.imbalance} and prompt="
                f"{self.prompt} at least 1"
            )


@dataclass(frozen=True)
class ScaledStep:
    """A predicted step of one variant; times in seconds.

    Attributes:
        nodes: that the ranks fill.
        compute: attention, router, experts, MLPs; communication: collectives, a fused one with its
            add and norm; passes: the other adds and norms, with their launches.
    """

    variant: str
    tokens: int
    parallel: ParallelConfig
    nodes: int
    compute: float
    communication: float
    passes: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.passes

    @property
    def tokens_per_gpu_second(self) -> float:
        """Tokens a second, over the ranks."""
        return self.tokens / self.seconds / self.parallel.tp


def layout_for(config: Step3p5Config, tp: int) -> ParallelConfig:
    """Experts in groups of two ranks, as published for tp=8 and ep=4; attention cut over the ranks,
    or, where the heads cannot be (the flash shape at tp=64), data-parallel.

    Raises:
        ConfigError: neither fits the shape.
    """
    ep = max(1, tp // 2)
    try:
        parallel = ParallelConfig(tp, ep, "tp")
        parallel.check(config)
    except ConfigError:
        parallel = ParallelConfig(tp, ep, "dp")
        parallel.check(config)
    return parallel


def scaled_step(
    config: Step3p5Config, variant: str, tokens: int, tp: int, rule: Rule | None = None
) -> ScaledStep:
    """Predict a prefill step of `tokens` tokens in bfloat16 on `tp` GPUs.

    Under data-parallel attention every rank has at least one prompt, so prompts are shorter where
    there are few tokens.

    Raises:
        ConfigError: the shape cannot be cut this way, or the ranks do not fill their nodes.
    """
    rule = rule or Rule()
    parallel = layout_for(config, tp)
    rest = _layers(config, variant, tokens, parallel, rule.machine)
    communication = sum(time.communication * count for time, count in rest)
    nodes = rule.machine.nodes
    return ScaledStep(
        variant,
        tokens,
        parallel,
        nodes.count(tp) if nodes else 1,
        rule.factor * _floor(config, tokens, parallel, rule),
        communication,
        sum(time.seconds * count for time, count in rest) - communication,
    )


@lru_cache(maxsize=1024)  # every variant asks for it
def _floor(config: Step3p5Config, tokens: int, parallel: ParallelConfig, rule: Rule) -> float:
    """Seconds that the sub-layers of all layers take at least, norms and adds apart."""
    sequences = max(1, tokens // rule.prompt)
    if parallel.attention == "dp":
        sequences = max(sequences, min(tokens, parallel.tp))
    length = max(1, tokens // sequences)
    kinds = Counter(replace(layer, index=0) for layer in config.layers)
    first = {replace(layer, index=0): layer.index for layer in reversed(config.layers)}
    return sum(
        count * _slowest(sub, parallel, rule).floor(rule.chip)
        for kind, count in kinds.items()
        for sub in layer_roofline(
            config, first[kind], parallel, sequences * length, length, sequences
        )
        if sub.name not in _PASSES
    )


def _slowest(sub: SubLayer, parallel: ParallelConfig, rule: Rule) -> SubLayer:
    """On the rank with the most rows, for which the others wait at the next collective."""
    if sub.name != "routed experts" or parallel.ep == 1:
        return sub
    return replace(sub, operations=sub.operations * rule.imbalance)


def _layers(
    config: Step3p5Config, variant: str, tokens: int, parallel: ParallelConfig, machine: Machine
) -> list[tuple[LayerTime, int]]:
    """The rest of a MoE layer and of a dense one, and how many of each there are."""
    moe = len(config.moe_layers)

    def time(name: str) -> LayerTime:
        return layer_time(
            name, tokens, config.hidden_size, parallel.tp, 2, machine, parallel.attention
        )

    # A dense layer has one output, so its sum needs neither a third all_reduce nor the "+".
    dense = time("deferred" if variant == "three_all_reduces" else variant)
    dense = replace(dense, parts=tuple(part for part in dense.parts if part.op != "+"))
    return [(time(variant), moe), (dense, config.num_hidden_layers - moe)]


def rule_of(
    config: Step3p5Config, compute: Compute, chip: Chip, machine: Machine | None = None
) -> Rule:
    """The rule under which eight ranks take the compute that one of them was recorded to take, for
    `deferred` and predict.TOKENS tokens. Without a machine: nodes of eight, of such chips.

    Raises:
        ConfigError: it was faster than its adds and norms alone can be.
    """
    machine = machine or replace(_eight_a_node(), memory_bandwidth=chip.bandwidth)
    rule = Rule(chip=chip, machine=machine)
    at_floor = scaled_step(config, "deferred", TOKENS, RANKS, rule)
    factor = (compute.seconds - at_floor.passes) / at_floor.compute
    if factor <= 0:
        raise ConfigError(
            f"compute of {compute.seconds:.3g} s is less than the {at_floor.passes:.3g} s that the "
            "adds and norms take: give that of a whole step"
        )
    return replace(rule, factor=factor)


def scale(
    config: Step3p5Config,
    tokens: Iterable[int],
    ranks: Iterable[int],
    rule: Rule | None = None,
    variants: Sequence[str] = VARIANTS,
) -> list[ScaledStep]:
    """`scaled_step` of every variant, every number of ranks, every number of tokens."""
    numbers = list(tokens)
    return [
        scaled_step(config, variant, number, tp, rule)
        for tp in ranks
        for number in numbers
        for variant in variants
    ]


def gains(steps: Iterable[ScaledStep]) -> dict[tuple[str, int, int], float]:
    """(variant, tokens, tp) to the share of the step that the variant saves of the one it improves
    on: deferred of three_all_reduces; fused and reduce_scatter of deferred."""
    seconds = {(step.variant, step.tokens, step.parallel.tp): step.seconds for step in steps}
    return {
        (variant, tokens, tp): 1 - time / seconds[_BASE[variant], tokens, tp]
        for (variant, tokens, tp), time in seconds.items()
        if variant in _BASE
    }
