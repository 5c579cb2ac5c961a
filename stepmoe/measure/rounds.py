"""What each rank does to measure: the same steps in the same order, timed by its own clock."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.groups import RankGroup, meet
from stepmoe.comm.ledger import Entry, Ledger, record, split_waiting
from stepmoe.launch import progress, rank_device
from stepmoe.measure.clock import seconds_of
from stepmoe.measure.environment import Place, look_around
from stepmoe.measure.plan import Case, Plan
from stepmoe.model.kv_cache import KVCache
from stepmoe.variants import DecoderLayer

# Input sets of one case: enough to exceed the last-level cache together, where that takes no more
# than 8 a variant; at least 4, so that no step finds its input where the last one left it.
_FEWEST_SETS, _MOST_TURNS = 4, 8
_MEETINGS = 30


@dataclass(frozen=True)
class Split:
    """Seconds of one step on one rank; the rest of `total` is computation."""

    total: float
    communication: float
    waiting: float


@dataclass(frozen=True)
class Inputs:
    """What the steps of a case take in turn. `bytes_each` is one rank's share of a set."""

    sets: list[tuple[Tensor, KVCache | None]]
    bytes_each: int


@dataclass(frozen=True)
class Step:
    """A forward pass of one variant over one input set."""

    model: Step3p5ForCausalLM
    ids: Tensor
    cache: KVCache | None

    def prepared(self) -> Callable[[], object]:
        """Ready to run, with a cache that holds what it held the last time."""
        cache = copy_of(self.cache) if self.cache else None
        return lambda: self.model(self.ids, cache)


@dataclass
class CaseRecord:
    """One rank's measurements of one case: variant to one value a round."""

    case: Case
    num_sets: int
    bytes_each: int
    order: list[list[str]] = field(default_factory=list)
    plain: dict[str, list[float]] = field(default_factory=dict)
    split: dict[str, list[Split]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes_sent: dict[str, float] = field(default_factory=dict)

    def keep(self, times: dict[str, float], splits: dict[str, tuple[Split, Ledger]]) -> None:
        """Add one round, the variants in the order they ran."""
        self.order.append(list(times))
        for name, seconds in times.items():
            split, ledger = splits[name]
            self.plain.setdefault(name, []).append(seconds)
            self.split.setdefault(name, []).append(split)
            self.counts[name], self.bytes_sent[name] = ledger.counts(), ledger.bytes_sent()


@dataclass
class RankRecord:
    """Everything one rank measured.

    Attributes:
        meeting: median seconds for the ranks to meet when nobody is late.
    """

    place: Place
    meeting: float
    cases: list[CaseRecord]


def run_plan(plan: Plan) -> RankRecord:
    """Carry out a plan in this rank, together with all others."""
    device = rank_device()
    place = look_around(device)
    models = build_models(plan, device)
    group = next(iter(models.values())).comm.group
    cases: list[CaseRecord] = []
    turns = [(case, turn) for case in plan.cases for turn in range(-plan.warmup, plan.repeats)]
    for case, turn in progress(turns, desc="measuring"):
        if turn == -plan.warmup:
            inputs = make_inputs(plan, case, models, place.cache_bytes)
            cases.append(CaseRecord(case, len(inputs.sets), inputs.bytes_each))
        names, steps = plan.order(turn), steps_of(models, inputs, turn)
        times = {name: time_call(steps[name].prepared(), device, group) for name in names}
        splits = {name: split_call(steps[name].prepared(), device, group) for name in names}
        if turn >= 0:
            cases[-1].keep(times, splits)
    return RankRecord(place, _meeting(device, group), cases)


def build_models(plan: Plan, device: torch.device) -> dict[str, Step3p5ForCausalLM]:
    """One model a variant, with the same tensors for weights: what differs is the variant alone."""
    models: dict[str, Step3p5ForCausalLM] = {}
    for name, layer in plan.variants.items():
        if models:
            models[name] = share_weights(next(iter(models.values())), layer)
        else:
            models[name] = Step3p5ForCausalLM.from_config(
                plan.config, layer, plan.parallel, plan.dtype, device, plan.seed
            )
    return models


def share_weights(first: Step3p5ForCausalLM, layer: type[DecoderLayer]) -> Step3p5ForCausalLM:
    """A model of another variant with the same tensors for weights."""
    model = Step3p5ForCausalLM(
        first.config, layer, first.parallel, first.lm_head.weight.dtype, first.quantization
    )
    model.load_state_dict(first.state_dict(), assign=True)
    model.remarks = first.remarks
    return model.requires_grad_(False)


def make_inputs(
    plan: Plan, case: Case, models: dict[str, Step3p5ForCausalLM], cache_bytes: int
) -> Inputs:
    """Random ids from the plan's seed, on every rank the same, and filled key-value caches.

    Every variant computes the same keys and values up to rounding: the first one fills a cache.
    The other sets hold its sequences in another order, in memory of their own.
    """
    config, model = plan.config, next(iter(models.values()))
    bytes_each = _bytes_of_a_set(plan, case)
    turns = min(-(-cache_bytes // (bytes_each * len(models))), _MOST_TURNS)
    num_sets = len(models) * max(turns, -(-_FEWEST_SETS // len(models)))
    random = torch.Generator().manual_seed(plan.seed)

    def ids(length: int) -> Tensor:
        drawn = torch.randint(config.vocab_size, (case.batch, length), generator=random)
        return drawn.to(model.lm_head.weight.device)

    filled = model.new_cache(case.context + case.length) if case.context else None
    if filled:
        model(ids(case.context), filled)
    caches = [copy_of(filled, turned_by=number) if filled else None for number in range(num_sets)]
    return Inputs([(ids(case.length), cache) for cache in caches], bytes_each)


def _bytes_of_a_set(plan: Plan, case: Case) -> int:
    """One rank's share of what steps with other inputs read in other places."""
    config = plan.config
    cached = sum(
        2
        * layer.num_kv_heads
        * layer.head_dim
        * min(case.context, layer.sliding_window or sys.maxsize)
        for layer in config.layers
    )
    embedded = min(case.tokens, config.vocab_size) * config.hidden_size
    own = embedded + case.batch * cached // plan.parallel.tp
    return 8 * case.tokens + plan.dtype.itemsize * own


def copy_of(cache: KVCache, turned_by: int = 0) -> KVCache:
    """A cache that can be appended to without changing this one.

    Args:
        turned_by: how many places the sequences that this rank holds move.
    """
    copied = cache.copy()
    for layer in copied.layers:
        if turned_by and layer.keys is not None and layer.values is not None:
            layer.keys = layer.keys.roll(turned_by, 0)
            layer.values = layer.values.roll(turned_by, 0)
    return copied


def steps_of(models: dict[str, Step3p5ForCausalLM], inputs: Inputs, turn: int) -> dict[str, Step]:
    """This round's step of every variant, each on another input set.

    A set comes back only after all others: variants are a number of rounds apart, rounds one set.
    """
    stride, count = len(inputs.sets) // len(models), len(inputs.sets)
    return {
        name: Step(model, *inputs.sets[(number * stride + turn) % count])
        for number, (name, model) in enumerate(models.items())
    }


def time_call(run: Callable[[], object], device: torch.device, group: RankGroup) -> float:
    """Seconds this rank spends in `run`, which all ranks of the group begin together."""
    meet(group, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return seconds_of(run, device)


def split_call(
    run: Callable[[], object], device: torch.device, group: RankGroup
) -> tuple[Split, Ledger]:
    """`time_call` in the measuring mode, in which the ranks meet before every collective."""
    with Ledger() as ledger, split_waiting():
        total = time_call(run, device, group)
    waiting = sum(entry.waited for entry in ledger.entries)
    inside = sum(entry.seconds for entry in ledger.entries)
    return Split(total, inside - waiting, waiting), ledger


def _meeting(device: torch.device, group: RankGroup) -> float:
    """Median seconds of a meeting right after another one, to which nobody comes late."""
    times = []
    for _ in range(_MEETINGS if group.size > 1 else 0):
        meet(group, device)
        with Ledger() as ledger, record(Entry("meet", "local", None), device):
            meet(group, device)
        times.append(ledger.steps[0].seconds)
    return statistics.median(times) if times else 0.0
