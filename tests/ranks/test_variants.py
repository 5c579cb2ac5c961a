"""Every variant on real ranks: against the published reference, the oracle, and exact counts.

The functions that take `weights`, `path` or `case` first run inside the ranks.
"""

from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from shapes import configs

import stepmoe as sm
from stepmoe.comm.groups import build_groups
from stepmoe.parallel import tensor_layouts
from stepmoe.random_weights import random_tensor

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
REFERENCE = load_file(TINY / "reference.safetensors")
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
ATTENTION = ["tp", "dp"]


def reference_case(path, variant, parallel, input_ids):
    """One rank's logits, completed states and counts; and whether all ranks have the same bits."""
    model = sm.Step3p5ForCausalLM.from_pretrained(path, variant, parallel, device="cpu")
    with sm.Ledger() as ledger:
        logits = model(input_ids)
    capture = sm.Capture()
    model(input_ids, capture=capture)
    cache = model.new_cache()
    pieces = [model(part, cache) for part in input_ids.split([13, 1, 1, 9, 1, 15], dim=1)]
    everyone = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, logits.contiguous())
    return {
        "logits": logits,
        "decoded": torch.cat(pieces, dim=1),
        "states": [capture[i]["layer_output"] for i in range(3)],
        "final": model.model.norm(capture[3]["layer_output"]),
        "counts": ledger.counts(),
        "identical": all(torch.equal(logits, other) for other in everyone),
    }


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_reference(ranks4, variant, tp, ep, attention):
    parallel = sm.ParallelConfig(tp, ep, attention)
    ids = REFERENCE["input_ids"]
    # tp below 4: the four ranks are replicas of a smaller model, which is also what torchrun gives.
    for result in ranks4.run(reference_case, TINY, variant, parallel, ids):
        # 1e-4: float32 on both sides, other orders of summation; entries reach 20.
        close = {"atol": 1e-4, "rtol": 0}
        torch.testing.assert_close(result["logits"], REFERENCE["logits"], **close)
        torch.testing.assert_close(result["decoded"], result["logits"], **close)
        for layer, state in enumerate(result["states"]):
            torch.testing.assert_close(state, REFERENCE["hidden_states"][layer + 1], **close)
        torch.testing.assert_close(result["final"], REFERENCE["hidden_states"][4], **close)
        assert result["identical"]


# One dense layer (0) and three MoE layers (1, 2, 3). Derived by hand from the layer's structure:
#   three_all_reduces   dense: attention, mlp = 2; MoE: attention, shared, routed = 3; 2 + 9 = 11
#   deferred            attention and mlp_output in each of 4 layers = 8
#   fused               the same 8 sums; the last one has no norm behind it in the stack: 7 fused,
#                       1 plain all_reduce (flush)
#   reduce_scatter      2 all_gather + 2 reduce_scatter a layer, and 1 all_gather before the head
# attention="dp": attention needs no sum (-4); the MLP needs every token (+4 all_gather), and so
# does the head (+1 all_gather). reduce_scatter keeps 1 all_gather + 1 reduce_scatter a layer, + 1.
COUNTS = {
    ("three_all_reduces", "tp"): {"all_reduce": 11},
    ("deferred", "tp"): {"all_reduce": 8},
    ("fused", "tp"): {"all_reduce_add_rms_norm": 7, "all_reduce": 1},
    ("reduce_scatter", "tp"): {"all_gather": 9, "reduce_scatter": 8},
    ("three_all_reduces", "dp"): {"all_gather": 5, "all_reduce": 7},
    ("deferred", "dp"): {"all_gather": 5, "all_reduce": 4},
    ("fused", "dp"): {"all_gather": 5, "all_reduce": 4},
    ("reduce_scatter", "dp"): {"all_gather": 5, "reduce_scatter": 4},
}


def ledger_case(path, variant, parallel, input_ids):
    model = sm.Step3p5ForCausalLM.from_pretrained(path, variant, parallel, device="cpu")
    with sm.Ledger() as ledger:
        model(input_ids)
    return ledger


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_ledger_counts_and_bytes_are_exact(ranks4, variant, attention):
    parallel = sm.ParallelConfig(4, 2, attention)
    ids = REFERENCE["input_ids"][
        :, :30
    ]  # 60 tokens: 15 a rank; under dp 1 row a rank, 2 ranks idle
    for rank, ledger in enumerate(ranks4.run(ledger_case, TINY, variant, parallel, ids)):
        assert ledger.rank == rank
        assert ledger.counts() == COUNTS[variant, attention]
        tokens = 60 if attention == "tp" else 4 * 30  # dp pads 2 rows to 4
        for entry in ledger.entries:
            assert entry.shape == (60 if entry.op.startswith("all_reduce") else tokens, 64) or (
                attention == "dp" and entry.op == "reduce_scatter" and entry.shape == (120, 64)
            )
            assert entry.bytes == entry.shape[0] * 64 * 4
            halves = 2 if entry.op.startswith("all_reduce") else 1
            assert entry.bytes_sent == halves * 3 / 4 * entry.bytes
            assert entry.seconds > 0
            assert (entry.group, entry.group_size, entry.dtype) == ("tp", 4, torch.float32)
        per_layer = [len(ledger.of_layer(layer)) for layer in (0, 1, 2, 3)]
        expected = {"three_all_reduces": [2, 3, 3, 3], "reduce_scatter": [4] * 4}
        if attention == "tp":
            assert per_layer == expected.get(variant, [2] * 4)
        assert "total: " in str(ledger)


def test_the_fused_variant_says_what_ran_instead(ranks4):
    ids = REFERENCE["input_ids"]
    ledger = ranks4.run(ledger_case, TINY, "fused", sm.ParallelConfig(4), ids)[0]
    fused = [entry for entry in ledger.entries if entry.op == "all_reduce_add_rms_norm"]
    assert {entry.implementation for entry in fused} == {"unfused"}
    assert "CPU tensors" in str(ledger)
    under_dp = ranks4.run(ledger_case, TINY, "fused", sm.ParallelConfig(4, 1, "dp"), ids)[0]
    assert "the deferred path runs instead" in str(under_dp)


def oracle_case(case, weights_seed, input_ids):
    config, variant, parallel = case
    model = sm.Step3p5ForCausalLM.from_config(
        config, variant, parallel, dtype=torch.float64, device="cpu", seed=weights_seed
    )
    capture = sm.Capture()
    logits = model(input_ids, capture=capture)
    return logits, capture.states


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_shapes_against_the_oracle(ranks4, data):
    """Any shape, layout, batch and length: single tokens, token counts that tp does not divide."""
    tp, ep = data.draw(st.sampled_from(LAYOUTS))
    config = data.draw(configs(tp))
    parallel = sm.ParallelConfig(tp, ep, data.draw(st.sampled_from(ATTENTION)))
    variant = data.draw(st.sampled_from(sm.VARIANTS))
    seed = data.draw(st.integers(0, 2**20))
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 11))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    layouts = tensor_layouts(config, sm.ParallelConfig(), 0)
    weights = {name: random_tensor(name, layout, seed) for name, layout in layouts.items()}
    expected = oracle.forward(config, weights, ids)
    for logits, states in ranks4.run(oracle_case, (config, variant, parallel), seed, ids):
        # float64 throughout: 1e-9 is rounding with room, a wrong sum is off by percents.
        torch.testing.assert_close(logits, expected["logits"], atol=1e-9, rtol=1e-9)
        for layer, named in states.items():
            for name, value in named.items():
                torch.testing.assert_close(value, expected[f"{layer}.{name}"], atol=1e-9, rtol=1e-9)


def capture_case(path, variant, layers):
    model = sm.Step3p5ForCausalLM.from_pretrained(path, variant, sm.ParallelConfig(4), device="cpu")
    capture = sm.Capture(layers)
    with sm.Ledger() as with_capture:
        model(torch.arange(6)[None], capture=capture)
    with sm.Ledger() as without:
        model(torch.arange(6)[None])
    return capture.states, with_capture, without


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_capture_is_complete_and_free_when_off(ranks4, variant):
    for states, with_capture, without in ranks4.run(capture_case, TINY, variant, [1, 3]):
        assert sorted(states) == [1, 3]
        assert all(len(named) == 6 for named in states.values())
        own = [entry for entry in with_capture.entries if entry.site != "capture"]
        assert [e.op for e in own] == [e.op for e in without.entries]
        assert not any(entry.site == "capture" for entry in without.entries)


def test_a_layout_for_another_number_of_ranks_frees_everyone(ranks4):
    with pytest.raises(sm.RankError, match="tp=3 needs a multiple of 3 ranks, this job has 4"):
        ranks4.run(build_groups, sm.ParallelConfig(tp=3), timeout=20)


def generate_case(path, variant, attention):
    model = sm.Step3p5ForCausalLM.from_pretrained(
        path, variant, sm.ParallelConfig(4, 2, attention), device="cpu"
    )
    return model.generate(REFERENCE["input_ids"][:, :20], max_new_tokens=8)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_generate_is_the_same_on_every_rank_and_variant(ranks4, variant, attention):
    alone = sm.Step3p5ForCausalLM.from_pretrained(TINY, parallel=sm.ParallelConfig())
    expected = alone.generate(REFERENCE["input_ids"][:, :20], max_new_tokens=8)
    for tokens in ranks4.run(generate_case, TINY, variant, attention):
        assert torch.equal(tokens, expected)


KEPT = {}


def keep_a_model(parallel):
    """Builds a model, and keeps the last one alive in this rank, groups and all."""
    KEPT["model"] = model = sm.Step3p5ForCausalLM.from_config(
        sm.Step3p5Config.tiny(), parallel=parallel, device="cpu"
    )
    return model(torch.arange(6)[None]).sum().item()


def fail_on_rank_2():
    if dist.get_rank() == 2:
        raise ZeroDivisionError("division by zero")
    dist.barrier()


def test_groups_of_a_job_that_failed_are_not_used_again(ranks4):
    """After a failure the ranks make new process groups; the cached subgroups must follow."""
    two = sm.ParallelConfig(tp=2)
    before = ranks4.run(keep_a_model, two)
    with pytest.raises(sm.RankError, match="division by zero") as caught:
        ranks4.run(fail_on_rank_2, timeout=20)
    # A model's imports must not keep the old groups alive: then only a restart frees the peers.
    assert "restarted" not in str(caught.value)
    assert ranks4.run(keep_a_model, two, timeout=20) == before
