"""What is measured, in which order, and what is refused before anything runs."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch

import stepmoe as sm
from stepmoe.measure.environment import cpu_model, last_level_cache, look_around, provenance
from stepmoe.measure.plan import Case, Plan
from stepmoe.measure.rounds import build_models, copy_of, make_inputs, steps_of
from stepmoe.measure.speedup import NO_DIFFERENCE, gain, interval_of_median, speedup
from stepmoe.variants import DeferredLayer

TINY = sm.Step3p5Config.tiny()


def plan_of(**changes):
    arguments = {
        "config": TINY,
        "variants": sm.VARIANTS,
        "tokens": [4, 1],
        "parallel": sm.ParallelConfig(),
        "phases": ["prefill", "decode"],
        "repeats": 6,
        "warmup": 1,
        "dtype": None,
        "seed": 0,
    }
    return Plan.of(**arguments | changes)


def test_rounds_rotate_so_that_every_variant_takes_every_place():
    plan = plan_of()
    orders = [plan.order(turn) for turn in range(8)]
    assert orders[0] == list(sm.VARIANTS)
    assert orders[1] == [*sm.VARIANTS[1:], sm.VARIANTS[0]]
    for place in range(4):
        assert sorted(order[place] for order in orders) == sorted(2 * sm.VARIANTS)


def test_cases():
    names = [(case.phase, case.tokens) for case in plan_of().cases]
    assert names == [("prefill", 1), ("prefill", 4), ("decode", 1), ("decode", 4)]
    assert Case.of("prefill", 6, sm.ParallelConfig(4)) == Case("prefill", 6, 1, 6, 0)
    # Under dp the ranks share sequences: as many as divide both, of equal length.
    assert Case.of("prefill", 6, sm.ParallelConfig(4, 1, "dp")) == Case("prefill", 6, 2, 3, 0)
    assert Case.of("prefill", 1, sm.ParallelConfig(4, 1, "dp")).batch == 1
    assert Case.of("decode", 6, sm.ParallelConfig(4)) == Case("decode", 6, 6, 1, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [0]}, "token count must be .* got 0"),
        ({"tokens": []}, "tokens="),
        ({"tokens": 64}, "tokens=64"),
        ({"tokens": [2049]}, "2049 exceeds max_position_embeddings = 2048"),
        ({"phases": ["warm"]}, "phases=.*warm"),
        ({"phases": "decode"}, "phases='decode': give a list"),
        ({"variants": ["two_all_reduces"]}, "'two_all_reduces' is not known"),
        ({"variants": "fused"}, "give a list"),
        ({"variants": []}, "variants is empty"),
        ({"variants": ["fused", "fused"]}, "same name"),
        ({"repeats": 5}, "repeats must be .* at least 6, got 5"),
        ({"warmup": 0}, "warmup must be .* got 0"),
        ({"seed": 0.5}, "seed must be .* got 0.5"),
        ({"parallel": sm.ParallelConfig(3)}, "tp=3"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(sm.ConfigError, match=message):
        plan_of(**changes)


def test_ranks_must_be_as_many_as_tp():
    with pytest.raises(sm.ConfigError, match="tp=4 and 1 rank"):
        sm.measure.compare_latency(TINY, sm.VARIANTS, [1], parallel=sm.ParallelConfig(4))
    with pytest.raises(sm.ConfigError, match="tp=4 and 1 rank"):
        sm.measure.profile(TINY, "fused", sm.ParallelConfig(4))


def test_inputs_are_random_and_come_back_only_after_all_others():
    plan = plan_of(variants=["three_all_reduces", "deferred", "fused"])
    models = build_models(plan, torch.device("cpu"))
    case = Case.of("decode", 4, plan.parallel)
    inputs = make_inputs(plan, case, models, cache_bytes=10**7)
    again = make_inputs(plan, case, models, cache_bytes=10**7)
    assert len(inputs.sets) % 3 == 0
    assert len(inputs.sets) >= 4
    for (ids, cache), (same, _) in zip(inputs.sets, again.sets, strict=True):
        assert torch.equal(ids, same)
        assert ids.shape == (4, 1)
        assert cache is not None
        assert cache.length == 16
    assert len({tuple(ids.flatten().tolist()) for ids, _ in inputs.sets}) > 1
    used = [
        step.ids.data_ptr()
        for turn in range(-1, 2 * len(inputs.sets))
        for step in steps_of(models, inputs, turn).values()
    ]
    # Between two uses of a set lie all others, give or take the places within a round.
    for index, pointer in enumerate(used):
        assert pointer not in used[index + 1 : index + len(inputs.sets) - 2]
    memory = [cache.layers[0].keys.data_ptr() for _, cache in inputs.sets]
    assert len(set(memory)) == len(memory)


def test_variants_share_their_weights_and_steps_leave_the_cache_as_it_was():
    plan = plan_of(variants=["deferred", "fused"])
    models = build_models(plan, torch.device("cpu"))
    first, second = (dict(model.named_parameters()) for model in models.values())
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)
    inputs = make_inputs(plan, Case.of("decode", 2, plan.parallel), models, 0)
    step = steps_of(models, inputs, 0)["fused"]
    assert torch.equal(step.prepared()(), step.prepared()())
    assert step.cache is not None
    assert step.cache.length == 16


def test_a_copy_of_a_cache_with_another_order_of_sequences_decodes_the_same():
    model = sm.Step3p5ForCausalLM.from_config(TINY)
    ids = torch.randint(256, (3, 6), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache()
    model(ids[:, :5], cache)
    turned = copy_of(cache, turned_by=1)
    straight = model(ids[:, 5:], copy_of(cache))
    # 1e-5: float32; another row of the batch may be summed in another order.
    torch.testing.assert_close(
        model(ids[:, 5:].roll(1, 0), turned), straight.roll(1, 0), atol=1e-5, rtol=0
    )


def test_the_machine_is_described():
    size, source = last_level_cache(torch.device("cpu"))
    assert size >= 2**18
    assert source
    assert cpu_model()


def test_where_something_was_measured_needs_no_layout():
    """Five measurements wrote the same three lines themselves, because theirs has none."""
    place = look_around(torch.device("cpu"))
    where = provenance([place, place])
    assert where["hardware"]["ranks"] == 2
    assert where["versions"]["torch"] == torch.__version__
    assert datetime.now(UTC) - datetime.fromisoformat(where["date"]) < timedelta(minutes=1)
    assert place.host not in json.dumps(where)


def noisy(rounds, slower=1.0, seed=0):
    """Times of two variants in the same rounds: a machine that drifts, and 5 % of noise on each."""
    random = torch.Generator().manual_seed(seed)
    drift = torch.linspace(1, 2, rounds)
    noise = torch.exp(0.05 * torch.randn(2, rounds, generator=random))
    return (drift * noise[0]).tolist(), (slower * drift * noise[1]).tolist()


def test_equal_variants_show_no_difference_nineteen_times_of_twenty():
    found = [speedup(*noisy(20, seed=seed)).verdict for seed in range(400)]
    # The interval of 20 rounds misses the median with probability 2 x P(binomial(20) <= 5) = 4.1 %:
    # 16 of 400, standard deviation 4. Seeded, so this does not vary from run to run.
    assert 400 - 16 - 12 <= found.count(NO_DIFFERENCE) <= 400 - 16 + 12


def test_a_slower_variant_is_seen_through_drift():
    baseline, variant = noisy(20, slower=1.2)
    assert max(baseline) > 1.5 * min(baseline)
    found = speedup(baseline, variant)
    assert found.verdict == "slower"
    assert found.low <= found.ratio <= found.high < 1
    assert found.ratio == pytest.approx(1 / 1.2, rel=0.05)
    assert speedup(variant, baseline).verdict == "faster"


def test_interval_of_the_median():
    # P(at most 1 of 10 below) = 11/1024 is below 2.5 %, P(at most 2) = 56/1024 is not: the second
    # smallest and the second largest.
    assert interval_of_median([float(i) for i in range(10)]) == (1.0, 8.0)
    assert interval_of_median([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    with pytest.raises(ValueError, match="at least 6"):
        interval_of_median([1.0] * 5)
    low, high = interval_of_median([math.sin(i) for i in range(1001)])
    assert -0.2 < low < high < 0.2


def test_a_class_can_be_measured_under_its_name():
    class Own(DeferredLayer):
        pass

    assert list(plan_of(variants=["deferred", Own]).variants) == ["deferred", "Own"]


def test_gain_is_the_ratio_of_totals_and_its_interval_holds_the_truth():
    """Rounds that share what slows the machine down; the variant is 1.2 times faster."""
    random, held = np.random.default_rng(3), 0
    for trial in range(60):
        machine = random.gamma(20, size=20)
        baseline = 1.2 * machine * random.lognormal(0, 0.05, 20)
        variant = machine * random.lognormal(0, 0.05, 20)
        found = gain(baseline.tolist(), variant.tolist(), seed=trial)
        assert found.ratio == pytest.approx(baseline.sum() / variant.sum())
        # Unpaired, the interval would be some 0.3 wide: the machine's deviation is 22 %.
        assert found.high - found.low < 0.12
        held += found.low <= 1.2 <= found.high
    assert held >= 48  # expected 55; fewer than 48 of 60 comes once in 500 at 92 %
    assert gain(variant.tolist(), baseline.tolist()).verdict == "slower"
    assert gain(baseline.tolist()[:5], variant.tolist()[:5]).verdict.startswith("too few rounds")
