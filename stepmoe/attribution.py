"""The published gain taken apart: what each part of the change may have saved, and what is left."""

from __future__ import annotations

from dataclasses import dataclass

from stepmoe.comm.cost import collective_time
from stepmoe.comm.layer_cost import MEMORY_BANDWIDTH
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.predict import AFTER, BEFORE, RANKS, TOKENS, Assumptions
from stepmoe.published import latencies


@dataclass(frozen=True)
class Share:
    """A part of the published gain: seconds saved a step, how that is known, and why."""

    name: str
    seconds: float
    basis: str
    why: str


def attribute(config: Step3p5Config, assumptions: Assumptions | None = None) -> list[Share]:
    """What each part of the change saves a step of TOKENS tokens; the last is what is left over."""
    given = assumptions or Assumptions()
    nbytes = TOKENS * config.hidden_size * 2
    removed = len(config.moe_layers)
    one = collective_time("all_reduce", nbytes, RANKS, given.link, given.algorithm)
    passes = 2 * config.num_hidden_layers * nbytes / MEMORY_BANDWIDTH
    parts = [
        Share(
            "fewer all-reduces",
            removed * one,
            "modelled",
            f"{removed} of {nbytes / 2**20:.0f} MiB, {one * 1e3:.3f} ms each by the fitted model"
            + _as_published(nbytes),
        ),
        Share(
            "fused add + norm",
            passes,
            "modelled",
            "one pass over memory less at each norm, at an H100's copy bandwidth, if they were two "
            "kernels before",
        ),
        Share(
            "fused all-reduce",
            0.0,
            "not exercised",
            f"sglang fuses up to 2048 tokens, not {TOKENS}",
        ),
        Share("reduce-scatter", 0.0, "not exercised", "sglang uses it with DP attention"),
    ]
    total = TOKENS / BEFORE - TOKENS / AFTER
    left = total - sum(part.seconds for part in parts)
    return [*parts, Share("not explained", left, "unknown", "see the candidates in the text")]


def _as_published(nbytes: int) -> str:
    """NCCL's published milliseconds for as many bytes among as many ranks, where there are any."""
    rows = latencies(implementation="NCCL", ranks=RANKS)
    times = [f"{row.seconds * 1e3:.3f}" for row in rows if row.nbytes == nbytes]
    return f" (published for NCCL: {', '.join(times)})" if times else ""


def explaining_bandwidth(
    config: Step3p5Config, before: float = BEFORE, after: float = AFTER
) -> float:
    """Bytes/s that a GPU would send in an all-reduce if the removed ones were all of the gain."""
    if not 0 < before < after:
        raise ConfigError(f"before={before} must be above 0 and below after={after} tokens/s")
    saved = 1 / before - 1 / after  # seconds a token
    a_token = config.hidden_size * 2 * len(config.moe_layers)
    return 2 * (RANKS - 1) / RANKS * a_token / saved
