"""What each rank does to measure throughput: the batches of a workload, each step timed."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.ledger import Ledger
from stepmoe.fp8 import fp8_kernels
from stepmoe.generation import next_tokens
from stepmoe.launch import progress, rank_device
from stepmoe.measure.chip import measure_chip
from stepmoe.measure.decoding import decode_in_turn
from stepmoe.measure.environment import Place, look_around
from stepmoe.measure.prefilling import Prefills, prompts_of
from stepmoe.measure.rounds import share_weights, split_call
from stepmoe.measure.source import load
from stepmoe.measure.stand_ins import stand_in_seconds
from stepmoe.measure.step_times import SPLITS, StepTimes
from stepmoe.measure.workload import ThroughputPlan
from stepmoe.mini.load import RouterLoad
from stepmoe.roofline import Chip

# What the router's biases, drawn with deviation 0.1, are multiplied by for near-uniform routing:
# then the busiest of 288 experts gets 1.3 times the mean, with them as drawn 10 times.
_UNIFORM = 0.01


@dataclass
class RankThroughput:
    """Everything one rank measured.

    Attributes:
        steps: variant to its kinds of steps.
        memory: variant to peak bytes: on a GPU of its allocator while the variant ran and was
            captured, elsewhere of the process up to then.
        weights: bytes of this rank's weights, which the variants share.
        chip: of a GPU, what it can do at best; None elsewhere.
        load: (layers, experts) tokens that each MoE layer's router sent to each expert in one step.
        notes: what the ledgers remarked.
        quantization: None, or how weights are held and what computes with them.
    """

    place: Place
    steps: dict[str, list[StepTimes]]
    memory: dict[str, int]
    weights: int
    chip: Chip | None
    load: Tensor
    notes: list[str]
    quantization: dict[str, str] | None


def run_workload(plan: ThroughputPlan) -> RankThroughput:
    """Carry out a plan in this rank, together with all others."""
    device = rank_device()
    models = build_models(plan, device)
    weights = sum(p.numel() * p.element_size() for p in next(iter(models.values())).parameters())
    watched = {name: _watch(model, plan) for name, model in models.items()}
    record = RankThroughput(
        place=look_around(device),
        steps={name: [steps] for name, (steps, *_) in watched.items()},
        memory=dict.fromkeys(models, 0),
        weights=weights,
        chip=measure_chip(device) if device.type == "cuda" else None,
        load=next(iter(watched.values()))[1],
        notes=list(dict.fromkeys(note for *_, notes in watched.values() for note in notes)),
        quantization=plan.quantization and {"weights": "fp8", **fp8_kernels(device, plan.dtype)},
    )
    batches = plan.workload.batches
    prefills = Prefills(plan, next(iter(models.values())))
    for name, model in models.items():
        peak = _Peak(device)
        with Ledger() as ledger:
            record.steps[name][0].is_graph = prefills.capture(name, model)
        record.memory[name] = peak.bytes()
        record.notes += [note for note in ledger.notes if note not in record.notes]
    for turn in progress(range(-plan.workload.warmup, len(batches)), desc="prefill"):
        for name in plan.order(turn):
            peak = _Peak(device)
            seconds = prefills.run(name, models[name], batches[max(turn, 0)], turn)
            record.memory[name] = max(record.memory[name], peak.bytes())
            if turn >= 0:
                record.steps[name][0].seconds += seconds
    del prefills  # decode steps need its memory
    for size in plan.workload.decode:
        for name, steps in decode_in_turn(models, plan, size).items():
            record.steps[name].append(steps)
            if steps.remark:
                record.notes.append(steps.remark)
    return record


def build_models(plan: ThroughputPlan, device: torch.device) -> dict[str, Step3p5ForCausalLM]:
    """One model a variant, with the same tensors for weights; router biases as `routing` says."""
    models: dict[str, Step3p5ForCausalLM] = {}
    for name, layer in plan.variants.items():
        if models:
            models[name] = share_weights(next(iter(models.values())), layer)
            continue
        models[name] = load(
            plan.source,
            layer,
            plan.parallel,
            plan.dtype,
            device,
            plan.layers,
            plan.seed,
            on_device=True,
            quantization=plan.quantization,
        )
        if plan.routing == "uniform":
            for parameter_name, parameter in models[name].named_parameters():
                if parameter_name.endswith("router_bias"):
                    parameter.mul_(_UNIFORM)
    return models


def _watch(model: Step3p5ForCausalLM, plan: ThroughputPlan) -> tuple[StepTimes, Tensor, list[str]]:
    """The first step with a ledger open and the router's choices counted; then split. Launched by
    the host, however the timed ones are: no clock can be read within a graph."""
    batch = plan.workload.batches[0]
    ids = prompts_of(plan, batch, 0)[:, : batch.length].to(model.lm_head.weight.device)
    steps = StepTimes("prefill", batch.prompts, batch.length, 0)
    next_tokens(model, ids, model.new_cache(batch.length))  # compiles and loads what there is
    counter = RouterLoad(model)
    with Ledger() as ledger:
        next_tokens(model, ids, model.new_cache(batch.length))
    counter.close()
    steps.note(ledger)
    steps.stand_in = stand_in_seconds(ledger, model.comm.group, ids.device)

    def run() -> object:
        return next_tokens(model, ids, model.new_cache(batch.length))

    for _ in range(SPLITS):
        steps.splits.append(split_call(run, ids.device, model.comm.group)[0])
    load = [count.cpu() for _, count in sorted(counter.take().items())]
    return steps, torch.stack(load) if load else torch.zeros(0, 0), ledger.notes


class _Peak:
    """Most memory in use since it was made: a GPU's allocator's, or this process's ever."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
