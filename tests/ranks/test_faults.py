"""The bug lab: every fault does its damage when nothing watches, and guards catch it.

What a fault must do to the values is computed here from tests/oracle.py, without ranks: a rank's
addend of a sum is the whole model with all weights of the projection that ends in the sum set to
zero, except for the rank's own.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from shapes import configs
from torch import Tensor

import stepmoe as sm
from stepmoe import faults
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.placement import Placed
from stepmoe.faults import FAULTS, Findings, Setting
from stepmoe.faults.lab import judge
from stepmoe.faults.patching import replaced
from stepmoe.measure.distance import relative_error
from stepmoe.parallel import tensor_layouts

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
CONFIG = sm.Step3p5Config.from_pretrained(TINY)  # layer 0 dense, layers 1 to 3 MoE
WEIGHTS = {name: weight.double() for name, weight in load_file(TINY / "model.safetensors").items()}
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
# 21 tokens, which neither 2 nor 4 ranks share evenly; 3 sequences: under dp one of 4 ranks is idle.
IDS = torch.randint(CONFIG.vocab_size, (3, 7), generator=torch.Generator().manual_seed(22773))
EXACT = oracle.forward(CONFIG, WEIGHTS, IDS)
DOWN = ("o_proj", "down_proj")  # the projections whose outputs are partial sums
# float64 on both sides: rounding is 1e-13, a wrong addend some percent.
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


Holders = tuple[int, ...]  # ranks


def own_weights(layer: int, parallel: sm.ParallelConfig, holders: Holders, part: str = ""):
    """A layer's weights; down projections zero but for what `holders` have of those of `part`."""
    prefix = f"model.layers.{layer}."
    own = {n.removeprefix(prefix): w for n, w in WEIGHTS.items() if n.startswith(prefix)}
    for name in own:
        if any(down in name for down in DOWN):
            kept = torch.zeros_like(own[name])
            for rank in holders if part in name else ():
                slices = tensor_layouts(CONFIG, parallel, rank)[prefix + name].slices
                kept[slices] = own[name][slices]
            own[name] = kept
    return own


@cache
def addend(layer: int, parallel: sm.ParallelConfig, holders: Holders, part: str = ""):
    """What `holders` add to the sum behind a layer's MLP, or to one part of it: (3, 7, D)."""
    x = EXACT[f"{layer}.mlp_input"].flatten(0, 1)
    own = own_weights(layer, parallel, holders, part)
    compute = oracle.moe if layer in CONFIG.moe_layers else oracle.dense
    return compute(CONFIG, CONFIG.layer(layer), own, x).view(3, 7, -1)


@cache
def attention_addend(tp: int, rank: int) -> Tensor:
    """What a rank adds to the sum behind the attention of layer 0: (3, 7, D)."""
    own = own_weights(0, sm.ParallelConfig(tp), (rank,))
    inputs = EXACT["0.attn_input"]
    return torch.stack([oracle.attention(CONFIG, CONFIG.layer(0), own, x) for x in inputs])


def whole(layer: int, part: str) -> Tensor:
    return addend(layer, sm.ParallelConfig(), (0,), part)


def per_rank(setting: Setting, rank: int, of: Callable[[int], Tensor]) -> Tensor:
    """`of(rank)`; where tokens are sharded, each token from the rank that holds it."""
    parallel = setting.parallel
    if setting.variant != "reduce_scatter" and parallel.attention == "tp":
        return of(rank)
    tokens = -(-3 // parallel.tp) * 7 if parallel.attention == "dp" else -(-21 // parallel.tp)
    rows = [of(t // tokens).flatten(0, 1)[t] for t in range(21)]
    return torch.stack(rows).view(3, 7, -1)


def mlp_added(states: dict[int, dict[str, Tensor]], layer: int) -> Tensor:
    """What a layer's MLP has added to the residual stream when the next layer reads it."""
    after = states[layer + 1]["post_attn_residual"] - states[layer + 1]["attn_output"]
    return after - EXACT[f"{layer}.post_attn_residual"]


def check_dense_reduced_twice(setting, rank, seen):
    expected = setting.parallel.tp * EXACT["0.mlp_output"]
    torch.testing.assert_close(mlp_added(seen.states, 0), expected, **CLOSE)


def check_wrong_group(setting, rank, seen):
    """tp=4, ep=2: "ep" is ranks 0 and 2, or 1 and 3. Two halves make the whole."""
    part = "moe." if setting.variant == "three_all_reduces" else ""
    full = whole(1, "share_expert") if part else 0.0

    def half(rank: int) -> Tensor:
        return full + addend(1, setting.parallel, (rank % 2, rank % 2 + 2), part)

    torch.testing.assert_close(mlp_added(seen.states, 1), per_rank(setting, rank, half), **CLOSE)
    torch.testing.assert_close(half(0) + half(1) - full, EXACT["1.mlp_output"], **CLOSE)


def check_scattered_then_reduced(setting, rank, seen):
    tp = setting.parallel.tp
    rows = -(-3 // tp) * 7 if setting.parallel.attention == "dp" else -(-21 // tp)
    right = EXACT["0.mlp_output"].flatten(0, 1)
    padded = torch.cat((right, right.new_zeros(tp * rows - 21, right.shape[1])))
    mixed = padded.view(tp, rows, -1).sum(0).repeat(tp, 1)[:21].view(3, 7, -1)
    torch.testing.assert_close(mlp_added(seen.states, 0), mixed, **CLOSE)


def check_shared_counted_ep_times(setting, rank, seen):
    expected = whole(1, "moe.") + setting.parallel.ep * whole(1, "share_expert")
    torch.testing.assert_close(mlp_added(seen.states, 1), expected, **CLOSE)


def check_shared_never_reduced(setting, rank, seen):
    def with_own_share(rank: int) -> Tensor:
        return whole(1, "moe.") + addend(1, setting.parallel, (rank,), "share_expert")

    # Not mlp_added: the next layer's share, too, is in what its capture calls the residual.
    added = seen.states[1]["layer_output"] - EXACT["1.post_attn_residual"]
    torch.testing.assert_close(added, per_rank(setting, rank, with_own_share), **CLOSE)


def check_pending_lost_at_end(setting, rank, seen):
    last = EXACT["3.post_attn_residual"] + addend(3, setting.parallel, (rank,))
    final = oracle.norm(last, WEIGHTS["model.norm.weight"], CONFIG.rms_norm_eps)
    torch.testing.assert_close(seen.logits, final @ WEIGHTS["lm_head.weight"].T, **CLOSE)


def check_pending_lost_at_cut(setting, rank, seen):
    """Layers 0 and 1 are one stage, 2 and 3 the other."""
    received = EXACT["1.post_attn_residual"] + addend(1, setting.parallel, (rank,))
    weight = WEIGHTS["model.layers.2.input_layernorm.weight"]
    expected = oracle.norm(received, weight, CONFIG.rms_norm_eps)
    torch.testing.assert_close(seen.states[2]["attn_input"], expected, **CLOSE)


def check_gemma_one_dropped(setting, rank, seen):
    weight = WEIGHTS["model.layers.0.post_attention_layernorm.weight"]
    expected = EXACT["0.mlp_input"] * weight / (1 + weight)
    torch.testing.assert_close(seen.states[0]["mlp_input"], expected, **CLOSE)


def check_padding_in_the_sum(setting, rank, seen):
    """Layer 1's second gather (under dp: its only one) adds what was gathered before it."""
    weight = WEIGHTS["model.layers.1.post_attention_layernorm.weight"]
    right = oracle.norm(seen.states[1]["post_attn_residual"], weight, CONFIG.rms_norm_eps)
    before = (
        seen.states[0]["mlp_input"]
        if setting.parallel.attention == "dp"
        else seen.states[1]["attn_input"]
    )
    expected = right + (setting.parallel.tp - 1) * before
    torch.testing.assert_close(seen.states[1]["mlp_input"], expected, **CLOSE)


def check_bf16_accumulation(setting, rank, seen):
    errors = [
        relative_error(seen.states[layer]["layer_output"], EXACT[f"{layer}.layer_output"])
        for layer in range(4)
    ]
    # bfloat16 keeps 8 bits: rounding is off by up to 2^-9, and each addend and each addition is
    # rounded, in two sums. Behind layer 0 there is no limit: a router chooses another expert.
    assert 2**-12 < errors[0] < 2**-6
    assert errors[3] > errors[0]


def check_gate_wrong_dimension(setting, rank, seen):
    torch.testing.assert_close(seen.logits, EXACT["logits"], **CLOSE)
    fused = [e for e in seen.ledger.entries if e.op == "all_reduce_add_rms_norm"]
    assert fused
    assert {e.reason for e in fused} == {"4096 tokens are more than the gate's 2048"}


def check_dump_records_partial(setting, rank, seen):
    torch.testing.assert_close(seen.logits, EXACT["logits"], **CLOSE)
    dumped = attention_addend(setting.parallel.tp, rank)
    torch.testing.assert_close(seen.states[0]["attn_output"], dumped, **CLOSE)
    if setting.variant == "fused":  # what the review of sglang #22773 found
        partial = EXACT["1.post_attn_residual"] + addend(1, setting.parallel, (rank,))
        torch.testing.assert_close(seen.states[1]["layer_output"], partial, **CLOSE)


DAMAGE = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
HANGS = "one_rank_branches"


def settings_of(fault: str, variant: str) -> list[Setting]:
    """Where it applies: every layout with attention="tp", and two with "dp"."""
    layouts = [(*layout, "tp") for layout in LAYOUTS] + [(2, 1, "dp"), (4, 2, "dp")]
    every = [
        Setting(TINY, variant, sm.ParallelConfig(*layout), torch.float64) for layout in layouts
    ]
    return [s for s in every if FAULTS[fault].applies(variant, s.parallel, CONFIG)]


CASES = [(f, v) for f in FAULTS for v in sm.VARIANTS if settings_of(f, v)]


@pytest.fixture(scope="module")
def exact():
    return faults.exact_pass(TINY, IDS)


@pytest.mark.parametrize(("fault", "variant"), [case for case in CASES if case[0] != HANGS])
def test_guards_catch_it_and_without_them_it_does_its_damage(ranks4, exact, fault, variant):
    for setting in settings_of(fault, variant):
        findings = faults.examine(ranks4, setting, IDS, fault, exact)
        fired = findings.fired
        assert FAULTS[fault].caught_by <= fired, (setting, findings.guards)
        assert FAULTS[fault].guard in fired, setting
        assert len(findings.passes) == 4  # with nothing to stop it, it ran to the end on every rank
        for world_rank, seen in enumerate(findings.passes):
            DAMAGE[fault](setting, world_rank % setting.parallel.tp, seen)
            assert faults.guards.CHECK_IS_OFF in seen.ledger.notes


def branching_layer(setting: Setting) -> int:
    """Layer 2 branches; under fused its first collective completes layer 1."""
    return 1 if (setting.variant, setting.parallel.attention) == ("fused", "tp") else 2


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_a_vote_stops_the_rank_that_branches(ranks4, variant):
    for setting in settings_of(HANGS, variant):
        odd, layer = setting.parallel.tp - 1, branching_layer(setting)
        for rank, seen in enumerate(ranks4.run(faults.observe, setting, IDS, HANGS, guarded=True)):
            assert seen.stopped_by == "vote"
            own_odd = rank // setting.parallel.tp * setting.parallel.tp + odd  # of this replica
            said = dict(line.strip().split(": ", 1) for line in seen.message.splitlines()[1:])
            assert len(said) == setting.parallel.tp
            branched = said.pop(f"rank {own_odd}")
            assert branched.startswith(f"stepmoe::all_gather, layer {layer}")
            assert len({*said.values(), branched}) == 2


@pytest.mark.parametrize("variant", ["fused", "reduce_scatter"])
def test_without_the_vote_the_ranks_hang_and_the_timeout_names_them(ranks4, exact, variant):
    setting = Setting(TINY, variant, sm.ParallelConfig(4, 2), torch.float64)
    findings = faults.examine(ranks4, setting, IDS, HANGS, exact, timeout=5)
    assert findings.fired == {"vote", "timeout"}
    assert findings.passes == []
    waiting = [line for line in findings.guards["timeout"][0].splitlines() if "rank " in line]
    assert len(waiting) == 4
    assert all(f"layer {branching_layer(setting)}" in where for where in waiting), waiting
    assert ["all_gather of" in where for where in waiting] == [False, False, False, True]


def test_every_fault_has_its_damage_checked():
    assert sorted({*DAMAGE, HANGS}) == sorted(FAULTS)
    assert {fault for fault, _ in CASES} == set(FAULTS)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_guard_fires_on_a_correct_run(ranks4, data):
    """Any shape, layout, variant, batch and length, float64 so that only a mistake is an error."""
    tp, ep = data.draw(st.sampled_from([(1, 1), *LAYOUTS]))
    parallel = sm.ParallelConfig(tp, ep, data.draw(st.sampled_from(["tp", "dp"])))
    config = data.draw(configs(tp))
    setting = Setting(config, data.draw(st.sampled_from(sm.VARIANTS)), parallel, torch.float64)
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 11))
    ids = torch.randint(config.vocab_size, shape)
    exact = faults.exact_pass(config, ids)
    for seen in ranks4.run(faults.observe, setting, ids, guarded=True):
        assert seen.stopped_by is None, seen.message
        findings = Findings({name: [] for name in faults.GUARDS}, [])
        judge(seen, setting, exact, ids, findings)
        assert findings.fired == set()


def test_float32_rounding_is_within_the_oracles_tolerance(ranks4, exact):
    for variant in sm.VARIANTS:
        setting = Setting(TINY, variant, sm.ParallelConfig(4, 2))
        assert faults.examine(ranks4, setting, IDS, None, exact).fired == set()


def test_bf16_sums_drift_further_with_more_ranks(ranks4, exact):
    def error(tp: int) -> float:
        setting = Setting(TINY, "deferred", sm.ParallelConfig(tp), torch.float64)
        seen = faults.examine(ranks4, setting, IDS, "bf16_accumulation", exact).passes[0]
        residual = seen.states[0]["post_attn_residual"]
        return relative_error(residual, EXACT["0.post_attn_residual"])

    assert error(4) > error(2)


def alone(fault: str, variant: str) -> tuple[sm.Step3p5ForCausalLM, AbstractContextManager[None]]:
    """A model on one rank, and the context that puts the fault's whole patch into it."""
    model = Setting(TINY, variant, sm.ParallelConfig(), torch.float64).model()
    return model, replaced(FAULTS[fault].patches(model))


@pytest.mark.parametrize(("fault", "variant"), CASES)
def test_one_rank_alone_computes_the_right_values(fault, variant):
    """A unit test of the outputs at tp=1 passes, except for the lost 1."""
    model, context = alone(fault, variant)
    with faults.unchecked(), context:
        seen = not torch.allclose(model(IDS), EXACT["logits"], **CLOSE)
    assert seen is (fault == "gemma_one_dropped")


@pytest.mark.parametrize(("fault", "variant"), CASES)
def test_the_placement_check_needs_no_second_rank(fault, variant):
    """It compares what is believed, not values. Only the two groups are the same for one rank."""
    model, context = alone(fault, variant)
    objects = FAULTS[fault].guard == "placement" and fault != "wrong_group"
    with context, pytest.raises(sm.PlacementError) if objects else nullcontext():
        model(IDS)


def everything_patched(model):
    """The attributes faults replace: of the layers, and of the classes behind them."""
    owners = [*model.model.decoder_layers, sm.Capture, Placed, Communicator]
    return [dict(vars(owner)) for owner in owners]


@pytest.mark.parametrize("fault", FAULTS)
def test_everything_is_put_back_also_after_an_error(fault):
    model, context = alone(fault, next(v for name, v in CASES if name == fault))
    before, logits = everything_patched(model), model(IDS)

    def fails() -> None:
        with faults.unchecked(), faults.voting(), context:
            assert everything_patched(model) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert everything_patched(model) == before
    assert torch.equal(model(IDS), logits)


def test_the_check_cannot_stay_off():
    before = Placed.complete
    off = faults.unchecked()
    off.__enter__()
    assert Placed.complete is not before
    del off  # never left
    gc.collect()
    assert Placed.complete is before


def test_a_fault_says_where_it_applies():
    model = Setting(TINY, "deferred", sm.ParallelConfig()).model()
    with pytest.raises(sm.ConfigError, match=r"gemma_one_dropped cannot occur .* it needs variant"):
        FAULTS["gemma_one_dropped"].inject(model)

    class Own(sm.variants.DeferredLayer):
        pass

    own = sm.Step3p5ForCausalLM.from_pretrained(TINY, Own)
    with pytest.raises(sm.ConfigError, match="not for Own"):
        FAULTS["wrong_group"].inject(own)
