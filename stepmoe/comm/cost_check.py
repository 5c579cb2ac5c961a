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
        link: fitted.
        predictions: every published size, those of the fit included and marked.
        remarks: how to read the errors; deductions are marked "inferred".
    """

    link: Link
    predictions: tuple[Prediction, ...]
    remarks: tuple[str, ...]


def check_on_published(
    fit_on: tuple[float, ...] = (16, 128), link: Link | None = None
) -> PublishedCheck:
    """Predict NCCL's all-reduce of vLLM #42324, by a link fitted on some of its sizes (MiB).

    Args:
        link: predict with this one instead and fit nothing.
    """
    rows = published.latencies("vLLM #42324", "NCCL")
    used = [row for row in rows if not link and row.nbytes / published.MIB in fit_on]
    link = link or fit(
        [row.nbytes for row in used], [row.seconds for row in used], 8, name="vLLM #42324, NCCL"
    )
    predictions = tuple(
        Prediction(
            int(row.nbytes),
            row.seconds,
            collective_time("all_reduce", row.nbytes, 8, link),
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
    if link.bandwidth > wire:
        remarks.append(
            f"The fitted {link.bandwidth / 1e9:.0f} GB/s are more than the {wire / 1e9:.0f} GB/s "
            "of the wires, which no ring can send. Probably fewer bytes are sent, because the "
            "switch takes part in the sum (NVLink SHARP; inferred)."
        )
    return PublishedCheck(link, predictions, tuple(remarks))
