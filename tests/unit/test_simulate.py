"""One rank alone: its arithmetic is a real rank's, and what it cannot know is as documented.

tests/ranks/test_simulated_ledger.py compares its ledger with a real rank's.
"""

from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file

import stepmoe as sm
from stepmoe.__main__ import main
from stepmoe.measure import compare_latency
from stepmoe.model.merged import published_views
from stepmoe.parallel import tensor_layouts

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
FLASH = sm.Step3p5Config.flash()


def alone(rank, tp=4, ep=2, attention="tp"):
    return sm.ParallelConfig(tp, ep, attention, simulate_rank=rank)


def test_the_shares_of_all_simulated_ranks_make_up_the_layer():
    config = sm.Step3p5Config.from_pretrained(TINY)
    weights = load_file(TINY / "model.safetensors")
    ids = torch.randint(config.vocab_size, (3, 7))
    expected = oracle.forward(config, weights, ids)
    prefix = "model.layers.2."
    own = {n.removeprefix(prefix): w.double() for n, w in weights.items() if n.startswith(prefix)}
    x = torch.randn(21, config.hidden_size, dtype=torch.float64)
    attn_output, moe_output = torch.zeros(3, 7, config.hidden_size), torch.zeros(21, 64)
    for rank in range(4):
        model = sm.Step3p5ForCausalLM.from_pretrained(
            TINY, parallel=alone(rank), dtype=torch.float64
        )
        capture = sm.Capture(0)
        assert model(ids, capture=capture).isfinite().all()
        attn_output = attn_output + capture[0]["attn_output"]
        layer = model.model.layers[2]
        moe_output = moe_output + layer.moe(x) + layer.share_expert(x)
    # float64: 1e-9 is rounding with room; a missing or doubled share is off by a quarter.
    close = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(attn_output, expected["0.attn_output"], **close)
    torch.testing.assert_close(moe_output, oracle.moe(config, config.layer(2), own, x), **close)


def test_collectives_keep_this_rank_s_part_and_say_so():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY, parallel=alone(2))
    comm, x = model.comm, torch.randn(6, 64)
    with sm.Ledger() as ledger:
        total = comm.all_reduce(comm.partial(x.clone(), "x"), "here").tensor
        shard = comm.reduce_scatter(comm.partial(x, "x"), 2, "here")  # 6 tokens in 4 x 2 rows
        whole = comm.all_gather(comm.sharded(x[:2], 7, "x"), "here").tensor
        normed, _ = comm.all_reduce_add_rms_norm(
            comm.partial(x, "x"), comm.replicated(x, "x"), torch.zeros(64), 1e-5, "here"
        )
    assert torch.equal(total, x)
    assert torch.equal(shard.tensor, x[4:6])
    # The others' tokens are its own with the signs of about half of the features turned.
    assert torch.equal(whole[4:6], x[:2])
    for rank, others in zip((0, 1, 3), (whole[:2], whole[2:4], whole[6:]), strict=True):
        assert torch.equal(others.abs(), x[: len(others)].abs())
        turned = others != x[: len(others)]
        assert (turned == turned[0]).all()
        assert 16 < turned[0].sum() < 48, rank
    assert len(whole.abs().unique(dim=0)) == 2
    assert len(whole.unique(dim=0)) == 7
    torch.testing.assert_close(normed.tensor, oracle.norm(2 * x, torch.zeros(64), 1e-5))
    assert {entry.implementation for entry in ledger.entries} == {"simulated"}
    assert "rank 2 of 4 runs alone and nothing was sent" in str(ledger)


def test_placement_is_checked_as_on_a_real_rank():
    model = sm.Step3p5ForCausalLM.from_pretrained(TINY, parallel=alone(0))
    with pytest.raises(sm.PlacementError, match="multiply it by 4"):
        model.comm.all_reduce(model.comm.replicated(torch.randn(2, 64), "x"), "here")


def test_random_weights_of_one_rank_at_the_published_shape():
    """Drawn slice by slice: no tensor of the whole model, which has 6 GB in one layer's experts."""
    config = FLASH.with_layers(4).replace(vocab_size=64, num_experts=16)

    def state(rank, seed):
        parallel = alone(rank, 8, 4)
        model = sm.Step3p5ForCausalLM.from_config(
            config, parallel=parallel, dtype=torch.bfloat16, seed=seed
        )
        return published_views(model)

    first, again, other = state(5, 0), state(5, 0), state(5, 1)
    peer = state(6, 0)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        wide = tensor.float()
        assert (wide == 0).float().mean() < 1e-3, name
        fan_in = config.hidden_size
        if "o_proj" in name:
            fan_in = 64 * 128
        elif "moe.down" in name or "share_expert.down" in name:
            fan_in = 1280
        scale = 0.1 if wide.dim() == 1 else 1.0 if "embed" in name else fan_in**-0.5
        # The shortest vector has 16 entries: its deviation is within 60 % of the true one.
        spread = wide.std().item() / scale
        assert 0.4 < spread < 1.6 if wide.numel() < 1000 else 0.95 < spread < 1.05, name
    parallel = sm.ParallelConfig(8, 4)
    for name, layout in tensor_layouts(config, parallel, 5).items():
        same_slice = layout.slices == tensor_layouts(config, parallel, 6)[name].slices
        assert torch.equal(first[name], peer[name]) == same_slice, name


def test_layers_may_be_chosen():
    chosen = FLASH.with_layers(0, 4, 44)
    for new, old in enumerate((0, 4, 44)):
        before, after = FLASH.layer(old), chosen.layer(new)
        assert before == after.__class__(**{**vars(after), "index": old})
    with pytest.raises(sm.ConfigError, match="layer 45 does not exist"):
        FLASH.with_layers(45)
    with pytest.raises(sm.ConfigError, match=r"num_hidden_layers must be .* got 0"):
        FLASH.with_layers()


@pytest.mark.parametrize("rank", [-1, 8, 1.0, True, "0"])
def test_bad_ranks_are_named(rank):
    with pytest.raises(sm.ConfigError, match=rf"from 0 to 7, got {rank!r}"):
        sm.ParallelConfig(8, 4, simulate_rank=rank)


def test_latency_of_a_simulated_rank_needs_no_other():
    frame = compare_latency(
        sm.Step3p5Config.tiny().with_layers(1),
        ["deferred", "reduce_scatter"],
        [8],
        parallel=alone(1),
        phases=["decode"],
        repeats=6,
        warmup=1,
    )
    counts = dict(zip(frame["variant"], frame["counts"], strict=True))
    assert counts == {
        "deferred": {"all_reduce": 2},
        "reduce_scatter": {"all_gather": 3, "reduce_scatter": 2},
    }
    assert (frame["compute"] > 0).all()
    assert (frame["bytes_sent"] > 0).all()
    assert frame.attrs["parallel"]["simulate_rank"] == 1


def test_bench_of_a_simulated_rank(capsys):
    command = "bench --tp 8 --ep 4 --simulate-rank 7 --layers 4 --tokens 2 --repeats 6 --warmup 1"
    assert main([*command.split(), "--phase", "prefill", "--device", "cpu"]) == 0
    assert "fused" in capsys.readouterr().out
    assert main(["bench", "--tp", "2", "--simulate-rank", "2"]) == 2
    assert "from 0 to 1, got 2" in capsys.readouterr().err
