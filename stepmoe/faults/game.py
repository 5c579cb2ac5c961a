"""The game: a hidden fault, its traces, and a check of the name it is given."""

from __future__ import annotations

import random
from functools import cached_property

import torch
from torch import Tensor

from stepmoe.comm.ledger import Ledger
from stepmoe.errors import ConfigError
from stepmoe.faults.catalogue import FAULTS, TIMEOUT
from stepmoe.faults.lab import Findings, Observation, Setting, exact_pass, examine
from stepmoe.faults.promise import promised, recorded
from stepmoe.faults.traits import Traits, traits_of
from stepmoe.launch import Ranks
from stepmoe.measure.source import Source, config_of
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS

_DTYPE = torch.float32
_LIMIT = 5.0  # seconds after which a pass of a small model has hung


class WrongGuess(ValueError):
    """The guess is not the fault; the message is a hint."""


class Case:
    """A fault that is in a model somewhere, and everything it left behind.

        case = Case(ranks, source, input_ids, seed=3)
        print(case)                      # variant and layout
        case.ledger, case.promise        # what rank 0 sent, and what it should have
        case.passes                      # each rank's logits and captured states; empty if it hung
        case.check("wrong_group")        # raises WrongGuess, with a hint, unless that is it

    Args:
        ranks: four of them.
        source: folder of a checkpoint, or a config.
        input_ids: (batch, length) int64, what the model is given.
        seed: draws fault, variant and layout; None draws another case each time.
    """

    def __init__(
        self, ranks: Ranks, source: Source, input_ids: Tensor, seed: int | None = None
    ) -> None:
        self._ranks, self._ids = ranks, input_ids
        self._fault, self.setting = _draw(source, random.Random(seed))
        self.exact = exact_pass(source, input_ids)
        self._findings = self._run(self._fault)

    def __str__(self) -> str:
        layout = self.setting.parallel
        return (
            f"variant {self.setting.variant}, tp={layout.tp}, ep={layout.ep}, "
            f"attention={layout.attention!r}: one of {', '.join(self.suspects)}"
        )

    __repr__ = __str__  # a dataclass's or the default one might show the fault

    @property
    def suspects(self) -> list[str]:
        """Faults that can occur in this variant and layout."""
        return _suspects(self.setting)

    @property
    def passes(self) -> list[Observation]:
        """What each rank computed, with no guard on; empty if it hung."""
        return self._findings.passes

    @property
    def ledger(self) -> Ledger | None:
        """Rank 0's; None if it hung."""
        return self.passes[0].ledger if self.passes else None

    @property
    def timeout(self) -> str:
        """Where the ranks waited; empty if they came to an end."""
        return "".join(self._findings.guards[TIMEOUT])

    def traffic(self, layer: int | None) -> str:
        """Of one layer (None: outside the layers), what is promised and what was sent.

        An implementation and its reason stand below, once, where all the lines have the same.
        """
        batch, length = self._ids.shape
        want = promised(
            self.setting.variant,
            self.setting.parallel,
            config_of(self.setting.source),
            batch,
            length,
            _DTYPE,
            torch.device("cpu"),
        )
        sides = {"promised": want, "sent": recorded(self.ledger) if self.ledger else []}
        rows = [(side, p) for side, ps in sides.items() for p in ps if p.layer == layer]
        hows = {p.how for _, p in rows if p.how}
        once = len(hows) == 1
        lines = [f"{side:<9} {p.what if once else p}" for side, p in rows]
        return "\n".join([*lines, *(hows if once else ())])

    def check(self, guess: str) -> str:
        """Says so if `guess` is the fault.

        Raises:
            ConfigError: there is no such fault.
            WrongGuess: it is another; the hint says what would be seen if it were this one.
        """
        if guess not in FAULTS:
            raise ConfigError(f"{guess!r} is no fault: choose one of {', '.join(self.suspects)}")
        if guess == self._fault:
            return f"Yes: {FAULTS[guess].what}."
        if guess not in self.suspects:
            raise WrongGuess(f"{guess} cannot occur here: it needs {FAULTS[guess].where}.")
        seen = self._traits.difference(self._traits_of(guess)) or "nothing seen here would differ"
        raise WrongGuess(f"Not {guess}: then {seen}.")

    @cached_property
    def _traits(self) -> Traits:
        return traits_of(self._findings, self.exact)

    def _traits_of(self, guess: str) -> Traits:
        if TIMEOUT in FAULTS[guess].caught_by:
            return Traits(hung=True)  # known without waiting for it
        return traits_of(self._run(guess), self.exact)

    def _run(self, fault: str) -> Findings:
        return examine(self._ranks, self.setting, self._ids, fault, self.exact, timeout=_LIMIT)


def _draw(source: Source, chance: random.Random) -> tuple[str, Setting]:
    """A fault, each as likely as another, and somewhere it can occur."""
    fault = chance.choice(list(FAULTS))
    settings = [
        Setting(source, variant, ParallelConfig(4, ep, attention), _DTYPE)
        for variant in VARIANTS
        for ep in (1, 2, 4)
        for attention in ("tp", "dp")
    ]
    return fault, chance.choice([s for s in settings if fault in _suspects(s)])


def _suspects(setting: Setting) -> list[str]:
    config = config_of(setting.source)
    return [
        name
        for name, fault in FAULTS.items()
        if fault.applies(setting.variant, setting.parallel, config)
    ]
