"""Which variant is predicted fastest where, on sliders."""

from __future__ import annotations

import math
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from stepmoe.charts.crossover import CrossoverPlot
from stepmoe.comm.cost import ALGORITHMS, LINKS, Link
from stepmoe.comm.fusion import GATES
from stepmoe.comm.layer_cost import Machine
from stepmoe.widgets.explorer import Explorer, choice, slider

_POWERS = [2**power for power in range(17)]
_STEP = 0.02  # of the bandwidth and latency sliders, in powers of ten


class CrossoverExplorer(Explorer):
    """Predicted time of each variant's communication, adds and norms in one MoE layer.

    Controls: tokens (a range), hidden size, ranks (tp), attention, link and its bandwidth and
    latency, the algorithm of the collectives, the gate of the fused kernel, published times.

    Args:
        measured: own measurements to overlay: what `compare_latency` returned, or a DataFrame with
            columns variant, tokens, phase, median, p10, p90 (seconds) and attrs["hardware"].
        tp, hidden: where the sliders begin.
        link: one of stepmoe.comm.cost.LINKS to begin with.
    """

    def __init__(
        self, measured: Any = None, tp: int = 8, hidden: int = 4096, link: str = "nvlink4"
    ) -> None:
        self.plot = CrossoverPlot(measured is not None)
        self.measured = measured
        log, pick = ipywidgets.FloatLogSlider, ipywidgets.SelectionSlider
        start = LINKS[link]
        self.tokens = slider(
            ipywidgets.SelectionRangeSlider, "tokens", options=_POWERS, value=(1, 16384)
        )
        self.hidden = slider(pick, "hidden", options=_sizes(hidden, _POWERS[7:15]), value=hidden)
        self.tp = slider(pick, "ranks (tp)", options=_sizes(tp, [2, 4, 8, 16]), value=tp)
        self.bandwidth = slider(
            log,
            "GB/s",
            value=start.bandwidth / 1e9,
            min=-1,
            max=3.3,
            step=_STEP,
            readout_format=".4g",
        )
        self.latency = slider(
            log,
            "µs a step",
            value=start.latency * 1e6,
            min=-1,
            max=3.3,
            step=_STEP,
            readout_format=".3g",
        )
        self.link = choice("link", [*LINKS, "own"], link)
        self.attention = choice("attention", ["tp", "dp"], "tp")
        self.algorithm = choice("collectives", ALGORITHMS, "ring")
        self.gate = choice("fused up to", _gates(), "sglang")
        self.published = ipywidgets.Checkbox(description="published times", value=True)
        super().__init__(
            [
                [self.tokens, self.hidden],
                [self.tp, self.attention],
                [self.bandwidth, self.latency],
                [self.link, self.algorithm, self.gate, self.published],
            ]
        )
        self.watch(self.tokens, self.hidden, self.tp, self.attention, self.algorithm, self.gate)
        self.watch(self.published)
        self.watch(self.bandwidth, self.latency, then=self._own_link)
        self.watch(self.link, then=self._preset)

    @property
    def machine(self) -> Machine:
        """What the controls say of the hardware; a preset's own numbers, not the sliders' steps."""
        link = LINKS.get(self.link.value) or Link(
            name="own",
            latency=self.latency.value * 1e-6,
            bandwidth=self.bandwidth.value * 1e9,
            source="set by hand",
        )
        gate = GATES.get(self.gate.value)
        return Machine(link=link, algorithm=self.algorithm.value, gate=gate)

    def figures(self) -> list[Figure]:
        """One figure, moved to the present setting."""
        first, last = self.tokens.value
        self.plot.update(
            _POWERS[_POWERS.index(first) : _POWERS.index(last) + 1]
            if first < last
            else [first, first + 1],
            self.hidden.value,
            self.tp.value,
            machine=self.machine,
            attention=self.attention.value,
            measured=self.measured,
            show_published=self.published.value,
        )
        return [self.plot.figure]

    def summary(self) -> str:
        """The winners, for as many tokens as the slider shows."""
        spans = "; ".join(
            f"{' = '.join(span.variants)} for {span.first} to {span.last} tokens"
            for span in self.plot.spans
        )
        return (
            f"Predicted fastest (hidden {self.hidden.value}, tp={self.tp.value}, "
            f"attention={self.attention.value!r}, link {self.link.value}): {spans}"
        )

    def _preset(self, change: dict[str, Any]) -> None:
        if change["new"] == "own":
            return
        link = LINKS[change["new"]]
        with self.pause():
            self.bandwidth.value, self.latency.value = link.bandwidth / 1e9, link.latency * 1e6

    def _own_link(self, _: dict[str, Any]) -> None:
        """A slider moved by hand no longer shows the preset."""
        if not self._paused and not self._shows_preset():
            self.link.value = "own"
            self.refresh()

    def _shows_preset(self) -> bool:
        """Whether both sliders stand where a browser puts the preset: on their nearest step."""
        preset = LINKS.get(self.link.value)
        return preset is not None and all(
            abs(math.log10(control.value / value)) <= 0.505 * _STEP
            for control, value in (
                (self.bandwidth, preset.bandwidth / 1e9),
                (self.latency, preset.latency * 1e6),
            )
        )


def _sizes(first: int, others: list[int]) -> list[int]:
    """The slider's steps, the one it begins with among them."""
    return sorted({first, *others})


def _gates() -> list[tuple[str, str]]:
    names = [
        (
            f"{name}: {gate.max_tokens} tokens"
            if gate.max_tokens
            else f"{name}: {(gate.max_bytes or 0) // 1024} KiB",
            name,
        )
        for name, gate in GATES.items()
    ]
    return [*names, ("no limit", "none")]
