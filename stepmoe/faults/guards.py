"""The guards: what could have caught a fault, and the switch that turns the placement check off.

Ledger diff and oracle look at a pass that has ended and return what they found, one line each; an
empty list is their approval. The placement check and the vote raise before anything is sent; the
time limit is `Ranks`' own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from stepmoe.comm import communicator
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import RankGroup
from stepmoe.comm.ledger import Entry, Ledger, note, record
from stepmoe.comm.placement import Placed
from stepmoe.faults.patching import replaced
from stepmoe.faults.promise import Promised, recorded
from stepmoe.measure.distance import relative_error

# Largest relative error (2-norm) against float64 that is taken for rounding: some hundred times the
# dtype's own precision, because roundings add up over layers. The smallest wrong sum is far above.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}

CHECK_IS_OFF = "the placement check is off: a wrong sum passes in silence"


class VoteError(RuntimeError):
    """The ranks were about to enter different collectives; says which rank wanted what."""


@contextmanager
def unchecked() -> Iterator[None]:
    """Turns the placement check of this rank off, for the lab: a wrong sum then does its damage.

    Only a context can do it: whatever happens in the context, and also if it is dropped without
    being left, the check is on again. Every ledger open at its start is told. A partial sum added
    to a complete value is then called complete, as code without placements believes.
    """

    def trusting(self: Placed, operation: str) -> Placed:
        return self

    def believed(self: Placed, other: Placed) -> Placed:
        complete = other if self.is_partial else self
        name = f"{self.name} + {other.name}"
        return self.with_(self.tensor + other.tensor, complete.placement, name)

    def nothing(self: Communicator, placed: Placed, op: str) -> None:
        pass

    note(CHECK_IS_OFF)
    patches = [(Placed, name, trusting) for name in ("unspent", "complete", "replicated")]
    checks = [(Communicator, name, nothing) for name in ("_expect_partial", "_expect_own_group")]
    with replaced([*patches, (Placed, "__add__", believed), *checks]):
        yield


@contextmanager
def voting() -> Iterator[None]:
    """Before each collective all its ranks say what they are about to enter, and must agree.

    Every rank has to be inside together. Costs a message a collective.

    Raises:
        VoteError: they do not agree; on every rank, and nothing was sent.
    """

    def after_vote(
        entry: Entry, device: torch.device, group: RankGroup | None = None
    ) -> AbstractContextManager[Entry]:
        if group is not None and group.size > 1:
            vote(group, f"{entry.label}, {entry.implementation or 'plain'}", device)
        return record(entry, device, group)

    with replaced([(communicator, "record", after_vote)]):
        yield


def vote(group: RankGroup, choice: str, device: torch.device) -> None:
    """Let the ranks of a group compare what each is about to do: two numbers.

    Raises:
        VoteError: they do not all say the same.
    """
    number = zlib.crc32(choice.encode())
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group.process_group)
    highest, minus_lowest = extremes.tolist()
    if highest != -minus_lowest:
        choices: list[str] = [""] * group.size
        dist.all_gather_object(choices, choice, group=group.process_group)
        said = "\n".join(f"  rank {r}: {c}" for r, c in zip(group.ranks, choices, strict=True))
        raise VoteError(f"the ranks of {group} do not agree on what comes next:\n{said}")


def ledger_diff(ledger: Ledger, promise: list[Promised]) -> list[str]:
    """Where a rank's collectives differ from what the variant promises, layer by layer."""
    done = recorded(ledger)
    layers = list(dict.fromkeys(p.layer for p in [*promise, *done]))
    differences = []
    for layer in layers:
        want, have = ([p for p in side if p.layer == layer] for side in (promise, done))
        if want != have:
            where = "outside the layers" if layer is None else f"layer {layer}"
            differences.append(f"{where}: promised {_listed(want)}; sent {_listed(have)}")
    return differences


def _listed(collectives: list[Promised]) -> str:
    return " + ".join(map(str, collectives)) or "nothing"


States = Mapping[int, Mapping[str, Tensor]]  # layer, name, value: as Capture.states


def oracle_diff(
    logits: Tensor, states: States, exact_logits: Tensor, exact_states: States
) -> list[str]:
    """Which captured states, and whether the logits, are further from float64 than rounding goes.

    Tensors of equal shape; the tolerance is that of the dtype of `logits`.
    """
    limit = TOLERANCE[logits.dtype]
    values = {"logits": (logits, exact_logits)}
    for layer, named in exact_states.items():
        values |= {f"layer {layer}, {n}": (states[layer][n], v) for n, v in named.items()}
    errors = {name: relative_error(*pair) for name, pair in values.items()}
    return [f"{name}: off by {error:.2g}" for name, error in errors.items() if not error <= limit]
