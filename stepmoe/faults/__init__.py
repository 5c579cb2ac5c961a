"""The bug lab: twelve bugs that really happened, to be injected, and the guards that catch them.

with faults.FAULTS["wrong_group"].inject(model), faults.unchecked():
    model(input_ids)
"""

from stepmoe.faults.catalogue import FAULTS, GUARDS
from stepmoe.faults.fault import Fault
from stepmoe.faults.guards import (
    VoteError,
    ledger_diff,
    oracle_diff,
    relative_error,
    unchecked,
    vote,
    voting,
)
from stepmoe.faults.lab import Findings, Observation, Setting, exact_pass, examine, observe
from stepmoe.faults.promise import promised

__all__ = [
    "FAULTS",
    "GUARDS",
    "Fault",
    "Findings",
    "Observation",
    "Setting",
    "VoteError",
    "exact_pass",
    "examine",
    "ledger_diff",
    "observe",
    "oracle_diff",
    "promised",
    "relative_error",
    "unchecked",
    "vote",
    "voting",
]
