"""From what the ranks recorded to the table that compare_latency returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from stepmoe.measure import speedup
from stepmoe.measure.environment import attributes
from stepmoe.measure.plan import BASELINE, Plan
from stepmoe.measure.rounds import CaseRecord, RankRecord

if TYPE_CHECKING:
    import pandas as pd

BASELINE_VERDICT = "the baseline"
NO_BASELINE = f"{BASELINE} was not measured"


def build_frame(plan: Plan, records: list[RankRecord]) -> pd.DataFrame:
    """The table of what the ranks measured, records in rank order."""
    import pandas as pd

    rows, samples = [], []
    for same_case in zip(*(record.cases for record in records), strict=True):
        latency = {name: _slowest(same_case, name) for name in plan.variants}
        for name in plan.variants:
            rows.append(_row(same_case, name, latency))
            case = same_case[0].case
            samples.append(
                {
                    "variant": name,
                    "tokens": case.tokens,
                    "phase": case.phase,
                    "seconds": latency[name],
                }
            )
    frame = pd.DataFrame(rows)
    frame.attrs = {**_attributes(plan, records), "samples": samples}
    return frame


def _slowest(ranks: Sequence[CaseRecord], name: str) -> list[float]:
    """Each round's time: that of the rank that took longest."""
    return [max(times) for times in zip(*(rank.plain[name] for rank in ranks), strict=True)]


def _row(
    ranks: Sequence[CaseRecord], name: str, latency: dict[str, list[float]]
) -> dict[str, object]:
    first, case = ranks[0], ranks[0].case
    p10, median, p90 = np.quantile(latency[name], (0.1, 0.5, 0.9)).tolist()
    return {
        "variant": name,
        "tokens": case.tokens,
        "phase": case.phase,
        "batch": case.batch,
        "length": case.length,
        "context": case.context,
        "median": median,
        "p10": p10,
        "p90": p90,
        **_split(ranks, name),
        "bytes_sent": first.bytes_sent[name],
        "collectives": sum(first.counts[name].values()),
        "counts": first.counts[name],
        **against_baseline(name, latency, speedup.speedup),
        "repeats": len(latency[name]),
    }


def _split(ranks: Sequence[CaseRecord], name: str) -> dict[str, float]:
    """The mean rank's parts of each round, and of these the medians."""
    parts = np.array(
        [[(s.total, s.communication, s.waiting) for s in rank.split[name]] for rank in ranks]
    )
    total, communication, waiting = parts.mean(axis=0).T
    plain = np.array([rank.plain[name] for rank in ranks]).mean(axis=0)
    return {
        "compute": float(np.median(total - communication - waiting)),
        "communication": float(np.median(communication)),
        "waiting": float(np.median(waiting)),
        "split_total": float(np.median(total)),
        "split_overhead": float(np.median(total / plain)) - 1,
    }


def against_baseline(
    name: str,
    times: dict[str, list[float]],
    compare: Callable[[Sequence[float], Sequence[float]], speedup.Speedup],
) -> dict[str, object]:
    """The columns that compare a variant with three_all_reduces, by their times of each round."""
    nan = float("nan")
    if BASELINE not in times:
        ratio, verdict = speedup.Speedup(nan, nan, nan), NO_BASELINE
    elif name == BASELINE:
        ratio, verdict = speedup.Speedup(1.0, 1.0, 1.0), BASELINE_VERDICT
    else:
        ratio = compare(times[BASELINE], times[name])
        verdict = ratio.verdict
    return {
        "speedup": ratio.ratio,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "verdict": verdict,
    }


def _attributes(plan: Plan, records: list[RankRecord]) -> dict[str, object]:
    first = records[0]
    cache = first.place.cache_bytes
    return {
        **attributes([record.place for record in records], plan.dtype, plan.parallel),
        "seed": plan.seed,
        "config": plain(asdict(plan.config)),
        "command": _command(plan),
        "warmup": plan.warmup,
        "order": first.cases[0].order,
        "method": speedup.METHOD,
        "meeting": float(np.median([record.meeting for record in records])),
        "inputs": [
            {
                "tokens": record.case.tokens,
                "phase": record.case.phase,
                "sets": record.num_sets,
                "bytes_each": record.bytes_each,
                "exceed_cache": record.num_sets * record.bytes_each > cache,
            }
            for record in first.cases
        ],
    }


def plain(value: Any) -> Any:
    """With lists for tuples, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _command(plan: Plan) -> str:
    """The call that measures the same again."""
    tokens = sorted({case.tokens for case in plan.cases})
    phases = list(dict.fromkeys(case.phase for case in plan.cases))
    return (
        f"compare_latency(config, {list(plan.variants)}, {tokens}, parallel={plan.parallel}, "
        f"ranks=ranks, phases={phases}, repeats={plan.repeats}, warmup={plan.warmup}, "
        f"dtype={plan.dtype}, seed={plan.seed})"
    )
