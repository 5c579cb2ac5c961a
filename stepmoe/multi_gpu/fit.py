"""The cost model fitted to a run, and how far the earlier predictions were off, term by term."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stepmoe.comm.cost import Link, collective_time, fit
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.measure.speedup import CONFIDENCE
from stepmoe.predict import Assumptions, Compute, predict

if TYPE_CHECKING:
    import pandas as pd

_OPERATIONS = {
    "all_reduce": ("all_reduce",),
    "reduce_scatter + all_gather": ("reduce_scatter", "all_gather"),
}
_ITEM = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Term:
    """One quantity of a prediction.

    Attributes:
        predicted: before the run; None where the prediction leaves it out.
        fitted: by the same formula with the link as fitted; None where the link is not in it.
        unit: of all three.
    """

    name: str
    predicted: float | None
    measured: float
    fitted: float | None
    unit: str

    @property
    def ratio(self) -> float:
        """Measured over predicted; NaN where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else math.nan


@dataclass(frozen=True)
class FittedLink:
    """A link and the 95 % intervals of its latency (s) and bandwidth (bytes/s), both as if the
    residuals were independent and the form of the model right."""

    link: Link
    latency: tuple[float, float]
    bandwidth: tuple[float, float]


def fit_link(collectives: Mapping[str, Any], algorithm: str = "pipelined") -> FittedLink:
    """Latency and bandwidth by least squares of log seconds over all sizes of all_reduce.

    Args:
        collectives: what `bench-fusion --json` wrote.

    Raises:
        ConfigError: fewer than three sizes, times that do not grow with them or that no link fits,
            or scipy is not installed.
    """
    try:
        from scipy.optimize import curve_fit
        from scipy.stats import t
    except ImportError as error:
        raise ConfigError(
            "the fit needs scipy, which is not installed: pip install 'stepmoe[notebooks]'"
        ) from error

    sizes, seconds = _times(collectives, "all_reduce")
    ranks = collectives["hardware"]["ranks"]
    if len(sizes) < 3:
        raise ConfigError(f"a fit with intervals needs three sizes of all_reduce, got {len(sizes)}")
    start = fit(sizes, seconds, ranks, algorithm)

    def model(given: np.ndarray, latency: float, bandwidth: float) -> np.ndarray:
        link = Link("", math.exp(latency), math.exp(bandwidth), "")
        times = [collective_time("all_reduce", size, ranks, link, algorithm) for size in given]
        return np.log(times)

    # Logarithms keep both above 0; 1 ns in place of a latency of 0, which has none.
    first = (math.log(max(start.latency, 1e-9)), math.log(start.bandwidth))
    try:
        found, covariance = curve_fit(model, np.array(sizes), np.log(seconds), p0=first)
    except RuntimeError as error:  # so scipy says that it did not converge
        raise ConfigError(
            f"no link fits the {len(sizes)} times of all_reduce ({error}): measure them again, "
            "--again collectives"
        ) from error
    reach = t.ppf((1 + CONFIDENCE) / 2, len(sizes) - 2) * np.sqrt(np.diag(covariance))
    low, high = np.exp(found - reach).tolist(), np.exp(found + reach).tolist()
    latency, bandwidth = np.exp(found).tolist()
    source = f"fitted to {len(sizes)} times of all_reduce, {ranks} ranks, as {algorithm}"
    link = Link("fitted", latency, bandwidth, source)
    return FittedLink(link, (low[0], high[0]), (low[1], high[1]))


def collective_terms(
    collectives: Mapping[str, Any], fitted: FittedLink | None, given: Assumptions | None = None
) -> list[Term]:
    """The link's two figures, and every size of the collectives alone, in µs a call.

    Args:
        fitted: None where none was: the terms are then without it, and without its figures.
    """
    given = given or Assumptions()
    ranks, link = collectives["hardware"]["ranks"], given.link

    def microseconds(operations: Sequence[str], size: float, link: Link) -> float:
        return 1e6 * sum(
            collective_time(op, size, ranks, link, given.algorithm) for op in operations
        )

    terms = []
    if fitted is not None:
        terms += [
            Term("latency of a step", link.latency * 1e6, fitted.link.latency * 1e6, None, "µs"),
            Term("bandwidth", link.bandwidth / 1e9, fitted.link.bandwidth / 1e9, None, "GB/s"),
        ]
    for name, operations in _OPERATIONS.items():
        for size, seconds in zip(*_times(collectives, name), strict=True):
            before = microseconds(operations, size, link)
            after = microseconds(operations, size, fitted.link) if fitted else None
            label = f"{name}, {size / 2**20:.3g} MiB"
            terms.append(Term(label, before, seconds * 1e6, after, "µs"))
    return terms


def step_terms(
    frame: pd.DataFrame,
    compute: Mapping[str, Compute],
    fitted: FittedLink | None,
    given: Assumptions | None = None,
) -> list[Term]:
    """A prefill step of each variant: its parts and the whole (ms), and tokens a second.

    Args:
        frame: of compare_throughput on all ranks. Its parts are of steps launched by the host, also
            where the whole ones were replayed from CUDA graphs.
        compute: what the prediction took for one rank's compute, by variant; variants without are
            left out.
        fitted: None where no link was.
    """
    given = given or Assumptions()
    config = _config_of(frame.attrs)
    refitted = replace(given, link=fitted.link) if fitted else None
    terms = []
    for row in frame[frame["phase"] == "prefill"].to_dict("records"):
        name = row["variant"]
        if name not in compute:
            continue
        step = (config, name, compute[name])
        size = (row["tokens"], frame.attrs["parallel"]["tp"])
        before = predict(*step, given, *size)
        after = predict(*step, refitted, *size) if refitted else None
        parts: list[tuple[str, float | None, float, float | None]] = [
            ("compute", before.compute, row["compute"], None),
            (
                "communication",
                before.communication,
                row["communication"],
                after.communication if after else None,
            ),
            ("waiting", before.idle or None, row["waiting"], None),
            ("step", before.seconds, row["median"], after.seconds if after else None),
        ]
        terms += [
            Term(f"{name}: {part}", p and p * 1e3, m * 1e3, f and f * 1e3, "ms")
            for part, p, m, f in parts
        ]
        speeds = before.tokens_per_second, row["tokens_per_second"]
        fitting = after.tokens_per_second if after else None
        terms.append(Term(f"{name}: throughput", *speeds, fitting, "tokens/s"))
    return terms


def _times(collectives: Mapping[str, Any], implementation: str) -> tuple[list[float], list[float]]:
    """Bytes and median seconds of each size at which it ran."""
    rows = [
        row
        for row in collectives["rows"]
        if row["implementation"] == implementation and "median_us" in row
    ]
    sizes: Sequence[float] = [row["tokens"] * collectives["hidden_size"] * _ITEM for row in rows]
    return list(sizes), [row["median_us"] / 1e6 for row in rows]


def _config_of(attrs: Mapping[str, Any]) -> Step3p5Config:
    """The published shape, with the layers that were run."""
    flash = Step3p5Config.flash()
    return flash if attrs["layers"] is None else flash.with_layers(*attrs["layers"])
