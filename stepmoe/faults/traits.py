"""What a fault leaves behind, by which it can be told from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.capture import NAMES
from stepmoe.faults.catalogue import LEDGER, TIMEOUT
from stepmoe.faults.guards import TOLERANCE
from stepmoe.faults.lab import Findings, Observation
from stepmoe.measure.distance import relative_error


@dataclass(frozen=True)
class Place:
    """A captured value: of which layer, or the logits (layer None)."""

    layer: int | None
    name: str

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name} of layer {self.layer}"

    def of(self, seen: Observation) -> Tensor:
        """The value itself, (batch, length, hidden or vocab)."""
        assert seen.logits is not None
        return seen.logits if self.layer is None else seen.states[self.layer][self.name]


LOGITS = Place(None, "logits")


@dataclass(frozen=True)
class Traits:
    """What can be seen of a run without knowing what is wrong with it.

    Attributes:
        hung: no rank came to the end, or not all.
        ledger: layers in which it sends something else than promised.
        right: whether the logits are.
        agree: whether every rank has the same logits.
        first: the first value that is wrong, in the order of computing; None if none is.
        factor: of that value, best fit of "factor times the right one".
        error: of that value, relative, in the 2-norm.
    """

    hung: bool = False
    ledger: tuple[str, ...] = ()
    right: bool = True
    agree: bool = True
    first: Place | None = None
    factor: float = 1.0
    error: float = 0.0

    def difference(self, other: Traits) -> str | None:
        """What would be seen of the other run (a guess) and is not of this one; None: nothing."""
        if self.hung != other.hung:
            return "the ranks would hang" if other.hung else "the ranks would come to an end"
        if self.ledger != other.ledger:
            if not other.ledger:
                return "the ledger would be as promised"
            return f"the ledger would differ from the promise in {', '.join(other.ledger)}"
        if self.right != other.right:
            return f"the logits would be {'right' if other.right else 'wrong'}"
        if self.agree != other.agree:
            return f"the ranks would {'agree' if other.agree else 'disagree'} about the logits"
        if self.first != other.first:
            return f"the first wrong value would be {other.first or 'none'}"
        if abs(self.factor - other.factor) > 0.05 * abs(other.factor):
            return f"{other.first} would be about {other.factor:.2f} times the right one"
        if max(self.error, other.error) > 3 * min(self.error, other.error):
            return f"{other.first} would be off by {other.error:.1g} of its size"
        return None


def traits_of(findings: Findings, exact: Observation) -> Traits:
    """Of a run that `examine` has seen."""
    if findings.guards[TIMEOUT]:
        return Traits(hung=True)
    logits = [LOGITS.of(seen) for seen in findings.passes]
    seen = findings.passes[0]
    first = first_wrong(seen, exact)
    return Traits(
        ledger=tuple(line.partition(":")[0] for line in findings.guards[LEDGER]),
        right=not _is_wrong(LOGITS, seen, exact),
        agree=all(torch.equal(own, logits[0]) for own in logits),
        first=first,
        factor=factor(first.of(seen), first.of(exact)) if first else 1.0,
        error=relative_error(first.of(seen), first.of(exact)) if first else 0.0,
    )


def first_wrong(seen: Observation, exact: Observation) -> Place | None:
    """The first value of a rank that is further from float64 than rounding goes."""
    places = [Place(layer, name) for layer in sorted(exact.states) for name in NAMES]
    return next((p for p in [*places, LOGITS] if _is_wrong(p, seen, exact)), None)


def evidence(
    findings: Findings, exact: Observation
) -> tuple[str, Tensor | None, dict[int, Tensor]]:
    """The first wrong value (the logits, if none is): its name, the right one, that of each rank.

    Of ranks that hung: the logits' name, None and nothing.
    """
    if not findings.passes:
        return str(LOGITS), None, {}
    place = first_wrong(findings.passes[0], exact) or LOGITS
    arrived = {rank: place.of(seen) for rank, seen in enumerate(findings.passes)}
    return str(place), place.of(exact), arrived


def factor(value: Tensor, right: Tensor) -> float:
    """The number that, times the right values, is nearest to these: least squares."""
    x, y = right.double().flatten(), value.double().flatten()
    return float(x @ y / (x @ x))


def _is_wrong(place: Place, seen: Observation, exact: Observation) -> bool:
    value = place.of(seen)
    return not relative_error(value, place.of(exact)) <= TOLERANCE[value.dtype]
