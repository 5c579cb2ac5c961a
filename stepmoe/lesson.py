"""What the notebooks run in their ranks: real text, one forward pass of one variant, its ledger."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from stepmoe.capture import Capture
from stepmoe.causal_lm import Step3p5ForCausalLM, Variant
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.fusion import force
from stepmoe.comm.groups import build_groups, world_size
from stepmoe.comm.ledger import Ledger
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError, PlacementError
from stepmoe.kernels.norm import add_gemma_rms_norm
from stepmoe.launch.rank import rank_device
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


@dataclass
class FusedCall:
    """One rank's all-reduce + add + norm of random inputs.

    Attributes:
        normed: (tokens, hidden), on the CPU.
        error: of normed, relative to float64.
        implementation, reason: what ran, and why.
    """

    normed: Tensor
    error: float
    implementation: str
    reason: str


def fused_call(
    implementation: str | None = None,
    tokens: int = 3,
    hidden_size: int = 192,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> FusedCall:
    """Run the fused operation once over all ranks, on their own devices.

    Runs inside a rank. implementation None leaves the choice to stepmoe.comm.fusion; otherwise it
    is forced, and ConfigError says why where it cannot run.
    """
    device, eps = rank_device(), 1e-5
    comm = Communicator(build_groups(ParallelConfig(world_size()))["tp"])
    torch.manual_seed(seed)  # all ranks draw all ranks' partial sums, and take their own
    partials = torch.randn(comm.group.size, tokens, hidden_size).to(device, dtype)
    residual = torch.randn(tokens, hidden_size).to(device, dtype)
    weight = (0.2 * torch.randn(hidden_size)).to(device, dtype)
    partial = comm.partial(partials[comm.group.index].clone(), "partial")
    with Ledger() as ledger, force(implementation) if implementation else nullcontext():
        normed, _ = comm.all_reduce_add_rms_norm(
            partial, comm.replicated(residual, "residual"), weight, eps, "fused_call"
        )
    exact = add_gemma_rms_norm(partials.double().sum(0), residual.double(), weight.double(), eps)[0]
    error = ((normed.tensor - exact).norm() / exact.norm()).item()
    entry = ledger.entries[0]
    return FusedCall(normed.tensor.cpu(), error, entry.implementation, entry.reason)
