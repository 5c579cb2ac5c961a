"""Faults that leave every placement right: rounding, a lost constant, a gate, a dump, a branch.

Each function yields the patches that put one fault into a model.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from stepmoe.capture import Capture
from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.fusion import Choice, choose
from stepmoe.comm.fusion.vote import expected_place
from stepmoe.comm.placement import REPLICATE, Placed
from stepmoe.config import Step3p5Config
from stepmoe.faults.patching import Patch
from stepmoe.faults.sums import communicating
from stepmoe.kernels.norm import add_gemma_rms_norm

PUBLISHED_HIDDEN_SIZE = Step3p5Config.flash().hidden_size


class _PlainNorm(Communicator):
    """Its fused kernel multiplies by weight, where Gemma's norm multiplies by 1 + weight."""

    def all_reduce_add_rms_norm(
        self, partial: Placed, residual: Placed, weight: Tensor, eps: float, site: str
    ) -> tuple[Placed, Placed]:
        return super().all_reduce_add_rms_norm(partial, residual, weight - 1, eps, site)


def gemma_one_dropped(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    yield from communicating(model, _PlainNorm(model.comm.group))


class _Bf16Sums(Communicator):
    """Adds up in bfloat16, whatever the dtype of the addends: every addition is rounded."""

    def all_reduce(self, partial: Placed, site: str) -> Placed:
        done = super().all_reduce(self._addend(partial), site)
        return done.with_(done.tensor.to(partial.tensor.dtype))

    def reduce_scatter(self, partial: Placed, tokens_per_rank: int, site: str) -> Placed:
        dtype = partial.tensor.dtype
        done = super().reduce_scatter(self._addend(partial), tokens_per_rank, site)
        return done.with_(done.tensor.to(dtype))

    def all_reduce_add_rms_norm(
        self, partial: Placed, residual: Placed, weight: Tensor, eps: float, site: str
    ) -> tuple[Placed, Placed]:
        addend = self._addend(partial)
        return super().all_reduce_add_rms_norm(addend, residual, weight, eps, site)

    def _addend(self, partial: Placed) -> Placed:
        # One rank adds nothing up.
        return partial.with_(partial.tensor.bfloat16()) if self.group.size > 1 else partial


def bf16_accumulation(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    yield from communicating(model, _Bf16Sums(model.comm.group))


def gate_wrong_dimension(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    """The limit on tokens is held against the hidden size: the published one, because those of the
    lab's models are below any limit."""

    def wrong(self: Communicator, partial: Tensor, weight: Tensor) -> Choice:
        place = expected_place(partial.device, self.group.size)
        return choose(PUBLISHED_HIDDEN_SIZE, partial.shape[0], partial.dtype, place)

    yield Communicator, "_choose", wrong


def dump_records_partial(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    record = Capture.record

    def as_it_is(self: Capture, comm: Communicator, layer: int, name: str, value: Placed) -> None:
        if value.is_partial:
            value = value.with_(value.tensor, REPLICATE)
        record(self, comm, layer, name, value)

    yield Capture, "record", as_it_is


class _OneShot(Communicator):
    """The same sums by the other of two right ways: gathers every addend, and adds them itself."""

    def all_reduce(self, partial: Placed, site: str) -> Placed:
        if site == "capture":  # no part of the layer
            return super().all_reduce(partial, site)
        ranks, addend = self.group.size, partial.tensor
        own = self.sharded(addend, ranks * addend.shape[0], partial.name, partial.layer)
        every = self.all_gather(own, site).tensor.view(ranks, *addend.shape)
        return partial.with_(every.sum(0), REPLICATE)

    def reduce_scatter(self, partial: Placed, tokens_per_rank: int, site: str) -> Placed:
        return self.keep_own_tokens(self.all_reduce(partial, site), tokens_per_rank)

    def all_reduce_add_rms_norm(
        self, partial: Placed, residual: Placed, weight: Tensor, eps: float, site: str
    ) -> tuple[Placed, Placed]:
        done = self.all_reduce(partial, site)
        normed, total = add_gemma_rms_norm(done.tensor, residual.tensor, weight, eps)
        return done.with_(normed, name="hidden_states"), residual.with_(total)


def one_rank_branches(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    group, layers = model.comm.group, model.model.decoder_layers
    if group.index == group.size - 1:
        yield layers[len(layers) // 2], "comm", _OneShot(group)
