"""Scaling on paper on sliders: tokens, ranks, nodes, links, and how uneven the routing is."""

from __future__ import annotations

from dataclasses import replace

import ipywidgets
from matplotlib.figure import Figure

from stepmoe.charts.scaling import step_at
from stepmoe.comm.cost import LINKS, Link
from stepmoe.comm.nodes import Nodes
from stepmoe.config import Step3p5Config
from stepmoe.scaling import Rule, ScaledStep, scaled_step
from stepmoe.variants import VARIANTS
from stepmoe.widgets.explorer import Explorer, choice, slider

_TOKENS = [2**power for power in range(6, 17)]
# NCCL moves large tensors in pieces, which the fitted constants are for; the others are rings.
_ALGORITHMS = {"nccl_sm90": "pipelined"}
_OUTER = LINKS["infiniband"]


class ScalingExplorer(Explorer):
    """A predicted prefill step of every variant, and what each saves over tokens.

    Controls: tokens of a step, ranks (tp), nodes they are spread over, link within a node, GB/s of
    a rank's port to the other nodes, and the busiest rank's rows over the mean.

    Args:
        config: the model's shape; rule: how sub-layers are predicted (stepmoe.scaling.rule_of).
    """

    def __init__(self, config: Step3p5Config, rule: Rule | None = None) -> None:
        self.config, self.rule = config, rule or Rule()
        pick = ipywidgets.SelectionSlider
        self.tokens = slider(pick, "tokens", options=_TOKENS, value=16384)
        self.tp = slider(pick, "ranks (tp)", options=[2, 4, 8, 16, 32, 64], value=16)
        self.nodes = slider(pick, "nodes", options=[1, 2, 4, 8], value=2)
        self.between = slider(
            ipywidgets.FloatSlider,
            "GB/s between",
            value=_OUTER.bandwidth / 1e9,
            min=5,
            max=400,
            step=5,
        )
        self.imbalance = slider(
            ipywidgets.FloatSlider, "busiest rank", value=1.0, min=1.0, max=3.0, step=0.1
        )
        self.link = choice("link inside", [n for n in LINKS if n != "infiniband"], "nccl_sm90")
        super().__init__(
            [[self.tokens, self.tp], [self.nodes, self.between], [self.imbalance, self.link]]
        )
        self.watch(self.tokens, self.tp, self.nodes, self.between, self.imbalance, self.link)

    @property
    def setting(self) -> Rule:
        """The rule with what the controls say."""
        outer = Link("set by hand", _OUTER.latency, self.between.value * 1e9, "set by hand")
        machine = replace(
            self.rule.machine,
            link=LINKS[self.link.value],
            algorithm=_ALGORITHMS.get(self.link.value, "ring"),
            nodes=Nodes(max(1, self.tp.value // self.nodes.value), outer),
        )
        return replace(self.rule, machine=machine, imbalance=self.imbalance.value)

    def steps(self, tokens: int) -> list[ScaledStep]:
        """Of every variant, at the present setting."""
        rule = self.setting
        return [scaled_step(self.config, name, tokens, self.tp.value, rule) for name in VARIANTS]

    def figures(self) -> list[Figure]:
        by_tokens = [self.steps(tokens) for tokens in _TOKENS]
        curves = dict(zip(VARIANTS, zip(*by_tokens, strict=True), strict=True))
        now = by_tokens[_TOKENS.index(self.tokens.value)]
        return [step_at(now, curves, self._words(now[0]))]

    def summary(self) -> str:
        """The variant predicted fastest, and what it saves."""
        steps = self.steps(self.tokens.value)
        best = min(steps, key=lambda step: step.seconds)
        return (
            f"Predicted for {self.tokens.value} tokens, {self._words(best)}: {best.variant} is "
            f"fastest and saves {1 - best.seconds / steps[0].seconds:.0%} of three_all_reduces"
        )

    def _words(self, step: ScaledStep) -> str:
        nodes = "1 node" if step.nodes == 1 else f"{step.nodes} nodes"
        outside = "" if step.nodes == 1 else f" and {self.between.value:.0f} GB/s"
        attention = ", attention dp" if step.parallel.attention == "dp" else ""
        return (
            f"tp={step.parallel.tp} on {nodes}{attention}, {self.link.value}{outside}, busiest "
            f"rank x {self.imbalance.value:g}"
        )
