"""What the notebooks run in their ranks: real text, one forward pass of one variant, its ledger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.capture import Capture
from stepmoe.causal_lm import Step3p5ForCausalLM, Variant
from stepmoe.comm.ledger import Ledger
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError, PlacementError
from stepmoe.parallel import ParallelConfig


@dataclass
class Pass:
    """One rank's forward pass.

    Attributes:
        logits: (batch, length, vocab), on every rank the same; on the CPU.
        ledger: what this rank did, and when.
        states: layer to name to complete value (batch, length, hidden), on the CPU.
    """

    logits: Tensor
    ledger: Ledger
    states: dict[int, dict[str, Tensor]]


def encode(text: str, batch: int, length: int) -> Tensor:
    """Cut a text into `batch` pieces of `length` bytes: (batch, length) int64, one id a byte.

    The vocabulary of Step3p5Config.tiny() is the 256 bytes, so that no tokeniser is needed.
    """
    data = text.encode()
    if batch < 1 or length < 1 or len(data) < batch * length:
        raise ConfigError(
            f"the text has {len(data)} bytes; {batch} pieces of {length} need {batch * length}"
        )
    return torch.tensor(list(data[: batch * length])).view(batch, length)


def forward_pass(
    variant: Variant,
    parallel: ParallelConfig,
    input_ids: Tensor,
    config: Step3p5Config | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Pass:
    """Build a model with random weights and run it: once to warm up and capture, once recorded.

    Runs inside a rank (`ranks.run(forward_pass, "deferred", parallel, input_ids)`), or, with
    ParallelConfig(), in any process. config None means Step3p5Config.tiny().
    """
    config = config or Step3p5Config.tiny()
    model = Step3p5ForCausalLM.from_config(config, variant, parallel, dtype=dtype, seed=seed)
    capture = Capture()
    model(input_ids, capture=capture)
    with Ledger() as ledger:
        logits = model(input_ids)
    states = {
        layer: {name: value.cpu() for name, value in named.items()}
        for layer, named in capture.states.items()
    }
    return Pass(logits.cpu(), ledger, states)


def refusal(variant: Variant, parallel: ParallelConfig, input_ids: Tensor) -> str:
    """What the placement check says of a wrong variant, in this rank; "it ran" if nothing."""
    try:
        forward_pass(variant, parallel, input_ids)
    except PlacementError as error:
        return str(error)
    return "it ran"
