"""The experts' rows left unsummed between layers, on real ranks: both ways they are completed.

The kernel itself needs a GPU (tests/cuda/test_finalize.py). Here a stand-in takes its place, which
sees what the kernel would see: the rows, the indices, the weights and the shared expert's addend.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import stepmoe as sm
from stepmoe.comm.fusion.finalize import FINALIZE_MAX_TOKENS, why_not
from stepmoe.comm.fusion.gate import Place
from stepmoe.variants.finalized import FinalizedLayer

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
# 256: the hidden sizes that the kernel takes; 8 of 32 experts, so that some ranks have none of a
# token's.
CONFIG = replace(
    sm.Step3p5Config.tiny(), hidden_size=256, num_experts=32, num_experts_per_tok=8
).with_layers(0, 1, 2, 4)


def forward(variant, parallel, input_ids, capture=None):
    """This rank's float64 logits and its ledger."""
    model = sm.Step3p5ForCausalLM.from_config(CONFIG, variant, parallel, dtype=torch.float64)
    with sm.Ledger() as ledger:
        logits = model(input_ids, capture=capture)
    return logits, ledger


def both(parallel, input_ids):
    """Whether logits and captured states have the bits of `fused`; the ledgers; which layers left
    rows unsummed."""
    captured: list = []
    logits, ledgers = [], []
    for variant in ("fused", FinalizedLayer):
        found, ledger = forward(variant, parallel, input_ids)
        logits.append(found)
        ledgers.append(ledger)
        capture = sm.Capture()
        forward(variant, parallel, input_ids, capture)
        captured.append([capture[i][name] for i in range(4) for name in sorted(capture[i])])
    seen = [step.layer for step in ledgers[1].steps if step.op.startswith("sum of")]
    same = torch.equal(*logits) and all(map(torch.equal, *captured))
    return same, [ledger.counts() for ledger in ledgers], seen, ledgers[1].notes


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_without_the_kernel_it_is_fused_bit_for_bit(ranks4, tp, ep):
    ids = torch.randint(0, 256, (3, 7))
    for same, counts, summed, notes in ranks4.run(both, sm.ParallelConfig(tp, ep), ids):
        assert same
        assert counts[0] == counts[1]
        assert summed == [1, 2, 3]  # at the next layer's norm, the last at the flush
        assert len(notes) == (tp > 1)
        assert all("moe-finalize needs one GPU a rank" in note for note in notes)


def test_more_tokens_than_the_kernel_is_for_are_summed_at_once(ranks4):
    ids = torch.randint(0, 256, (1, FINALIZE_MAX_TOKENS + 1))
    for same, counts, summed, _ in ranks4.run(both, sm.ParallelConfig(4, 2), ids):
        assert (same, counts[0] == counts[1], summed) == (True, True, [])


def test_under_dp_attention_nothing_is_left_unsummed(ranks4):
    ids = torch.randint(0, 256, (4, 5))
    for same, _, summed, _ in ranks4.run(both, sm.ParallelConfig(4, 2, "dp"), ids):
        assert (same, summed) == (True, [])


def stand_in(rows, shared, residual, weight, eps):
    """What the kernel does, in the tensors' dtype, row by row; the sum by an all_reduce."""
    total = shared.clone()
    for token, choices in enumerate(rows.order.positions.tolist()):
        for k, row in enumerate(choices):
            if row != -1:
                total[token] += rows.weights[token, k] * rows.outputs[row]
    dist.all_reduce(total)
    total += residual
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * scale * (1 + weight), total


def with_stand_in(parallel, input_ids):
    from stepmoe.comm.fusion import Fusion

    fused, _ = forward("fused", parallel, input_ids)
    with (
        mock.patch.object(Fusion, "why_no_finalize", return_value=""),
        mock.patch.object(Fusion, "finalize", side_effect=stand_in),
    ):
        logits, ledger = forward(FinalizedLayer, parallel, input_ids)
    return fused, logits, ledger


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_what_the_kernel_would_get_is_the_whole_sum(ranks4, ep):
    ids = torch.randint(0, 256, (2, 9))
    for fused, logits, ledger in ranks4.run(with_stand_in, sm.ParallelConfig(4, ep), ids):
        # float64, other orders of summation; entries reach 10.
        torch.testing.assert_close(logits, fused, atol=1e-11, rtol=0)
        ran = [e.implementation for e in ledger.entries if e.op == "all_reduce_add_rms_norm"]
        assert ran.count("flashinfer moe-finalize") == 2
        assert ran.count("unfused") == len(ran) - 2
        assert [s.layer for s in ledger.steps if s.op.startswith("sum of")] == [3]  # the flush


HOPPER = Place("one GPU a rank", 4, (9, 0))


@pytest.mark.parametrize(
    ("shape", "dtype", "place", "forced", "reason"),
    [
        ((128, 4096), torch.bfloat16, HOPPER, None, ""),
        ((128, 4096), torch.float16, HOPPER, "flashinfer one-shot", ""),
        ((1, 4096), torch.bfloat16, replace(HOPPER, topology="shared GPU"), "flashinfer", ""),
        ((1, 4096), torch.bfloat16, replace(HOPPER, topology="shared GPU"), None, "take turns"),
        ((1, 4096), torch.bfloat16, HOPPER, "triton", "force('triton')"),
        ((1, 4096), torch.bfloat16, HOPPER, "unfused", "force('unfused')"),
        ((1, 1344), torch.bfloat16, HOPPER, None, "multiple of 256, here: 1344"),
        ((1, 4096), torch.float32, HOPPER, None, "has no kernel for float32"),
        ((1, 4096), torch.bfloat16, replace(HOPPER, capability=(8, 0)), None, "here: 8.0"),
        ((1, 4096), torch.bfloat16, replace(HOPPER, world_size=3), None, "here: 3"),
        ((1, 4096), torch.bfloat16, Place("cpu", 4), None, "here: cpu"),
    ],
)
def test_where_the_kernel_is_taken(shape, dtype, place, forced, reason):
    found = why_not(place, torch.empty(shape, dtype=dtype, device="meta"), forced)
    assert reason in found
    assert bool(found) == bool(reason)
