"""FAULTS: twelve bugs that really happened (the sixth in two places), and what is known of each."""

from __future__ import annotations

from stepmoe.config import Step3p5Config
from stepmoe.faults import quiet, sums
from stepmoe.faults.fault import Fault, Published
from stepmoe.parallel import ParallelConfig

PLACEMENT, LEDGER, ORACLE, VOTE, TIMEOUT = GUARDS = (
    "placement",
    "ledger",
    "oracle",
    "vote",
    "timeout",
)


def _several(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return parallel.tp > 1


def _has_dense(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    # Under fused a layer's sum is completed by the next one; nothing sums behind the last.
    dense = set(range(config.num_hidden_layers)) - set(config.moe_layers)
    last = {config.num_hidden_layers - 1} if _is_fused(variant, parallel) else set()
    return parallel.tp > 1 and bool(dense - last)


def _has_moe(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return parallel.tp > 1 and bool(config.moe_layers)


def _mixed(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return 1 < parallel.ep < parallel.tp and bool(config.moe_layers)


def _expert_groups(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return parallel.ep > 1 and bool(config.moe_layers)


def _scatters(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return parallel.tp > 1 and variant == "reduce_scatter"


def _fuses(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return parallel.tp > 1 and _is_fused(variant, parallel)


def _fuses_across(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return _fuses(variant, parallel, config) and config.num_hidden_layers > 1


def _gathers(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    twice_a_layer = variant == "reduce_scatter" and parallel.attention == "tp"
    gathers = variant == "reduce_scatter" or parallel.attention == "dp"
    return parallel.tp > 1 and gathers and (twice_a_layer or config.num_hidden_layers > 1)


def _sums_attention(variant: str, parallel: ParallelConfig, config: Step3p5Config) -> bool:
    return parallel.tp > 1 and parallel.attention == "tp"


def _is_fused(variant: str, parallel: ParallelConfig) -> bool:
    return variant == "fused" and parallel.attention == "tp"


_MIXED, _DP = ParallelConfig(4, 2), ParallelConfig(4, 2, "dp")
_FUSED = 'variant "fused", attention="tp", tp above 1'

_ALL = (
    Fault(
        name="dense_reduced_twice",
        what="the dense MLP reduces its own output, and the layer reduces it again",
        thread="sglang #22773, in review of the very change this walkthrough is about; "
        "sglang #20110: gibberish at TP4 and TP8",
        where="tp above 1 and a dense layer",
        signature="the output of every dense layer times tp",
        guard=PLACEMENT,
        caught_by=frozenset({PLACEMENT, LEDGER, ORACLE}),
        shown_in=("deferred", _MIXED),
        applies=_has_dense,
        patches=sums.dense_reduced_twice,
    ),
    Fault(
        name="wrong_group",
        what="the routed experts' sum runs over the expert-parallel group, not over all tp ranks",
        thread="sglang #32511, #32012, #32963: the fused kernel took the wrong group; no error",
        where="ep between 1 and tp: with ep=1 or ep=tp one of the two groups is all ranks",
        signature="half the sum (1/moe_tp of the addends), another half on other ranks",
        guard=PLACEMENT,
        caught_by=frozenset({PLACEMENT, LEDGER, ORACLE}),
        shown_in=("deferred", _MIXED),
        applies=_mixed,
        patches=sums.wrong_group,
        published=Published(0.012, None, "sglang #32963, TP4 EP2"),
    ),
    Fault(
        name="scattered_then_reduced",
        what="each rank's own tokens, already summed and scattered, are all-reduced once more",
        thread="sglang #18232 (in this order); #22642, mended in #23729 and #23732, had the same "
        "double reduction the other way round",
        where='variant "reduce_scatter", tp above 1',
        signature="tokens of different ranks added up: sum over r of R[r], on every rank",
        guard=PLACEMENT,
        caught_by=frozenset({PLACEMENT, LEDGER, ORACLE}),
        shown_in=("reduce_scatter", _DP),
        applies=_scatters,
        patches=sums.scattered_then_reduced,
        published=Published(0.002, 0.951, "sglang #23431, TP8 DP8 EP8"),
    ),
    Fault(
        name="shared_counted_ep_times",
        what="every expert group holds the whole shared expert, and the sum counts each of them",
        thread="sglang #26845, #31475",
        where="ep above 1",
        signature="R + ep S in place of R + S",
        guard=ORACLE,
        caught_by=frozenset({ORACLE}),
        shown_in=("deferred", ParallelConfig(4, 4)),
        applies=_expert_groups,
        patches=sums.shared_counted_ep_times,
        published=Published(0.009, 0.942, "sglang #26845, TP4 EP4"),
    ),
    Fault(
        name="shared_never_reduced",
        what="the shared expert's partial sum is added to the finished sum of the others",
        thread="tpu-inference #3435",
        where="tp above 1 and an MoE layer",
        signature="R + S[r]: each rank has its own part of S, about S / tp",
        guard=PLACEMENT,
        caught_by=frozenset({PLACEMENT, ORACLE}),
        shown_in=("deferred", _MIXED),
        applies=_has_moe,
        patches=sums.shared_never_reduced,
        published=Published(0.239, 0.962, "tpu-inference #3435, 4 ranks share a sum"),
    ),
    Fault(
        name="pending_lost_at_end",
        what="the sum that the last layer leaves pending is never completed",
        thread="sglang #28619 has it at a pipeline cut; the end of the stack is its other place",
        where=_FUSED,
        signature="the last MLP adds X[r], one addend of tp, and each rank another one",
        guard=PLACEMENT,
        caught_by=frozenset({PLACEMENT, LEDGER, ORACLE}),
        shown_in=("fused", _MIXED),
        applies=_fuses,
        patches=sums.pending_lost_at_end,
    ),
    Fault(
        name="pending_lost_at_cut",
        what="a pending sum goes to the next pipeline stage, the note that it is pending does not",
        thread="sglang #28619: the marker is a Python attribute, and does not cross the cut",
        where=_FUSED + " and two layers",
        signature="the MLP before the cut adds X[r], one addend of tp; growing drift behind it",
        guard=PLACEMENT,
        caught_by=frozenset({PLACEMENT, LEDGER, ORACLE}),
        shown_in=("fused", _MIXED),
        applies=_fuses_across,
        patches=sums.pending_lost_at_cut,
    ),
    Fault(
        name="gemma_one_dropped",
        what="the fused kernel multiplies by weight, where Gemma's norm multiplies by 1 + weight",
        thread="TensorRT-LLM #5801, an accuracy bug with fused Gemma norms; flashinfer #3322 and "
        "TensorRT-LLM #15194, #17091 are the feature work that had to add the 1",
        where=_FUSED,
        signature="every norm behind a fused sum shrinks to weight / (1 + weight) of itself",
        guard=ORACLE,
        caught_by=frozenset({ORACLE}),
        shown_in=("fused", _MIXED),
        applies=_fuses,
        patches=quiet.gemma_one_dropped,
    ),
    Fault(
        name="padding_in_the_sum",
        what="tokens are gathered by summing padded buffers, and the padding is not zero",
        thread="ROCm/ATOM #1229: padding rows were never zeroed; sglang gathers by a sum in its "
        "SUM_LEN mode (#28216)",
        where='token shards: variant "reduce_scatter", or attention="dp"; tp above 1',
        signature="x + (tp - 1) times what the call before gathered; the first gather is right",
        guard=LEDGER,
        caught_by=frozenset({LEDGER, ORACLE}),
        shown_in=("reduce_scatter", _DP),
        applies=_gathers,
        patches=sums.padding_in_the_sum,
        published=Published(0.901, 0.95, "ROCm/ATOM #1229"),
    ),
    Fault(
        name="bf16_accumulation",
        what="ranks are added up in bfloat16, each addition rounded",
        thread="TensorRT-LLM #16753: a 5-point swing on GPQA; sglang #34603: 7 roundings at TP8",
        where="tp above 1",
        signature="drift: an error of a few thousandths, larger with depth and with ranks",
        guard=LEDGER,
        caught_by=frozenset({LEDGER, ORACLE}),
        shown_in=("deferred", _MIXED),
        applies=_several,
        patches=quiet.bf16_accumulation,
    ),
    Fault(
        name="gate_wrong_dimension",
        what="the fused kernel's limit on tokens is held against the hidden size",
        thread="vLLM #21325: shape[0] where shape[1] was meant",
        where=_FUSED,
        signature="every output right, to the bit; fusion is silently off",
        guard=LEDGER,
        caught_by=frozenset({LEDGER}),
        shown_in=("fused", _MIXED),
        applies=_fuses,
        patches=quiet.gate_wrong_dimension,
    ),
    Fault(
        name="dump_records_partial",
        what="the debug dump writes down a partial sum for the complete value",
        thread="sglang #22773, in review: the dump had to record the right residual",
        where='attention="tp", tp above 1',
        signature="every output right; the dump shows another wrong value on every rank",
        guard=ORACLE,
        caught_by=frozenset({ORACLE}),
        shown_in=("fused", _MIXED),
        applies=_sums_attention,
        patches=quiet.dump_records_partial,
    ),
    Fault(
        name="one_rank_branches",
        what="one rank sums in the other of two right ways, so that its collective meets no peer",
        thread="sglang #23721: one rank failed to allocate and fell back, its peers waited for "
        "10 minutes",
        where="tp above 1",
        signature="no output: the ranks wait for each other",
        guard=VOTE,
        caught_by=frozenset({VOTE, TIMEOUT}),
        shown_in=("deferred", _MIXED),
        applies=_several,
        patches=quiet.one_rank_branches,
    ),
)

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _ALL}
