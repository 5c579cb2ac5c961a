"""The prediction for eight GPUs on sliders: what each assumption does to it."""

from __future__ import annotations

import ipywidgets
from matplotlib.figure import Figure

from stepmoe.charts.eight import predicted_steps
from stepmoe.comm.cost import LINKS, Link
from stepmoe.config import Step3p5Config
from stepmoe.predict import Assumptions, Compute, Prediction, predict
from stepmoe.variants import VARIANTS
from stepmoe.widgets.explorer import Explorer, slider

_LINK = LINKS["nccl_sm90"]


class PredictionExplorer(Explorer):
    """Predicted step and throughput of every variant on 8 GPUs.

    Controls: bandwidth of the all-reduce, what the measured compute is multiplied by, the busiest
    rank's rows over the mean, and the part of a step in which a GPU idles.

    Args:
        config: the model's shape; compute: one rank's, measured.
    """

    def __init__(self, config: Step3p5Config, compute: Compute) -> None:
        self.config, self.compute = config, compute
        kind = ipywidgets.FloatSlider
        self.bandwidth = slider(
            kind, "all-reduce GB/s", value=round(_LINK.bandwidth / 1e9), min=50, max=950, step=10
        )
        self.factor = slider(kind, "compute x", value=1.0, min=0.4, max=1.5, step=0.05)
        self.imbalance = slider(kind, "busiest rank", value=1.0, min=1.0, max=2.0, step=0.05)
        self.idle = slider(kind, "idle part", value=0.0, min=0.0, max=0.6, step=0.02)
        super().__init__([[self.bandwidth, self.factor], [self.imbalance, self.idle]])
        self.watch(self.bandwidth, self.factor, self.imbalance, self.idle)

    @property
    def predictions(self) -> list[Prediction]:
        """Of every variant, at the present setting."""
        link = Link("set by hand", _LINK.latency, self.bandwidth.value * 1e9, "set by hand")
        given = Assumptions(
            link,
            compute_factor=self.factor.value,
            imbalance=self.imbalance.value,
            idle=self.idle.value,
        )
        return [predict(self.config, name, self.compute, given) for name in VARIANTS]

    def figures(self) -> list[Figure]:
        return [predicted_steps(self.predictions, self.compute.source)]

    def summary(self) -> str:
        """The assumptions, in words."""
        return (
            f"Predicted for 8 GPUs: all-reduce at {self.bandwidth.value:.0f} GB/s, compute x "
            f"{self.factor.value:g}, busiest rank x {self.imbalance.value:g}, idle "
            f"{self.idle.value:.0%}"
        )
