"""From one GPU to eight: a predicted step.

A predicted step is one rank's compute, measured on one GPU, plus its collectives, modelled. What is
left out is listed in LEFT_OUT. Nothing in here was measured on eight GPUs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stepmoe.comm.cost import LINKS, Link, collective_time
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

#: What a predicted step does not contain.
LEFT_OUT = (
    "waiting: at every collective all ranks wait for the slowest, and routing gives some more rows",
    "the host: scheduling, tokenising, launches that the GPU has to wait for",
    "overlap of communication with computation, and what both lose to each other then",
    "another clock of eight busy GPUs, and other traffic on their links",
    "FP8: the published runs computed in it, the compute here is bfloat16",
)
#: Largest error of the pipelined model on published times that it was not fitted on, 1 to 128 MiB.
MODEL_ERROR = 0.11
#: The published workload: tokens of a step are those of its best launch, for the others inferred.
TOKENS, RANKS, BEFORE, AFTER, BEST = 16384, 8, 46e3, 56e3, 63_213.0
#: Variants that differ in what they send, and above sglang's gate in nothing else, but for
#: three_all_reduces' addition of its two sums: 0.7 and 1.7 ms of some 118 in two runs on H200s.
SAME_COMPUTE = ("three_all_reduces", "deferred", "fused")


@dataclass(frozen=True)
class Compute:
    """One rank's measured compute of one step, seconds; low to high is what was seen."""

    seconds: float
    low: float
    high: float
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.seconds <= self.high:
            raise ConfigError(
                f"compute of {self.seconds} s must be above 0 and between {self.low} and "
                f"{self.high} s"
            )


@dataclass(frozen=True)
class Assumptions:
    """What a prediction rests on besides the measured compute.

    Attributes:
        link, algorithm: of the cost model; by default NCCL on 8 GPUs as published.
        compute_factor: what the measured compute is multiplied by; below 1 for faster kernels, as
            good ones in FP8 would be.
        imbalance: rows of the busiest rank over the mean.
        expert_share: part of the compute that grows with them.
        idle: part of the step in which a GPU waits for its host or for other ranks.
    """

    link: Link = LINKS["nccl_sm90"]
    algorithm: str = "pipelined"
    compute_factor: float = 1.0
    imbalance: float = 1.0
    expert_share: float = 0.5
    idle: float = 0.0

    def __post_init__(self) -> None:
        if not self.compute_factor > 0 or not self.imbalance >= 1 or not 0 <= self.idle < 1:
            raise ConfigError(
                f"compute_factor={self.compute_factor} must be above 0, imbalance="
                f"{self.imbalance} at least 1, idle={self.idle} from 0 to below 1"
            )


@dataclass(frozen=True)
class Prediction:
    """A predicted step of one variant, seconds; low to high: error of the model and spread of the
    compute, not what is left out."""

    variant: str
    tokens: int
    compute: float
    communication: float
    idle: float
    low: float
    high: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.idle

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def collectives(config: Step3p5Config, variant: str, nbytes: float) -> list[tuple[str, float, int]]:
    """(operation, bytes, how many) of a prefill step of the whole model, under attention="tp".

    Two sums a layer, three in a MoE layer of three_all_reduces; halves of them in reduce_scatter,
    with one all_gather more before the head. `Ledger.counts` of a simulated rank says the same.
    """
    layers, moe = config.num_hidden_layers, len(config.moe_layers)
    if variant == "three_all_reduces":
        return [("all_reduce", nbytes, 2 * layers + moe)]
    if variant in ("deferred", "fused"):
        return [("all_reduce", nbytes, 2 * layers)]
    if variant == "reduce_scatter":
        return [("all_gather", nbytes, 2 * layers + 1), ("reduce_scatter", nbytes, 2 * layers)]
    raise ConfigError(f"no prediction of variant {variant!r}: use one of stepmoe.VARIANTS")


def predict(
    config: Step3p5Config,
    variant: str,
    compute: Compute,
    assumptions: Assumptions | None = None,
    tokens: int = TOKENS,
    ranks: int = RANKS,
) -> Prediction:
    """One prefill step of `tokens` tokens in bfloat16 on `ranks` GPUs.

    At more than 2048 tokens (sglang's gate) the fused operation runs as its parts: `fused` is then
    `deferred`.
    """
    given = assumptions or Assumptions()
    nbytes = tokens * config.hidden_size * 2
    sums = sum(
        count * collective_time(op, size, ranks, given.link, given.algorithm)
        for op, size, count in collectives(config, variant, nbytes)
    )
    factor = given.compute_factor * (1 + given.expert_share * (given.imbalance - 1))
    stretch = 1 / (1 - given.idle)
    own = compute.seconds * factor
    return Prediction(
        variant,
        tokens,
        own,
        sums,
        (own + sums) * (stretch - 1),
        (compute.low * factor + sums * (1 - MODEL_ERROR)) * stretch,
        (compute.high * factor + sums * (1 + MODEL_ERROR)) * stretch,
    )


def sensitivity(
    config: Step3p5Config, compute: Compute, variant: str = "deferred"
) -> dict[str, tuple[float, float]]:
    """Predicted tokens/s at both ends of each assumption, the others as they are; widest first.

    Compute x 0.6 is what good FP8 kernels might give. This library's own do not: on an H200 a step
    took 122.5 ms in FP8 and 117.3 in bfloat16 (notebooks/results/h200_fp8.json, h200_prefill.json).
    """
    base = Assumptions()
    slow = replace(base.link, bandwidth=base.link.bandwidth / 3)
    ends = {
        "a faster FP8 (assumed): compute x 0.6 to x 1": (replace(base, compute_factor=0.6), base),
        "GPUs idle 0 to 40 % of a step": (base, replace(base, idle=0.4)),
        "all-reduce as published, or a third as fast": (base, replace(base, link=slow)),
        "busiest rank 1 to 1.5 x the rows": (base, replace(base, imbalance=1.5)),
    }
    speeds = {
        name: (
            predict(config, variant, compute, worst).tokens_per_second,
            predict(config, variant, compute, best).tokens_per_second,
        )
        for name, (best, worst) in ends.items()
    }
    return dict(sorted(speeds.items(), key=lambda item: item[1][0] - item[1][1]))


def compute_of_run(frame: pd.DataFrame) -> dict[str, Compute]:
    """Each variant's compute out of what `compare_throughput` measured on a simulated rank: its
    prefill steps without the time of what stood in for the collectives (which is not known
    of decode steps, replayed from a CUDA graph). Of replayed prefill steps that is the same time,
    and at most a launch for each copy, some µs, too much."""
    attrs = frame.attrs
    held = "FP8 weights" if attrs.get("quantization") else attrs["dtype"]
    where = f"{attrs['hardware']['gpus'][0]}, {held}, one rank of {attrs['parallel']['tp']}"
    return {
        row["variant"]: Compute(
            row["median"] - row["stand_in"],
            row["p10"] - row["stand_in"],
            row["p90"] - row["stand_in"],
            f"{where}, {row['steps']} steps",
        )
        for row in frame.to_dict("records")
        if row["phase"] == "prefill"
    }


def pooled(computes: Mapping[str, Compute]) -> dict[str, Compute]:
    """The same for each variant, but one compute for all that compute the same: what differs
    between their recorded times is noise. Median of the medians, spread from least to most."""
    same = [computes[name] for name in SAME_COMPUTE if name in computes]
    if not same:
        return dict(computes)
    seconds = statistics.median(compute.seconds for compute in same)
    low, high = min(c.low for c in same), max(c.high for c in same)
    source = same[0].source + (" a variant" if len(same) > 1 else "")
    one = Compute(seconds, low, high, source)
    return {name: one if name in SAME_COMPUTE else own for name, own in computes.items()}
