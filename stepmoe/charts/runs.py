"""One run of all ranks on one clock, and room for the labels above it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepmoe.comm.ledger import Entry, Ledger
from stepmoe.errors import ConfigError


@dataclass
class Run:
    """Steps of each rank, with starts on one clock: zero is the first step that is drawn."""

    ranks: list[int]
    steps: list[list[tuple[float, Entry]]]

    @classmethod
    def of(cls, ledgers: Sequence[Ledger], layers: Iterable[int] | None, name: str = "") -> Run:
        if isinstance(ledgers, Ledger):
            raise ConfigError("give a list with the ledger of every rank; [ledger] for one alone")
        ledgers, of_name = list(ledgers), f" of {name}" if name else ""
        if not any(ledger.steps for ledger in ledgers):
            raise ConfigError(
                f"the ledgers{of_name} are empty: record them around a model call, "
                "`with sm.Ledger() as ledger: model(input_ids)`, and return them from every rank"
            )
        chosen = None if layers is None else set(layers)
        steps = [
            [
                (step.start - zero, step)
                for step in ledger.steps
                if chosen is None or step.layer in chosen
            ]
            for ledger, zero in zip(ledgers, _zeros(ledgers, of_name), strict=True)
        ]
        if not any(steps):
            held = {step.layer for ledger in ledgers for step in ledger.steps}
            raise ConfigError(
                f"the ledgers{of_name} hold no step of layers {sorted(chosen or ())}; "
                f"layers they hold: {sorted(layer for layer in held if layer is not None)}"
            )
        first = min(start for lane in steps for start, _ in lane)
        lanes = [[(start - first, step) for start, step in lane] for lane in steps]
        return cls([ledger.rank for ledger in ledgers], lanes)

    @property
    def end(self) -> float:
        """Seconds until the last step ended."""
        return max(start + step.seconds for lane in self.steps for start, step in lane)

    @property
    def ops(self) -> set[str]:
        return {step.op for lane in self.steps for _, step in lane}


def _zeros(ledgers: Sequence[Ledger], of_name: str) -> list[float]:
    """On each rank's own clock, the moment that is the same for all of them."""
    if len(ledgers) == 1:
        return [0.0]
    firsts = [next(iter(ledger.entries), None) for ledger in ledgers]
    if any(first is None for first in firsts):
        raise ConfigError(
            f"the ledgers{of_name} cannot be aligned: not every rank recorded a collective. "
            "Record them around a call in which all ranks communicate, or draw one rank"
        )
    kinds = {(first.op, first.layer, first.site) for first in firsts if first}
    if len(kinds) > 1:
        raise ConfigError(
            f"the ledgers{of_name} begin with different collectives ({sorted(map(str, kinds))}): "
            "give the ledgers of all ranks of one and the same call"
        )
    return [first.start + first.seconds for first in firsts if first]


def spread(middles: list[float], widths: list[float], length: float) -> list[float]:
    """Places for labels of these widths, in order, near their middles, apart, within 0 to length.

    Labels that would overlap form a block around the mean of what they want (pooling of adjacent
    violators), which makes the sum of their squared moves least.
    """
    offsets = [sum(widths[:i]) + width / 2 for i, width in enumerate(widths)]
    blocks: list[tuple[float, int]] = []  # sum of the wanted origins, labels in the block
    for middle, offset in zip(middles, offsets, strict=True):
        total, count = middle - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / count:
            before = blocks.pop()
            total, count = total + before[0], count + before[1]
        blocks.append((total, count))
    room = length - sum(widths)
    origins = [min(max(total / count, 0.0), room) for total, count in blocks for _ in range(count)]
    return [origin + offset for origin, offset in zip(origins, offsets, strict=True)]
