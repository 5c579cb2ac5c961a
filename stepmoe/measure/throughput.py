"""compare_throughput: tokens a second of every variant on a workload of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stepmoe.fp8 import Quantization
from stepmoe.launch import Ranks
from stepmoe.measure import speedup
from stepmoe.measure.environment import attributes
from stepmoe.measure.frame import against_baseline, plain
from stepmoe.measure.latency import check_world, ranks_in, run_everywhere
from stepmoe.measure.serving import RankThroughput, run_workload
from stepmoe.measure.source import Source
from stepmoe.measure.step_times import StepTimes, mean_parts
from stepmoe.measure.workload import Routing, ThroughputPlan, Workload
from stepmoe.mini.load import imbalance
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS

if TYPE_CHECKING:
    import pandas as pd


def compare_throughput(
    source: Source,
    variants: Sequence[str] = VARIANTS,
    workload: Workload | None = None,
    *,
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
    routing: Routing | None = None,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    quantization: Quantization = None,
    eager: bool = False,
    timeout: float | None = 600,
) -> pd.DataFrame:
    """Run a workload of random prompts with every variant, on the same ranks and weights.

    The variants take turns, a batch of prompts each. A step's time is that of the rank that took
    longest; the host waits for the GPU between steps, which a serving engine need not. Where the
    GPU need not wait for the host, as with a serving engine, it does not: in bfloat16 with Triton
    and a GPU for each rank, full prefill steps and decode steps are replayed from CUDA graphs.

    One row a variant and kind of step, times in seconds:
        variant, phase ("prefill", "decode"), batch, length, context: sequences, new tokens of each,
            tokens in the cache before (decode). tokens: batch x length of a full step.
        median, p10, p90: of the full steps; steps: how many were timed.
        tokens_per_second: prefill: prompt and output tokens over the time of all steps, decode
            steps of the outputs included; decode: new tokens.
        speedup, speedup_low, speedup_high, verdict: its ratio to that of three_all_reduces, with
            the interval of `attrs["method"]`: a round is a batch of prompts, or one decode step.
            NaN where that variant was not measured, or there were fewer than 6 rounds.
        compute, communication, waiting: the mean rank's parts of a step, medians of some steps
            timed apart: with meetings of the ranks before each collective, or, where a decode step
            is replayed from a CUDA graph, by profiler. NaN where the profiler did not see enough
            (`attrs["notes"]`). What a fused collective computes counts as communication. Those of
            prefill are of steps launched by the host, and can exceed a replayed `median`.
        counts, collectives, bytes_sent: of one step and rank, as in sm.Ledger; sent: the same as a
            list of {"op", "bytes", "count"}.
        memory, weights: peak and weights of the rank that holds most, in bytes. A replayed prefill
            step counts with what it took while it was captured, which its graph keeps.
        stand_in: seconds of a step for what stands in for a simulated rank's all-gathers and
            reduce-scatters; they are in `median`, and of replayed decode steps in `compute` too.
        is_graph: whether the steps of `median` were replayed from a CUDA graph: all decode steps,
            or all full prefill steps. Others of prefill, shorter or of fewer prompts, and the
            decode steps of `output_len`, were launched by the host.
    `attrs` holds hardware, "chip" (a GPU's measured rates), versions, dtype, seed, date, parallel,
    config, workload, every step's time ("samples"), the ledgers' remarks ("notes"), and "routing":
    what was asked, "busiest": the busiest expert over the mean, averaged over layers, "own_share":
    the same of the rows that a rank computes, for the rank that has most. "quantization": None, or
    {"weights": "fp8", "linear", "experts": what computes with them}.

    Args:
        source: a shape, which gets random weights drawn on the device; or a checkpoint's folder.
        parallel: None means tp over all ranks; with simulate_rank one rank runs alone.
        routing: "uniform" makes the random router's biases small, "skewed" keeps them as drawn:
            some experts then get ten times the mean. None means uniform, and for a checkpoint its
            own.
        layers: only these decoder layers.
        quantization: "fp8" for weights that stay in FP8, as in Step3p5ForCausalLM.from_pretrained.
        eager: let the host launch every step, also where CUDA graphs could be replayed.

    Raises:
        ConfigError: what cannot be run, before anything is.
        RankError, RankTimeout: as `Ranks.run`.
    """
    import pandas as pd

    parallel = parallel or ParallelConfig(tp=ranks_in(ranks))
    check_world(parallel, ranks)
    work = workload or Workload()
    plan = ThroughputPlan.of(
        source, variants, work, parallel, dtype, routing, layers, seed, quantization, eager
    )
    records = run_everywhere(ranks, timeout, run_workload, plan)
    rows, samples = [], []
    slowest = {name: _slowest(records, name) for name in plan.variants}
    for name in plan.variants:
        kinds = zip(*(record.steps[name] for record in records), strict=True)
        for number, same in enumerate(kinds):
            seconds = slowest[name][number]
            row = {"variant": name, **_row(plan, same[0], seconds), **mean_parts(same)}
            rounds = {
                other: _rounds(plan, same[0].phase, times[number])
                for other, times in slowest.items()
            }
            row |= against_baseline(name, rounds, speedup.gain)
            row["memory"] = max(record.memory[name] for record in records)
            row["weights"] = max(record.weights for record in records)
            rows.append(row)
            samples.append({key: row[key] for key in ("variant", "phase", "batch")})
            samples[-1]["seconds"] = seconds
    frame = pd.DataFrame(rows)
    frame.attrs = {**_attributes(plan, records), "samples": samples}
    return frame


def _slowest(records: list[RankThroughput], name: str) -> list[list[float]]:
    """For each kind of step the times of all steps: those of the rank that took longest."""
    return [
        [max(times) for times in zip(*(step.seconds for step in same), strict=True)]
        for same in zip(*(record.steps[name] for record in records), strict=True)
    ]


def _rounds(plan: ThroughputPlan, phase: str, seconds: list[float]) -> list[float]:
    """What the variants took turns at: batches of prompts, or single decode steps."""
    if phase == "decode":
        return seconds
    return np.reshape(seconds, (len(plan.workload.batches), -1)).sum(1).tolist()


def _row(plan: ThroughputPlan, step: StepTimes, seconds: list[float]) -> dict[str, Any]:
    work = plan.workload
    if step.phase == "prefill":
        produced = work.prompts * (work.input_len + work.output_len)
        full = _full_steps(work, seconds)
    else:
        produced, full = step.batch * len(seconds), seconds
    p10, median, p90 = np.quantile(full, (0.1, 0.5, 0.9)).tolist()
    return {
        "phase": step.phase,
        "tokens": step.batch * step.length,
        "batch": step.batch,
        "length": step.length,
        "context": step.context,
        "median": median,
        "p10": p10,
        "p90": p90,
        "steps": len(full),
        "tokens_per_second": produced / sum(seconds),
        "collectives": sum(step.counts.values()),
        "counts": step.counts,
        "bytes_sent": step.bytes_sent,
        "sent": [
            {"op": op, "bytes": size, "count": count} for (op, size), count in step.sent.items()
        ],
        "stand_in": step.stand_in,
        "is_graph": step.is_graph,
    }


def _full_steps(work: Workload, seconds: list[float]) -> list[float]:
    """The times of the steps that are as long and wide as the first."""
    kept, times, first = [], iter(seconds), work.batches[0]
    for batch in work.batches:
        for start in range(0, work.input_len, batch.length):
            length = min(batch.length, work.input_len - start)
            time = next(times)
            if (batch.prompts, length) == (first.prompts, first.length):
                kept.append(time)
        for _ in range(work.output_len - 1):
            next(times)
    return kept


def _attributes(plan: ThroughputPlan, records: list[RankThroughput]) -> dict[str, Any]:
    first = records[0]
    return {
        **attributes([record.place for record in records], plan.dtype, plan.parallel),
        "chip": asdict(first.chip) if first.chip else None,
        "quantization": first.quantization,
        "seed": plan.seed,
        "config": plain(asdict(plan.config)),
        "layers": plain(plan.layers),
        "workload": plain(asdict(plan.workload)),
        "routing": {"asked": plan.routing, **_balance(plan, records)},
        "method": speedup.GAIN_METHOD,
        "notes": list(dict.fromkeys(note for record in records for note in record.notes)),
    }


def _balance(plan: ThroughputPlan, records: list[RankThroughput]) -> dict[str, float]:
    """How evenly the tokens of one step were spread over experts and over ranks."""
    load = records[0].load
    if not load.numel():
        return {"busiest": 1.0, "own_share": 1.0}
    groups = load.view(len(load), plan.parallel.ep, -1).sum(-1).float()
    if plan.parallel.simulate_rank is not None:  # this rank's group alone was computed
        own = plan.parallel.simulate_rank // plan.parallel.moe_tp
        share = groups[:, own] / groups.mean(-1)
    else:
        share = groups.amax(-1) / groups.mean(-1)
    busiest = sum(imbalance(layer) for layer in load) / len(load)
    return {"busiest": busiest, "own_share": float(share.mean())}
