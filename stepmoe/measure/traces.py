"""What torch.profiler exports, read: the ledger's steps and the operations within them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: The name of the whole forward pass in a trace; the ledger's steps begin with STEP.
FORWARD, STEP = "stepmoe forward", "stepmoe::"

# The profiler's categories of named ranges and of what runs in them: on the GPU where there is one,
# since the host has only launched a kernel when its own range ends.
_RANGES = {"cpu": "user_annotation", "cuda": "gpu_user_annotation"}
_WORK = {"cpu": ("cpu_op",), "cuda": ("kernel", "gpu_memcpy", "gpu_memset")}


@dataclass(frozen=True)
class Event:
    """A stretch of one rank's time.

    Attributes:
        kind: "collective": a step of the ledger that communicates, waiting included; "step": one
            that computes; "op": an outermost torch operation, or on a GPU a kernel or a copy.
        name: the step's label, or the operation's name.
        op: of the step, or of the step in which the operation ran ("attention"); else empty.
        start, seconds: on the rank's wall clock.
    """

    kind: str
    name: str
    op: str
    start: float
    seconds: float


def events_of(
    trace: dict[str, Any], device: str, collectives: Sequence[str], *, host_waits: bool = False
) -> Iterator[Event]:
    """The events of the forward pass in one rank's trace, in the order they begin.

    Operations within a collective are left out: the collective stands for them.

    Args:
        device: "cpu" or "cuda".
        collectives: which ops of steps communicate.
        host_waits: whether it is the host that carries out the collectives of a GPU's tensors
            (gloo); all that the GPU has of them is copies.
    """
    zero, ranges = trace["baseTimeNanoseconds"] / 1e9, _RANGES[device]
    collective_ranges = _RANGES["cpu"] if host_waits else ranges
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    wholes = [e for e in complete if e.get("cat") == ranges and e["name"] == FORWARD]
    whole = max(wholes, key=lambda event: event["dur"])  # on a GPU every stream has one
    step, step_end, op_end = "", 0.0, 0.0
    for event in sorted(complete, key=lambda event: (event["ts"], -event["dur"])):
        begin, end, name = event["ts"], event["ts"] + event["dur"], event["name"]
        category, is_main = event.get("cat"), event["tid"] == whole["tid"]
        if not whole["ts"] <= begin < whole["ts"] + whole["dur"]:
            continue
        if name.startswith(STEP):
            name = name.removeprefix(STEP)
            op = name.partition(",")[0]
            kind = "collective" if op in collectives else "step"
            if category != (collective_ranges if kind == "collective" else ranges):
                continue
            if is_main:
                step, step_end = op, end
        elif category in _WORK[device] and is_main and begin >= op_end:
            kind, op, op_end = "op", step if begin < step_end else "", end
            if op in collectives:
                continue
        else:
            continue
        yield Event(kind, name, op, zero + begin / 1e6, event["dur"] / 1e6)


def merged(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All ranks in one trace: pid is the rank, times count from the earliest event."""
    zero = min(trace["baseTimeNanoseconds"] for trace in traces)
    events: list[dict[str, Any]] = []
    for rank, trace in enumerate(traces):
        names = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        order = {"name": "process_sort_index", "ph": "M", "pid": rank, "args": {"sort_index": rank}}
        events += [names, order]
        shift = (trace["baseTimeNanoseconds"] - zero) / 1e3
        for event in trace["traceEvents"]:
            # Marks of the profiler itself belong to no process; names of processes are above.
            if not isinstance(event.get("pid"), int) or event["name"].startswith("process_"):
                continue
            moved = {**event, "pid": rank, "ts": event["ts"] + shift}
            if "id" in event:  # arrows are joined by their id, which another rank uses as well
                moved["id"] = f"{rank}.{event['id']}"
            events.append(moved)
    first = min(event["ts"] for event in events if event["ph"] == "X")
    for event in events:
        if "ts" in event:
            event["ts"] -= first
    return {"displayTimeUnit": "ms", "traceEvents": events}
