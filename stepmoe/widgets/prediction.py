"""The prediction for eight GPUs on sliders: what each assumption does to it."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets
from matplotlib.figure import Figure

from stepmoe.charts.eight import predicted_steps
from stepmoe.comm.cost import LINKS, Link
from stepmoe.config import Step3p5Config
from stepmoe.predict import Assumptions, Compute, Prediction, predict
from stepmoe.variants import VARIANTS
from stepmoe.widgets.explorer import Explorer, choice, slider

_LINK = LINKS["nccl_sm90"]


class PredictionExplorer(Explorer):
    """Predicted step and throughput of every variant on 8 GPUs.

    Controls: bandwidth of the all-reduce, what the measured compute is multiplied by, the busiest
    rank's rows over the mean, the part of a step in which a GPU idles, and whose compute it is.

    Args:
        config: the model's shape.
        computes: by the name of a GPU, one rank's compute of each variant, measured on it.
    """

    def __init__(
        self, config: Step3p5Config, computes: Mapping[str, Mapping[str, Compute]]
    ) -> None:
        self.config, self.computes = config, computes
        self.gpu = choice("compute of", list(computes), next(iter(computes)))
        kind = ipywidgets.FloatSlider
        self.bandwidth = slider(
            kind, "all-reduce GB/s", value=round(_LINK.bandwidth / 1e9), min=50, max=950, step=10
        )
        self.factor = slider(kind, "compute x", value=1.0, min=0.4, max=1.5, step=0.05)
        self.imbalance = slider(kind, "busiest rank", value=1.0, min=1.0, max=2.0, step=0.05)
        self.idle = slider(kind, "idle part", value=0.0, min=0.0, max=0.6, step=0.02)
        super().__init__([[self.bandwidth, self.factor], [self.imbalance, self.idle], [self.gpu]])
        self.watch(self.gpu, self.bandwidth, self.factor, self.imbalance, self.idle)

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
        found = self.computes[self.gpu.value]
        return [predict(self.config, name, found[name], given) for name in VARIANTS]

    def figures(self) -> list[Figure]:
        source = next(iter(self.computes[self.gpu.value].values())).source
        return [predicted_steps({source: self.predictions})]

    def summary(self) -> str:
        """The assumptions, in words."""
        return (
            f"Predicted for 8 GPUs ({self.gpu.value}): all-reduce at "
            f"{self.bandwidth.value:.0f} GB/s, compute x {self.factor.value:g}, busiest rank x "
            f"{self.imbalance.value:g}, idle {self.idle.value:.0%}"
        )
