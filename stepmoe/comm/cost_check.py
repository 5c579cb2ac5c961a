"""The cost model against published times that it was not fitted on, the errors as data."""

from __future__ import annotations

from dataclasses import dataclass

from stepmoe import published
from stepmoe.comm.cost import LINKS, Link, collective_time, fit


@dataclass(frozen=True)
class Prediction:
    """A published time beside the model's."""

    nbytes: int
    published: float
    predicted: float
    fitted: bool  # the link was fitted on this one

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too long."""
        return self.predicted / self.published - 1


@dataclass(frozen=True)
class PublishedCheck:
    """The model against published times that it was not fitted on.

    Attributes:
        source: who published them.
        algorithm: form of the model, one of stepmoe.comm.cost.ALGORITHMS.
        link: fitted.
        predictions: every published size, those of the fit included and marked.
        remarks: how to read the errors; deductions are marked "inferred".
    """

    source: str
    algorithm: str
    link: Link
    predictions: tuple[Prediction, ...]
    remarks: tuple[str, ...]

    def worst(self, smallest: float = 1.0) -> float:
        """Largest error, without its sign, among sizes from `smallest` MiB that were not fitted."""
        judged = [row for row in self.predictions if not row.fitted]
        return max(abs(row.error) for row in judged if row.nbytes >= smallest * published.MIB)


def check_on_published(
    fit_on: tuple[float, ...] = (16, 128),
    link: Link | None = None,
    algorithm: str = "ring",
    source: str = "vLLM #42324",
) -> PublishedCheck:
    """Predict NCCL's all-reduce on 8 GPUs, by a link fitted on some of the published sizes (MiB).

    Args:
        link: predict with this one instead and fit nothing.
        algorithm: "ring" is a straight line, "pipelined" one whose bandwidth grows with the size.
        source: "vLLM #42324", likely SM90; or "vLLM #37756", B300, where 8 GPUs are assumed.
    """
    rows = published.latencies(source, "NCCL")
    used = [row for row in rows if not link and row.nbytes / published.MIB in fit_on]
    link = link or fit(
        [row.nbytes for row in used],
        [row.seconds for row in used],
        8,
        algorithm,
        name=f"{source}, NCCL",
    )
    predictions = tuple(
        Prediction(
            int(row.nbytes),
            row.seconds,
            collective_time("all_reduce", row.nbytes, 8, link, algorithm),
            row in used,
        )
        for row in rows
    )
    remarks = []
    if max(prediction.error for prediction in predictions) > 0.5:
        remarks.append(
            "Far too slow for small tensors: NCCL changes to a protocol with a shorter latency and "
            "less bandwidth (LL), and one straight line cannot be both."
        )
    wire = LINKS["nvlink4"].bandwidth
    if source == "vLLM #42324" and link.bandwidth > wire:
        remarks.append(
            f"The fitted {link.bandwidth / 1e9:.0f} GB/s are more than the {wire / 1e9:.0f} GB/s "
            "of the wires, which no ring can send. Probably fewer bytes are sent, because the "
            "switch takes part in the sum (NVLink SHARP; inferred)."
        )
    return PublishedCheck(source, algorithm, link, predictions, tuple(remarks))
