"""A measurement in words: as a table for a terminal, and as a line for below a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stepmoe.measure.plan import BASELINE
from stepmoe.measure.speedup import NO_DIFFERENCE
from stepmoe.measure.store import check_frame

if TYPE_CHECKING:
    import pandas as pd

_SCALES = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))


def unit_for(seconds: Iterable[float]) -> tuple[float, str]:
    """Factor and unit in which the largest of these times is between 1 and 1000."""
    largest = max(seconds)
    return next((scale for scale in _SCALES if largest * scale[0] >= 1), _SCALES[-1])


def where(hardware: dict[str, Any]) -> str:
    """What the ranks ran on: "4 CPU ranks on 2 cores (AMD EPYC), gloo"."""
    ranks, gpus = hardware["ranks"], hardware["gpus"]
    plural = "s" if ranks > 1 else ""
    backend = "" if ranks == 1 else f", {hardware['backend']}"
    if hardware["hosts"] > 1:
        backend += f", {hardware['hosts']} hosts"
    if not gpus:
        cores = f"{hardware['cores']} core{'s' if hardware['cores'] > 1 else ''}"
        return f"{ranks} CPU rank{plural} on {cores} ({hardware['cpu']}){backend}"
    kinds = ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus)))
    verb = "taking turns on" if ranks > len(gpus) else "on"
    return f"{ranks} rank{plural} {verb} {kinds}{backend}"


def provenance(attrs: dict[str, Any]) -> str:
    """Whether a measurement was made just now or recorded, and on what."""
    made = f"recorded {attrs['date'][:10]}" if attrs["recorded"] else "live"
    return f"{made}: {where(attrs['hardware'])}, {attrs['dtype']}"


def verdict(row: dict[str, Any]) -> str:
    """A row's comparison with three_all_reduces: "1.21x (1.10 to 1.30), faster"."""
    if row["speedup_low"] != row["speedup_low"] or row["variant"] == BASELINE:
        return str(row["verdict"])
    interval = f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
    return f"{interval}, {row['verdict']}"


def title_of(row: dict[str, Any]) -> str:
    """One kind of step: "prefill, 64 tokens"."""
    tokens = row["tokens"]
    return f"{row['phase']}, {tokens} token{'s' if tokens > 1 else ''}"


def table(frame: pd.DataFrame) -> str:
    """What `compare_latency` returned, for a terminal, and what it was measured on.

    Raises:
        ConfigError: another kind of frame.
    """
    check_frame(frame)
    blocks = []
    for _, block in frame.groupby(["phase", "tokens"], sort=False):
        rows = block.to_dict("records")
        factor, unit = unit_for(row["p90"] for row in rows)
        head: tuple[str, ...] = (
            "",
            f"median {unit}",
            "p10 to p90",
            "compute",
            "communicate",
            "wait",
        )
        head = (*head, "collectives", "KiB sent", f"against {BASELINE}")
        lines = aligned([head, *(_line(row, factor) for row in rows)])
        blocks.append(f"{_described(rows[0])}\n{lines}")
    return "\n\n".join([*blocks, _notes(frame)])


def accuracy_table(frame: pd.DataFrame) -> str:
    """What `compare_accuracy` returned, for a terminal, and what it was measured on.

    Raises:
        ConfigError: another kind of frame.
    """
    check_frame(frame, "accuracy")
    head: tuple[str, ...] = (
        "",
        "right",
        "invalid",
        "accuracy",
        "95 % interval",
        "seconds",
        "ranks",
    )
    lines = [
        (
            row["variant"],
            f"{row['right']} of {row['questions']}",
            str(row["invalid"]),
            f"{row['accuracy']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['seconds']:.1f}",
            "agree" if row["ranks_agree"] else "DISAGREE",
        )
        for row in frame.to_dict("records")
    ]
    attrs = frame.attrs
    parallel = _layout(attrs["parallel"])
    versions = ", ".join(f"{name} {value}" for name, value in attrs["versions"].items())
    notes = [
        provenance(attrs),
        f"{parallel}; {versions}; {attrs['date']}",
        f"{attrs['questions']} {attrs['task']}, greedy, in batches of {attrs['batch_size']}; "
        "intervals: Wilson.",
    ]
    return "\n".join([aligned([head, *lines]), "", *notes])


def _layout(parallel: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parallel.items() if value is not None)


def throughput_table(frame: pd.DataFrame) -> str:
    """What `compare_throughput` just returned, for a terminal, and what it was measured on.

    Raises:
        ConfigError: another kind of frame.
    """
    check_frame(frame, "throughput")
    blocks = []
    for _, block in frame.groupby(["phase", "batch"], sort=False):
        rows = block.to_dict("records")
        factor, unit = unit_for(row["p90"] for row in rows)
        head: tuple[str, ...] = ("", f"median {unit}", "p10 to p90", "compute", "communicate")
        head += ("wait", "tokens/s", "peak GiB", "collectives", "MiB sent", f"against {BASELINE}")
        lines = [_throughput_line(row, factor) for row in rows]
        graph = ", replayed from a CUDA graph" if rows[0]["is_graph"] else ""
        if graph and rows[0]["phase"] == "prefill":
            graph += "; compute, communicate, wait: of steps launched by the host"
        described = f"{_described(rows[0])}, {rows[0]['steps']} steps{graph}"
        blocks.append(f"{described}\n{aligned([head, *lines])}")
    attrs = frame.attrs
    routing, work = attrs["routing"], attrs["workload"]
    alone = attrs["parallel"]["simulate_rank"] is not None
    whose = "this rank" if alone else "the rank with most rows"
    notes = [
        provenance(attrs),
        _layout(attrs["parallel"])
        + "; "
        + ", ".join(f"{name} {value}" for name, value in attrs["versions"].items())
        + f"; seed {attrs['seed']}; {attrs['date']}",
        f"{work['prompts']} prompts of {work['input_len']} tokens, {work['output_len']} new, at "
        f"most {work['chunk']} a step; weights {frame['weights'].max() / 2**30:.2f} GiB a rank; "
        "the slowest rank of each step.",
        f"routing {routing['asked'] or 'of the checkpoint'}: the busiest expert has "
        f"{routing['busiest']:.1f} x the mean, {whose} {routing['own_share']:.2f} x.",
        attrs["method"],
        *attrs["notes"],
    ]
    return "\n\n".join([*blocks, "\n".join(notes)])


def _throughput_line(row: dict[str, Any], factor: float) -> tuple[str, ...]:
    return (
        row["variant"],
        f"{row['median'] * factor:.2f}",
        f"{row['p10'] * factor:.2f} to {row['p90'] * factor:.2f}",
        *(f"{row[part] * factor:.2f}" for part in ("compute", "communication", "waiting")),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['memory'] / 2**30:.2f}",
        str(row["collectives"]),
        f"{row['bytes_sent'] / 2**20:,.1f}",
        verdict(row),
    )


def _described(row: dict[str, Any]) -> str:
    cached = f", {row['context']} cached each" if row["context"] else ""
    return f"{title_of(row)} ({row['batch']} x {row['length']} new{cached})"


def _line(row: dict[str, Any], factor: float) -> tuple[str, ...]:
    def time(name: str) -> str:
        return f"{row[name] * factor:.2f}"

    return (
        row["variant"],
        time("median"),
        f"{time('p10')} to {time('p90')}",
        time("compute"),
        time("communication"),
        time("waiting"),
        str(row["collectives"]),
        f"{row['bytes_sent'] / 1024:,.1f}",
        verdict(row),
    )


def aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns of one width: names on the left, numbers to the right, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _notes(frame: pd.DataFrame) -> str:
    attrs = frame.attrs
    rounds, added = frame["repeats"].min(), frame["split_overhead"]
    parallel = _layout(attrs["parallel"])
    versions = ", ".join(f"{name} {value}" for name, value in attrs["versions"].items())
    small = [f"{i['phase']} {i['tokens']}" for i in attrs["inputs"] if not i["exceed_cache"]]
    cache = f"{attrs['hardware']['last_level_cache'] / 2**20:.0f} MiB"
    lines = [
        provenance(attrs),
        f"{parallel}; {versions}; seed {attrs['seed']}; {attrs['date']}",
        f"median of {rounds} rounds, the slowest rank of each; the variants take turns in a round.",
        "compute, communicate, wait: the mean rank's, timed apart with a ledger open and a meeting "
        f"of the ranks before every collective. A meeting takes {attrs['meeting'] * 1e6:.0f} µs "
        f"when nobody is late; that way a step changes by {added.min():+.0%} to "
        f"{added.max():+.0%}.",
        f"{attrs['method']} It contains 1: {NO_DIFFERENCE!r}.",
        f"Last-level cache {cache} ({attrs['hardware']['last_level_cache_source']}); "
        + (
            f"all input sets of a step are smaller together for {', '.join(small)}."
            if small
            else "the input sets of every step are larger together."
        ),
    ]
    return "\n".join(lines)
