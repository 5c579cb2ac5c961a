"""The bug lab: twelve bugs that really happened, to be injected, and the guards that catch them.

with faults.FAULTS["wrong_group"].inject(model), faults.unchecked():
    model(input_ids)
"""

from stepmoe.faults.answers import accuracy_under
from stepmoe.faults.catalogue import FAULTS, GUARDS
from stepmoe.faults.fault import Fault
from stepmoe.faults.game import Case, WrongGuess
from stepmoe.faults.guards import (
    VoteError,
    ledger_diff,
    oracle_diff,
    unchecked,
    vote,
    voting,
)
from stepmoe.faults.lab import Findings, Observation, Setting, exact_pass, examine, observe
from stepmoe.faults.promise import promised
from stepmoe.faults.traits import evidence

__all__ = [
    "FAULTS",
    "GUARDS",
    "Case",
    "Fault",
    "Findings",
    "Observation",
    "Setting",
    "VoteError",
    "WrongGuess",
    "accuracy_under",
    "evidence",
    "exact_pass",
    "examine",
    "ledger_diff",
    "observe",
    "oracle_diff",
    "promised",
    "unchecked",
    "vote",
    "voting",
]
