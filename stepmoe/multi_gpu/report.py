"""What a folder of results says: the headline, and the predictions beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.measure import load, load_fused_ops
from stepmoe.measure.fused_calls import FUSED
from stepmoe.measure.report import aligned, throughput_table, verdict
from stepmoe.multi_gpu.fit import FittedLink, Term, collective_terms, fit_link, step_terms
from stepmoe.multi_gpu.records import Record, file_of, read
from stepmoe.multi_gpu.recovery import loss_of, losses_table
from stepmoe.predict import AFTER, BEFORE, BEST, RANKS, Compute, compute_of_run, pooled

if TYPE_CHECKING:
    import pandas as pd

# Up to so many tokens, those of decode steps, the least gain of the fused operation is told.
_FUSED_TOKENS = 64


def report(folder: Path, compute_file: Path | None) -> str:
    """In words and tables.

    Args:
        compute_file: one rank's recorded compute, of `prefill --simulate-rank`; None for none.

    Raises:
        ConfigError: no result, or a file that is none.
    """
    found = [read(folder, file.stem) for file in folder.glob("*.json")]
    kept = sorted((record for record in found if record), key=lambda record: record.run["date"])
    records = {record.run["step"]: record for record in kept}
    if not records:
        raise ConfigError(f"--folder {folder}: no results in it; run the command without --report")
    return "\n\n".join(_parts(folder, records, compute_file))


def _parts(folder: Path, records: Mapping[str, Record], compute_file: Path | None) -> Iterator[str]:
    first = next(iter(records.values()))
    yield _steps(records)
    if first.run["rehearsal"]:
        yield "A rehearsal: its times mean nothing, and nothing is compared with them."
        return
    done = {name for name, record in records.items() if record.done}
    if "recovery" in done:
        yield losses_table([loss_of(row) for row in records["recovery"].content["rows"]])
    for name in sorted(done & {"decode", "layer-full", "layer-sliding"}):
        yield f"{name}\n{throughput_table(load(file_of(folder, name)))}"
    if "prefill-fp8" in done:
        frame = load(file_of(folder, "prefill-fp8"))
        yield f"prefill-fp8\n{throughput_table(frame)}\n\n{_headline(frame)}"
    fitted, remark = None, "No link is fitted: step collectives is not done."
    if "collectives" in done:
        collectives = load_fused_ops(file_of(folder, "collectives"))
        yield _collectives(collectives)
        fitted, remark = _fitted(collectives)
        yield remark
        yield table(collective_terms(collectives, fitted))
    elif "prefill" in done:
        yield remark
    if "prefill" in done:
        frame = load(file_of(folder, "prefill"))
        yield throughput_table(frame)
        yield _headline(frame)
        if compute_file is None:
            yield (
                "Steps are not compared with their prediction without --compute FILE (one rank's "
                "recorded compute)."
            )
            return
        compute, remark = recorded_compute(compute_file, frame)
        yield remark
        if compute:
            yield table(step_terms(frame, compute, fitted))


def _fitted(collectives: Mapping[str, Any]) -> tuple[FittedLink | None, str]:
    """The link fitted to the collectives, or none; and which, or why."""
    try:
        fitted = fit_link(collectives)
    except ConfigError as error:
        return None, f"No link is fitted: {error}."
    low, high = (edge / 1e9 for edge in fitted.bandwidth)
    return fitted, (
        f"Fitted link: latency {fitted.link.latency * 1e6:.2f} µs "
        f"({fitted.latency[0] * 1e6:.2f} to {fitted.latency[1] * 1e6:.2f}), bandwidth "
        f"{fitted.link.bandwidth / 1e9:.0f} GB/s ({low:.0f} to {high:.0f})."
    )


def table(terms: Sequence[Term]) -> str:
    """Predicted, measured, their ratio, and what the fitted link says."""
    head: tuple[str, ...] = ("", "predicted", "measured", "measured / predicted", "fitted", "unit")
    lines = [
        (
            term.name,
            "left out" if term.predicted is None else _number(term.predicted),
            _number(term.measured),
            "-" if math.isnan(term.ratio) else f"{term.ratio:.2f}",
            "-" if term.fitted is None else _number(term.fitted),
            term.unit,
        )
        for term in terms
    ]
    return aligned([head, *lines])


def recorded_compute(file: Path, frame: pd.DataFrame) -> tuple[dict[str, Compute], str]:
    """Each variant's recorded compute, if it is of the same share of the same steps.

    Returns:
        It, and where it is from; or nothing, and why.

    Raises:
        ConfigError: the file is no throughput measurement.
    """
    recorded = load(file)
    if "tokens_per_second" not in recorded:
        raise ConfigError(f"--compute {file}: is not what prefill --json writes; give another")
    theirs, ours = _what_was_run(recorded), _what_was_run(frame)
    for name, here in ours.items():
        if (there := theirs.get(name)) != here:
            return {}, f"{file.name} is of {name} {there}, this run of {here}: steps not compared."
    gpu = recorded.attrs["hardware"]["gpus"][0]
    return pooled(compute_of_run(recorded)), f"Predicted compute: {gpu}, {file.name}."


def _what_was_run(frame: pd.DataFrame) -> dict[str, Any]:
    """What two measurements of prefill steps must have in common for their compute to be equal."""
    attrs, prefill = frame.attrs, frame[frame["phase"] == "prefill"]
    return {
        "steps from a CUDA graph": bool(prefill["is_graph"].any()),
        "parallel": {k: v for k, v in attrs["parallel"].items() if k != "simulate_rank"},
        "layers": attrs["layers"],
        "dtype": attrs["dtype"],
        "quantization": attrs.get("quantization"),  # earlier files were all without
        **{name: attrs["workload"][name] for name in ("input_len", "chunk")},
        **{f"config.{name}": value for name, value in attrs["config"].items()},
    }


def _steps(records: Mapping[str, Record]) -> str:
    head: tuple[str, ...] = ("step", "status", "seconds", "date", "tests")
    lines = [
        (name, r.run["status"], f"{r.run['seconds']:.0f}", r.run["date"][:10], _tests(r))
        for name, r in records.items()
    ]
    first = next(iter(records.values())).run
    links = ", ".join(first["machine"].get("links", []))
    where = f"{first['setting']['ranks']} ranks, {first['setting']['gpu'] or 'CPU'}"
    return f"{where}{f', linked by {links}' if links else ''}\n{aligned([head, *lines])}"


def _tests(record: Record) -> str:
    total = record.content.get("total", {})
    return ", ".join(f"{count} {outcome}" for outcome, count in total.items())


def _headline(frame: pd.DataFrame) -> str:
    """The fastest variant, against what was published where that is of the same."""
    rows = frame[frame["phase"] == "prefill"].to_dict("records")
    best = max(rows, key=lambda row: row["tokens_per_second"])
    speed, against = best["tokens_per_second"], f"against three_all_reduces {verdict(best)}"
    layers, ranks = frame.attrs["layers"], frame.attrs["parallel"]["tp"]
    if layers is not None or ranks != RANKS:
        every = Step3p5Config.flash().num_hidden_layers
        run = f"{every if layers is None else len(layers)} of {every} layers on {ranks} GPUs"
        return (
            f"Best: {best['variant']}, {speed:,.0f} tokens/s; {against}. {run}: not comparable "
            "with the published figures."
        )
    return (
        f"Best: {best['variant']}, {speed:,.0f} tokens/s (published, best launch, 8 H200 in FP8: "
        f"{BEST:,.0f}); {against} (published {AFTER / BEFORE:.2f}x)."
    )


def _collectives(content: Mapping[str, Any]) -> str:
    """How the fused operation does against its parts, its largest error, and what did not run."""
    times = {
        (row["implementation"], row["tokens"]): row["median_us"]
        for row in content["rows"]
        if "median_us" in row
    }
    gains = {
        tokens: unfused / min(times[name, tokens] for name in FUSED if (name, tokens) in times)
        for (implementation, tokens), unfused in times.items()
        if implementation == "unfused" and any((name, tokens) in times for name in FUSED)
    }
    error = max((row["error"] for row in content["rows"] if "error" in row), default=math.nan)
    refused: dict[str, list[str]] = {}
    for row in content["rows"]:
        if "refusal" in row:
            refused.setdefault(row["implementation"], []).append(str(row["tokens"]))
    lines = [
        f"{name} did not run at {', '.join(at)} tokens: its file says why."
        for name, at in refused.items()
    ]
    shown = ", ".join(f"{tokens}: {gain:.2f}x" for tokens, gain in sorted(gains.items()))
    few = [gain for tokens, gain in gains.items() if tokens <= _FUSED_TOKENS]
    least = f"{min(few):.2f}x" if few else "not measured"
    return "\n".join(
        [
            f"Best fused implementation against all_reduce + add + norm, by tokens: {shown}.",
            f"Up to {_FUSED_TOKENS} tokens at least {least}. Largest relative error against "
            f"float64: {error:.1e}.",
            *lines,
        ]
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
