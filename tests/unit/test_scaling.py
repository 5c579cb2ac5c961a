"""Scaling on paper: rings walked step by step on arrays, sums over layers, routing really drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_charts import check_legible

import stepmoe as sm
from stepmoe import charts, scaling
from stepmoe.comm.cost import LINKS, Link, collective_time, terms
from stepmoe.comm.layer_cost import Machine
from stepmoe.comm.nodes import Nodes, flat_time, hierarchical_time, time_over_nodes
from stepmoe.filling import weight_bytes
from stepmoe.kernels.permute import sort_by_expert
from stepmoe.measure import load
from stepmoe.mini.load import RouterLoad, imbalance
from stepmoe.predict import Assumptions, Compute, predict
from stepmoe.roofline import CHIPS, layer_roofline
from stepmoe.scaling import Rule, gains, layout_for, rule_of, scale, scaled_step
from stepmoe.simulated_routing import draw_load, group_rows, simulate_imbalance
from stepmoe.widgets import ScalingExplorer

FLASH, TINY = sm.Step3p5Config.flash(), sm.Step3p5Config.tiny()
IN, OUT = Link("in", 2.0, 4.0, "made up"), Link("out", 5.0, 0.5, "made up")
COMPUTE = Compute(0.14, 0.13, 0.16, "made up")


def walk(values, ring, per_node, is_gather):
    """One half of a ring's all-reduce over the ranks `ring`, in place: seconds, by its slowest hop
    in every step, and bytes (entries) that a rank sends to another node, the busiest one's."""
    n, size = len(ring), len(values[ring[0]]) // len(ring)
    seconds, out = 0.0, dict.fromkeys(ring, 0)
    for step in range(n - 1):
        moves, hops = [], []
        for place, rank in enumerate(ring):
            chunk = (place + is_gather - step) % n
            part = slice(chunk * size, (chunk + 1) * size)
            peer = ring[(place + 1) % n]
            moves.append((peer, part, values[rank][part].copy()))
            crosses = rank // per_node != peer // per_node
            out[rank] += size * crosses
            link = OUT if crosses else IN
            hops.append(link.latency + size / link.bandwidth)
        for peer, part, sent in moves:
            values[peer][part] = sent if is_gather else values[peer][part] + sent
        seconds += max(hops)
    return seconds, max(out.values())


def run_ring(nodes, per_node, chunk, steps, link, outer):
    """Seconds of one ring in which every rank passes a chunk on as soon as it can."""
    n = nodes * per_node
    hops = [outer if rank % per_node == per_node - 1 else link for rank in range(n)]
    free, arrived = [0.0] * n, [0.0] * n
    for _ in range(steps):
        starts = [max(free[rank], arrived[rank]) for rank in range(n)]
        free = [start + chunk / hop.bandwidth for start, hop in zip(starts, hops, strict=True)]
        there = [done + hop.latency for done, hop in zip(free, hops, strict=True)]
        arrived = [there[rank - 1] for rank in range(n)]
    return max(arrived)


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 4), (3, 2), (4, 8)])
def test_a_ring_over_nodes_as_it_runs(nodes, per_node):
    n, size = nodes * per_node, 1000.0
    for operation, halves in (("all_reduce", 2), ("all_gather", 1)):
        steps = halves * (n - 1)

        def both(link, outer, nbytes, operation=operation, steps=steps):
            predicted = flat_time(operation, nbytes, n, per_node, link, outer)
            return predicted, run_ring(nodes, per_node, nbytes / n, steps, link, outer)

        # Without bytes the latencies of the longest way, without latency the narrowest place.
        predicted, ran = both(IN, OUT, 0.0)
        assert predicted == pytest.approx(ran)
        predicted, ran = both(replace(IN, latency=0), replace(OUT, latency=0), size)
        assert (
            predicted * (1 - 1e-9) <= ran <= 1.2 * predicted
        )  # and a last chunk's way inside its node
        # With both: the ring's own overlap is at best what the formula adds up.
        predicted, ran = both(IN, OUT, size)
        assert 0.5 * predicted < ran < 1.2 * predicted
    # A ring a port carries its part as one ring carries the whole.
    one, all_ports = (
        flat_time("all_reduce", size, n, per_node, replace(IN, bandwidth=1e9), OUT, ports)
        for ports in (1, per_node)
    )
    start = flat_time("all_reduce", 0.0, n, per_node, IN, OUT)
    assert one - start == pytest.approx(per_node * (all_ports - start))


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 4), (3, 2), (4, 4)])
def test_by_parts_as_the_algorithm_walks(nodes, per_node):
    n = nodes * per_node
    size = 5 * n * per_node
    given = np.random.default_rng().integers(0, 99, (n, size))
    total = given.sum(0)

    flat = [row.copy() for row in given]
    halves = [walk(flat, list(range(n)), per_node, is_gather) for is_gather in (0, 1)]
    assert all((row == total).all() for row in flat)
    flat_out = sum(sent for _, sent in halves)

    values = [row.copy() for row in given]
    inside = [list(range(first, first + per_node)) for first in range(0, n, per_node)]
    walked = max(walk(values, ring, per_node, 0)[0] for ring in inside)
    # After a reduce_scatter the rank at place p holds part p + 1.
    parts = {rank: (rank + 1) % per_node * (size // per_node) for rank in range(n)}
    pieces = [values[rank][parts[rank] : parts[rank] + size // per_node] for rank in range(n)]
    across = [list(range(place, n, per_node)) for place in range(per_node)]
    both = [[walk(pieces, ring, per_node, is_gather) for ring in across] for is_gather in (0, 1)]
    walked += sum(max(seconds for seconds, _ in rings) for rings in both)
    hierarchical_out = sum(max(sent for _, sent in rings) for rings in both)
    walked += max(walk(values, ring, per_node, 1)[0] for ring in inside)
    assert all((row == total).all() for row in values)
    assert hierarchical_time("all_reduce", size, n, per_node, IN, OUT) == pytest.approx(walked)
    # What it is for: the busiest port carries 2 (n - 1)/n S/m, in the flat ring 2 (N - 1)/N S.
    assert hierarchical_out == 2 * (nodes - 1) * size // n
    assert flat_out == 2 * (n - 1) * size // n


def test_the_faster_form_is_taken():
    outer = replace(OUT, bandwidth=1.0)
    nodes = Nodes(4, outer)
    assert time_over_nodes("all_reduce", 800, 4, IN, nodes, "two_shot") == (
        collective_time("all_reduce", 800, 4, IN, "two_shot"),
        "two_shot",
    )
    # Few bytes: few steps. Many: within and between nodes at once.
    for nbytes, name in ((8.0, "hierarchical"), (8e4, "rings")):
        seconds, how = time_over_nodes("all_gather", nbytes, 8, IN, nodes)
        assert how == name
        forms = (
            hierarchical_time("all_gather", nbytes, 8, 4, IN, outer),
            flat_time("all_gather", nbytes, 8, 4, IN, outer, ports=4),
        )
        assert seconds == min(forms)


def test_bus_bandwidth_of_four_nodes_is_near_the_published():
    """32 H100s, 8 a node, 3.2 Tb/s of InfiniBand a node: 331 GB/s (Voltage Park and AI @ Georgia
    Tech, repository aigatech/vpbenchmarking, NCCL 2.24). The wires' 50 GB/s a port are 400: a port
    really carries 46 to 48 (NVIDIA in nccl-tests #290), and NCCL loses some; a quarter is the most
    that the model may be off."""
    size = 8 * 2**30
    link = LINKS["nccl_sm90"]
    seconds, how = time_over_nodes("all_reduce", size, 32, link, Nodes(8), "pipelined")
    assert how == "rings"
    assert terms("all_reduce", size, 32)[1] / seconds == pytest.approx(331e9, rel=0.25)


@pytest.mark.parametrize("tp", [4, 64])
def test_the_floor_is_that_of_every_layer(tp):
    parallel, rule = layout_for(FLASH, tp), Rule(factor=1.5, chip=CHIPS["h200_datasheet"])
    assert parallel.attention == ("dp" if tp == 64 else "tp")
    sequences = 64 if tp == 64 else 2
    expected = sum(
        sub.floor(rule.chip)
        for layer in range(45)
        for sub in layer_roofline(FLASH, layer, parallel, 16384, 16384 // sequences, sequences)
        if sub.name not in ("norms", "residual adds")
    )
    step = scaled_step(FLASH, "deferred", 16384, tp, rule)
    assert step.compute == pytest.approx(1.5 * expected)
    assert (step.nodes, step.parallel) == (max(1, tp // 8), parallel)
    uneven = scaled_step(FLASH, "deferred", 16384, tp, replace(rule, imbalance=2.0))
    assert uneven.compute > step.compute
    assert uneven.communication == step.communication


def test_the_rule_gives_back_what_was_recorded_and_the_prediction_of_eight():
    machine = Machine(LINKS["nccl_sm90"], "pipelined", launch=0.0, nodes=Nodes(8))
    rule = rule_of(FLASH, COMPUTE, CHIPS["h100"], machine)
    assert rule.factor > 1
    for variant in ("three_all_reduces", "deferred"):
        step = scaled_step(FLASH, variant, 16384, 8, rule)
        eight = predict(FLASH, variant, COMPUTE, Assumptions())
        assert step.communication == pytest.approx(eight.communication)
    assert step.compute + step.passes == pytest.approx(COMPUTE.seconds)
    assert step.tokens_per_gpu_second == pytest.approx(eight.tokens_per_second / 8)
    with pytest.raises(sm.ConfigError, match="adds and norms take"):
        rule_of(FLASH, Compute(0.001, 0.001, 0.001, ""), CHIPS["h100"])
    fast = CHIPS["h200_datasheet"]
    assert rule_of(FLASH, COMPUTE, fast).machine.memory_bandwidth == fast.bandwidth


def test_one_group_of_experts_is_even():
    uneven = Rule(imbalance=3.0)
    assert layout_for(FLASH, 2).ep == 1
    for variant in sm.VARIANTS:
        assert scaled_step(FLASH, variant, 64, 2, uneven) == scaled_step(FLASH, variant, 64, 2)


def test_weights_are_those_recorded():
    recorded = load("notebooks/results/h100_prefill.json")["weights"].iloc[0]
    # The library fills the merged projections up to a multiple of 8 rows: 2e-4.
    held = weight_bytes(FLASH, layout_for(FLASH, 8), torch.bfloat16)
    assert held == pytest.approx(recorded, rel=1e-3)


def test_where_variants_pay():
    steps = scale(FLASH, (64, 2048, 4096), (2, 8, 16, 64))
    saved = gains(steps)
    seconds = {(s.variant, s.tokens, s.parallel.tp): s.seconds for s in steps}
    assert saved["fused", 64, 8] == pytest.approx(
        1 - seconds["fused", 64, 8] / seconds["deferred", 64, 8]
    )
    assert all(saved["deferred", n, tp] > 0 for n in (64, 4096) for tp in (2, 8, 16, 64))
    assert saved["deferred", 4096, 8] > 2 * saved["deferred", 4096, 2]
    # sglang's gate ends at 2048 tokens, and fused kernels at the node.
    assert saved["fused", 2048, 8] > 0.05
    for tokens, tp in ((4096, 8), (64, 16), (64, 64)):
        assert saved["fused", tokens, tp] == pytest.approx(0, abs=1e-9)
    # Where attention needs no sum, the halves around the MoE are half of the bytes.
    assert saved["reduce_scatter", 64, 64] > 0.1 > saved["reduce_scatter", 64, 16]


def test_rows_of_a_group_are_those_the_library_computes():
    """Routing of a tiny model, its rows counted by the experts of every rank."""
    ids = torch.randint(TINY.vocab_size, (3, 37))
    model = sm.Step3p5ForCausalLM.from_config(TINY)
    chosen = []
    for layer in model.model.decoder_layers:
        if layer.is_moe:
            layer.moe.gate.register_forward_hook(lambda *args: chosen.append(args[-1][0]))
    counter = RouterLoad(model)
    model(ids)
    loads = [load for _, load in sorted(counter.take().items())]
    assert len(chosen) == len(loads) == 4
    for topk_ids, counts in zip(chosen, loads, strict=True):
        for ep in (1, 2, 4):
            each = TINY.num_experts // ep
            rows = [int(sort_by_expert(topk_ids, g * each, each).ends[-1]) for g in range(ep)]
            assert group_rows(counts, ep).tolist() == rows


def test_drawn_routing_is_like_the_library_s():
    """As uneven as the layers of random tiny models, with biases as drawn and without."""
    config = TINY.replace(vocab_size=8192)  # hardly a token twice: hidden states of their own
    found = {"skewed": [], "uniform": []}
    for seed in range(2):
        model = sm.Step3p5ForCausalLM.from_config(config, seed=seed)
        for routing, values in found.items():
            if routing == "uniform":
                for name, parameter in model.named_parameters():
                    if name.endswith("router_bias"):
                        parameter.data.mul_(0.01)
            counter = RouterLoad(model)
            model(torch.randint(config.vocab_size, (64, 16)))
            counter.close()
            values += [imbalance(load) for load in counter.take().values()]
    generator = torch.Generator().manual_seed(0)
    drawn = {
        routing: np.mean(
            [imbalance(draw_load(config, 1024, routing, generator)) for _ in range(99)]
        )
        for routing in found
    }
    # One layer scatters by 0.33, so the mean of 8 by 0.12; three times that.
    assert np.mean(found["skewed"]) == pytest.approx(drawn["skewed"], abs=0.36)
    # Hidden states of one model have something in common: a little less even than independent ones.
    assert 0 < np.mean(found["uniform"]) - drawn["uniform"] < 0.25


def test_drawn_routing_is_as_skewed_as_recorded():
    recorded = load("notebooks/results/h100_prefill_skewed.json").attrs["routing"]["busiest"]
    generator = torch.Generator().manual_seed(0)
    busiest = np.mean([imbalance(draw_load(FLASH, 4096, "skewed", generator)) for _ in range(6)])
    # A layer's busiest expert scatters by 1.5 about 10: six of them by 0.6; three times that.
    assert busiest == pytest.approx(recorded, abs=1.8)


def test_imbalance_grows_with_groups_and_with_few_tokens():
    results = simulate_imbalance(TINY, (16, 1024), (1, 2, 8), draws=20)
    by = {(one.routing, one.tokens, one.ep): one.mean for one in results}
    assert len(results) == 2 * 2 * 3
    for routing in ("uniform", "skewed"):
        for tokens in (16, 1024):
            assert by[routing, tokens, 1] == 1
            assert 1 < by[routing, tokens, 2] < by[routing, tokens, 8]
    assert by["uniform", 16, 8] > by["uniform", 1024, 8]
    assert by["skewed", 1024, 8] > by["uniform", 1024, 8]
    assert all(one.low <= one.mean <= one.high for one in results if one.ep == 8)


def words(figure):
    texts = figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    return " ".join(text.get_text() for text in texts)


def test_pictures_say_what_is_predicted_and_simulated():
    pays = charts.where_it_pays(scale(FLASH, (64, 4096), (2, 16)))
    assert "Predicted" in words(pays)
    assert "2 nodes" in words(pays)
    steps = scale(FLASH, [4096], (2, 8, 16), variants=["deferred"])
    scaled = charts.scaled_steps(steps, "made up", steps, too_large=[2])
    for needed in ("Predicted", "modelled", "too large", "skewed", "made up"):
        assert needed in words(scaled)
    bars = scaled.axes[0].patches
    assert len(bars) == 3 * len(steps)
    for number, step in enumerate(steps):
        own = bars[number :: len(steps)]
        heights = [step.compute * 1e3, step.communication * 1e3, step.passes * 1e3]
        assert [bar.get_height() for bar in own] == pytest.approx(heights)
        assert own[-1].get_y() + own[-1].get_height() == pytest.approx(step.seconds * 1e3)
    simulated = charts.expert_imbalance(simulate_imbalance(TINY, [8, 64], (1, 2), draws=2))
    assert "Simulated" in words(simulated)
    for figure in (pays, scaled, simulated):
        check_legible(figure)


def test_sliders_move_the_scaled_step():
    explorer = ScalingExplorer(FLASH)
    assert "16384 tokens, tp=16 on 2 nodes" in explorer.summary()
    picture = explorer.picture.value
    for control, value in (
        (explorer.tokens, 1024),
        (explorer.between, 100.0),
        (explorer.imbalance, 2.0),
        (explorer.link, "pcie5"),
        (explorer.nodes, 8),
    ):
        control.value = value
        assert explorer.picture.value != picture, control.description
        picture = explorer.picture.value
    machine = explorer.setting.machine
    assert (machine.nodes.per_node, machine.link, machine.algorithm) == (2, LINKS["pcie5"], "ring")
    explorer.tp.value = 64
    assert "attention dp" in explorer.summary()
    explorer.tp.value = 2  # fewer ranks than nodes: one a node
    assert "2 nodes" in explorer.summary()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Nodes(0), "per_node=0"),
        (lambda: Nodes(8).count(12), "do not fill nodes of 8"),
        (lambda: flat_time("all_reduce", 1, 16, 8, IN, OUT, ports=9), "ports=9"),
        (lambda: Rule(factor=0), "factor=0"),
        (lambda: Rule(imbalance=0.9), "imbalance=0.9"),
        (lambda: scaled_step(FLASH, "ring", 1, 8), "'ring'"),
        (lambda: scaled_step(FLASH, "fused", 64, 7), "7"),
        (lambda: draw_load(TINY, 8, "even", torch.Generator()), "routing='even'"),
        (lambda: group_rows(torch.ones(16), 3), "ep=3 groups"),
        (lambda: simulate_imbalance(TINY, [8], [1], draws=0), "draws=0"),
        (lambda: charts.where_it_pays([]), "no saving"),
        (lambda: charts.scaled_steps(scale(TINY, [8, 16], [2]), ""), "of one variant"),
        (lambda: charts.expert_imbalance([]), "no simulation"),
        (
            lambda: charts.expert_imbalance(simulate_imbalance(TINY, [1, 2, 3, 4], [1], draws=1)),
            r"4 numbers of tokens \(\[4, 3, 2, 1\]\): the picture tells 3 apart",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(sm.ConfigError, match=message):
        call()


def test_scale_is_every_combination():
    steps = scale(TINY, (8, 16), (2, 4), variants=["deferred", "fused"])
    assert [(s.parallel.tp, s.tokens, s.variant) for s in steps] == [
        (tp, n, v) for tp in (2, 4) for n in (8, 16) for v in ("deferred", "fused")
    ]
    assert scaling.scaled_step(TINY, "fused", 16, 4) == steps[-1]
