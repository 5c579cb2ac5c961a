"""The lab bench: a model with a fault in it, on ranks, and what every guard says of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepmoe.capture import Capture
from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.ledger import Ledger
from stepmoe.errors import PlacementError, RankTimeout
from stepmoe.faults.catalogue import FAULTS, GUARDS, LEDGER, ORACLE, PLACEMENT, TIMEOUT, VOTE
from stepmoe.faults.guards import VoteError, ledger_diff, oracle_diff, unchecked, voting
from stepmoe.faults.promise import promised
from stepmoe.launch import Ranks
from stepmoe.launch.rank import rank_device
from stepmoe.measure.source import Source, config_of, load
from stepmoe.parallel import ParallelConfig


@dataclass(frozen=True)
class Setting:
    """What a fault is injected into.

    Attributes:
        source: folder of a checkpoint, or a config, for random weights.
        dtype: of weights and activations; None means the checkpoint's or the config's.
    """

    source: Source
    variant: str
    parallel: ParallelConfig
    dtype: torch.dtype | None = None

    def model(self) -> Step3p5ForCausalLM:
        """This rank's share."""
        return load(self.source, self.variant, self.parallel, self.dtype)


@dataclass
class Observation:
    """One rank's forward pass, the fault in it.

    Attributes:
        stopped_by: "placement" or "vote" where a guard raised, and `message` what it said; else
            logits (batch, length, vocab), states (layer, name, (batch, length, hidden)) and ledger.
    """

    stopped_by: str | None = None
    message: str = ""
    logits: Tensor | None = None
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    ledger: Ledger | None = None


@dataclass
class Findings:
    """What each guard says: its lines, none where it has nothing to say.

    Attributes:
        guards: name of a guard to what it found on the first rank that it found something on.
        passes: the ranks' observations with the placement check off; empty if they hung.
    """

    guards: dict[str, list[str]]
    passes: list[Observation]

    @property
    def fired(self) -> set[str]:
        """The guards that found something."""
        return {name for name, lines in self.guards.items() if lines}


def observe(
    setting: Setting, input_ids: Tensor, fault: str | None = None, *, guarded: bool = False
) -> Observation:
    """Run the model with a fault in it; runs in every rank.

    Args:
        guarded: placement check and vote stay on, and stop it; otherwise both are off.
    """
    model = setting.model()
    capture = Capture()
    with ExitStack() as stack, Ledger() as ledger:
        stack.enter_context(voting() if guarded else unchecked())
        if fault is not None:
            stack.enter_context(FAULTS[fault].inject(model))
        try:
            logits = model(input_ids, capture=capture)
        except PlacementError as error:
            return Observation(PLACEMENT, str(error))
        except VoteError as error:
            return Observation(VOTE, str(error))
    return Observation(logits=logits.cpu(), states=capture.states, ledger=ledger)


def exact_pass(source: Source, input_ids: Tensor) -> Observation:
    """The oracle: the same model unsharded, in float64, in this process."""
    model = load(source, "three_all_reduces", ParallelConfig(), torch.float64, torch.device("cpu"))
    capture = Capture()
    logits = model(input_ids, capture=capture)
    return Observation(logits=logits.cpu(), states=capture.states)


def examine(
    ranks: Ranks,
    setting: Setting,
    input_ids: Tensor,
    fault: str | None = None,
    exact: Observation | None = None,
    timeout: float = 20.0,
) -> Findings:
    """Show a fault to every guard: once guarded, once with nothing to stop it.

    Args:
        exact: from `exact_pass`, to be computed once for many faults; None computes it.
        timeout: seconds that the pass with nothing to stop it may take before it counts as hung.
    """
    exact = exact or exact_pass(setting.source, input_ids)
    findings = Findings({name: [] for name in GUARDS}, [])
    for seen in ranks.run(observe, setting, input_ids, fault, guarded=True):
        if seen.stopped_by and not findings.guards[seen.stopped_by]:
            findings.guards[seen.stopped_by] = [seen.message]
    try:
        findings.passes = ranks.run(observe, setting, input_ids, fault, timeout=timeout)
    except RankTimeout as error:
        findings.guards[TIMEOUT] = [str(error)]
    for observation in findings.passes:
        judge(observation, setting, exact, input_ids, findings)
    return findings


def judge(
    seen: Observation,
    setting: Setting,
    exact: Observation,
    input_ids: Tensor,
    findings: Findings,
) -> None:
    """Let ledger diff and oracle look at one rank's pass, and keep what they find first."""
    assert seen.ledger is not None
    assert seen.logits is not None
    assert exact.logits is not None
    batch, length = input_ids.shape
    promise = promised(
        setting.variant,
        setting.parallel,
        config_of(setting.source),
        batch,
        length,
        seen.logits.dtype,
        rank_device(),
    )
    found = {
        LEDGER: ledger_diff(seen.ledger, promise),
        ORACLE: oracle_diff(seen.logits, seen.states, exact.logits, exact.states),
    }
    for name, lines in found.items():
        findings.guards[name] = findings.guards[name] or lines
