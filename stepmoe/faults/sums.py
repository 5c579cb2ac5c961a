"""Wrong sums: what is added twice, not at all, or over the wrong ranks.

Each function yields the patches that put one fault into a model. A fault in a collective is a
Communicator that gets that collective wrong; the layers are given it in place of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import RankGroup
from stepmoe.comm.placement import PARTIAL, Placed
from stepmoe.faults.patching import Patch
from stepmoe.variants import DecoderLayer, Step, ThreeAllReducesLayer

SubLayer = Callable[[Placed, Step], Placed]


def moe_layers(model: Step3p5ForCausalLM) -> list[DecoderLayer]:
    return [layer for layer in model.model.decoder_layers if layer.is_moe]


def communicating(model: Step3p5ForCausalLM, comm: Communicator) -> Iterator[Patch]:
    """All layers use `comm`, one object for all, as they share their own."""
    for layer in model.model.decoder_layers:
        yield layer, "comm", comm


def dense_reduced_twice(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    for layer in model.model.decoder_layers:
        if layer.is_moe:
            continue

        def reduces_inside(
            hidden_states: Placed,
            step: Step,
            layer: DecoderLayer = layer,
            dense_mlp: SubLayer = layer.dense_mlp,
        ) -> Placed:
            return layer.comm.all_reduce(dense_mlp(hidden_states, step), "mlp")

        yield layer, "dense_mlp", reduces_inside


class _OverEp(Communicator):
    """Sums the routed experts' output over "ep", which in tp x ep holds only some of the addends.

    A reduce-scatter over so few ranks would not fit its output: the tokens are cut afterwards.
    """

    def __init__(self, tp: RankGroup, ep: RankGroup) -> None:
        super().__init__(tp)
        self._tp, self._ep = Communicator(tp), Communicator(ep)

    def all_reduce(self, partial: Placed, site: str) -> Placed:
        return self._chosen(partial).all_reduce(partial, site)

    def reduce_scatter(self, partial: Placed, tokens_per_rank: int, site: str) -> Placed:
        if _is_routed(partial):
            return self.keep_own_tokens(self._ep.all_reduce(partial, site), tokens_per_rank)
        return super().reduce_scatter(partial, tokens_per_rank, site)

    def all_reduce_add_rms_norm(
        self, partial: Placed, residual: Placed, weight: Tensor, eps: float, site: str
    ) -> tuple[Placed, Placed]:
        comm = self._chosen(partial)
        return comm.all_reduce_add_rms_norm(partial, residual, weight, eps, site)

    def _chosen(self, partial: Placed) -> Communicator:
        return self._ep if _is_routed(partial) else self._tp


def _is_routed(partial: Placed) -> bool:
    return "experts_output" in partial.name


def wrong_group(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    yield from communicating(model, _OverEp(model.groups["tp"], model.groups["ep"]))


class _ReducesAgain(Communicator):
    def reduce_scatter(self, partial: Placed, tokens_per_rank: int, site: str) -> Placed:
        own = super().reduce_scatter(partial, tokens_per_rank, site)
        if site != "mlp_output":
            return own
        return own.with_(self.all_reduce(own, site).tensor)


def scattered_then_reduced(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    yield from communicating(model, _ReducesAgain(model.comm.group))


def shared_counted_ep_times(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    """Each expert group adds the whole shared expert; the sum is that of ep times every part."""
    for layer in moe_layers(model):

        def in_every_group(
            hidden_states: Placed,
            step: Step,
            shared_expert: SubLayer = layer.shared_expert,
        ) -> Placed:
            part = shared_expert(hidden_states, step)
            return part.with_(part.tensor * model.parallel.ep)

        yield layer, "shared_expert", in_every_group


class _LeavesOutShared(Communicator):
    def all_reduce(self, partial: Placed, site: str) -> Placed:
        return partial if site == "share_expert" else super().all_reduce(partial, site)


def shared_never_reduced(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    """Where shared and routed are summed together, the shared part is added outside of the sum."""
    if issubclass(model.layer_class, ThreeAllReducesLayer):
        yield from communicating(model, _LeavesOutShared(model.comm.group))
    else:
        for layer in moe_layers(model):
            yield from _shared_added_after(layer)


def _shared_added_after(layer: DecoderLayer) -> Iterator[Patch]:
    forward, shared_expert = layer.forward, layer.shared_expert
    kept: list[Placed] = []

    def keep(hidden_states: Placed, step: Step) -> Placed:
        kept.append(shared_expert(hidden_states, step))
        return kept[-1].with_(torch.zeros_like(kept[-1].tensor))

    def add_after(
        hidden_states: Placed, residual: Placed | None, step: Step
    ) -> tuple[Placed, Placed]:
        hidden_states, residual = forward(hidden_states, residual, step)
        shared = kept.pop()
        if residual.is_sharded:
            shared = layer.comm.keep_own_tokens(shared, step.tokens_per_rank)
        return hidden_states, residual + shared

    yield layer, "shared_expert", keep
    yield layer, "forward", add_after


def pending_lost_at_end(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    yield model.model.decoder_layers[-1], "flush", lambda hidden_states: hidden_states


def pending_lost_at_cut(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    """The stack is cut in the middle: the second stage receives one tensor that looks complete."""
    layer = model.model.decoder_layers[len(model.model.layers) // 2]
    forward = layer.forward

    def first_of_its_stage(
        hidden_states: Placed, residual: Placed, step: Step
    ) -> tuple[Placed, Placed]:
        return forward(hidden_states + residual, None, step)

    yield layer, "forward", first_of_its_stage


class _GathersBySumming(Communicator):
    """All-gather as an all-reduce: each rank writes its rows into a buffer of the whole batch.

    Right only if the rest of the buffer is zero; this one keeps what the call before left there.
    """

    def __init__(self, group: RankGroup) -> None:
        super().__init__(group)
        self._buffer: Tensor | None = None

    def all_gather(self, shard: Placed, site: str) -> Placed:
        if site == "capture":  # shows what is there, and leaves the buffer alone
            return super().all_gather(shard, site)
        own = shard.tensor
        shape = (self.group.size * own.shape[0], own.shape[1])
        if self._buffer is None or self._buffer.shape != shape:
            self._buffer = own.new_zeros(shape)
        start = self.group.index * own.shape[0]
        self._buffer[start : start + own.shape[0]] = own
        whole = self.all_reduce(shard.with_(self._buffer, PARTIAL), site)
        return whole.with_(whole.tensor[: shard.num_tokens].clone())


def padding_in_the_sum(model: Step3p5ForCausalLM) -> Iterator[Patch]:
    yield from communicating(model, _GathersBySumming(model.comm.group))
