"""Exercises of notebook 05: two halves, their bytes under data parallelism, a fifth variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.ledger import Ledger
from stepmoe.config import Step3p5Config
from stepmoe.exercises.exercise import Traffic, call, call_on, exercise, fresh, require, same
from stepmoe.exercises.wire import run_on_wire
from stepmoe.launch import Ranks
from stepmoe.lesson import forward_pass
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import LAYERS, DecoderLayer, DeferredLayer

NOTEBOOK = "05_reduce_scatter"


@exercise(
    NOTEBOOK,
    lines=4,
    ranks=4,
    hint="Hint: how many rows are missing to the next multiple of n? For 15 rows on 4 ranks it is "
    "1, for 16 it is 0.",
)
def all_reduce_in_halves(attempt: Callable[..., Any], ranks: Ranks) -> Traffic:
    """Judges an all-reduce made of halves, for row counts that do not divide and one that does."""
    numbers, generator = fresh()
    row_counts = (15, 8, 1, numbers.randint(17, 40))
    inputs = [torch.randn(4, rows, 6, generator=generator).double() for rows in row_counts]
    cases = [[(piece, 4) for piece in pieces] for pieces in inputs]
    outcomes = run_on_wire(attempt, ranks, cases, ["reduce_scatter", "all_gather"])
    for rows, outcome, pieces in zip(row_counts, outcomes, inputs, strict=True):
        whole = pieces.sum(0)
        require(
            [entry.op for entry in outcome.ledger.entries] == ["reduce_scatter", "all_gather"],
            f"Two halves, a reduce_scatter and an all_gather, not {outcome.ledger.counts()}.",
        )
        least = -(-rows // 4) * 4
        sent = outcome.ledger.entries[0].shape[0]
        require(
            sent == least,
            f"{rows} rows were sent as {sent}; {least} are enough. What divides needs no padding.",
        )
        for answer in outcome.answers:
            require(
                getattr(answer, "shape", None) != (least, 6) or least == rows,
                f"{rows} rows went in and {least} came out: the padding has to go again.",
            )
            require(same(answer, whole), f"The sum of {rows} rows is wrong.")
    return outcomes[0].traffic(inputs[0][0])


@exercise(
    NOTEBOOK,
    lines=4,
    ranks=4,
    hint="Hint: a rank holds whole sequences, the fullest rank ceil(batch / n) of them, and every "
    "rank sends as much as the fullest.",
)
def bytes_under_dp(attempt: Callable[..., Any], ranks: Ranks) -> None:
    """Judges a prediction of one MoE layer's bytes by the ledger, whether batches divide or not."""
    numbers, generator = fresh()
    shape = Step3p5Config.tiny()
    # From 5 or 6 sequences tokens padded to a multiple of 4 differ from padded sequences.
    for batch in (4, numbers.choice([2, 3]), numbers.choice([5, 6])):
        length = numbers.choice([3, 5, 7])
        answer = call(attempt, batch, length, shape.hidden_size, 4)
        ids = torch.randint(shape.vocab_size, (batch, length), generator=generator)
        parallel = ParallelConfig(4, attention="dp")
        passes = call_on(ranks, forward_pass, "reduce_scatter", parallel, ids)
        sent = sum(entry.bytes_sent for entry in passes[0].ledger.of_layer(2))
        row = shape.hidden_size * 4 * 2 * 3 / 4
        where = f"{batch} sequences of {length} tokens on 4 ranks: "
        require(
            answer != batch * length * row or answer == sent,
            f"{where}without padding you count {answer:,.0f} bytes, the ledger {sent:,.0f}. A rank "
            "with fewer sequences fills up to the fullest one.",
        )
        require(
            answer != -(-batch * length // 4) * 4 * row or answer == sent,
            f"{where}you pad tokens, the ledger has {sent:,.0f} bytes. Attention needs whole "
            "sequences: they are what is dealt to the ranks.",
        )
        require(
            answer != 2 * sent,
            f"{where}twice too much. There is one all_gather and one reduce_scatter, each half an "
            "all-reduce.",
        )
        require(
            answer == sent,
            f"{where}the ledger has {sent:,.0f} bytes for a MoE layer, you predict {answer!r}.",
        )


@exercise(
    NOTEBOOK,
    lines=12,
    ranks=4,
    hint="Hint: begin with DeferredLayer.forward and decide for each of its two sums where else it "
    "could be completed, or in which other form, before the norm that needs it.",
)
def FifthVariant(attempt: type[DecoderLayer], ranks: Ranks) -> Traffic:
    """Judges a decoder layer by the oracle, the placement check and its ledger."""
    require(
        isinstance(attempt, type) and issubclass(attempt, DecoderLayer),
        "Write a subclass of stepmoe.variants.DecoderLayer.",
    )
    require(
        attempt.__mro__[1] is DecoderLayer,
        f"It borrows from {attempt.__mro__[1].__name__}. Start from DecoderLayer itself.",
    )
    numbers, generator = fresh()
    for batch, length in ((3, 5), (4, 8)):
        ids = torch.randint(256, (batch, length), generator=generator)
        seed = numbers.getrandbits(31)
        observed = call_on(
            ranks, observe, [attempt, *LAYERS.values()], ParallelConfig(4, 2), ids, seed
        )
        oracle = observe([DeferredLayer], ParallelConfig(), ids, seed)[0].logits
        own, *others = observed[0]
        require(
            all(same(of_rank[0].logits, oracle) for of_rank in observed),
            "Its logits are not the oracle's, though no placement was wrong: what is added, "
            "normalised or returned in another way than in the other variants?",
        )
        for name, other in zip(LAYERS, others, strict=True):
            require(
                own.steps != other.steps,
                f"That is {name}: the same steps in the same order, the same placements out.",
            )
        bytes_of = {
            name: other.ledger.bytes_sent() for name, other in zip(LAYERS, others, strict=True)
        }
        require(
            own.ledger.bytes_sent() <= max(bytes_of["deferred"], bytes_of["reduce_scatter"]),
            f"Right, but a pass sends {own.ledger.bytes_sent() / bytes_of['deferred']:.2f} x the "
            "bytes of deferred. Which partial sums could be added before they are reduced?",
        )
    entries = own.ledger.of_layer(2)
    whole = ids.numel() * Step3p5Config.tiny().hidden_size * 8
    return Traffic(len(entries), sum(entry.bytes_sent for entry in entries) / whole)


@dataclass
class Observed:
    """A pass of one variant in one rank.

    Attributes:
        steps: of layer 2, in order, and the placements of what leaves the layer.
    """

    logits: Tensor
    ledger: Ledger
    steps: list[str]


def observe(
    variants: Sequence[type[DecoderLayer]], parallel: ParallelConfig, ids: Tensor, seed: int
) -> list[Observed]:
    """Run each variant, in a rank, in float64."""
    observed = []
    for variant in variants:
        left: list[str] = []
        model = Step3p5ForCausalLM.from_config(
            Step3p5Config.tiny(), variant, parallel, dtype=torch.float64, seed=seed
        )
        model.model.layers[2].register_forward_hook(
            lambda _, __, out, left=left: left.extend(placed.describe() for placed in out)
        )
        with Ledger() as ledger:
            logits = model(ids)
        steps = [step.op for step in ledger.steps if step.layer == 2]
        observed.append(Observed(logits, ledger, steps + left))
    return observed
