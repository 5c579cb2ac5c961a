"""Who holds what: the slices of all ranks make up every tensor, and bad layouts are named."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import configs

import stepmoe as sm
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import RankGroup
from stepmoe.model.merged import published_views
from stepmoe.parallel import tensor_layouts
from stepmoe.stack import DecoderStack
from stepmoe.variants import layer_class


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_ranks_cover_every_tensor_evenly(data):
    tp = data.draw(st.sampled_from([1, 2, 4, 8]))
    config = data.draw(configs(tp))
    ep = data.draw(st.sampled_from([e for e in (1, 2, 4, 8) if e <= tp]))
    parallel = sm.ParallelConfig(tp, ep, data.draw(st.sampled_from(["tp", "dp"])))
    held: dict[str, torch.Tensor] = {}
    for rank in range(tp):
        for name, layout in tensor_layouts(config, parallel, rank).items():
            count = held.setdefault(name, torch.zeros(layout.shape))
            count[layout.slices] += 1
            assert count[layout.slices].shape == layout.local_shape
    for name, count in held.items():
        # Everything is held, and by equally many ranks: once where cut, tp times where replicated.
        assert count.min() == count.max() >= 1, name
        if "experts" in name or ".mlp." in name:
            assert count.max() == 1, name


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_merged_weights_show_every_published_tensor_of_the_rank(data):
    """Each number of each parameter belongs to one published tensor; a merged one is filled up."""
    tp = data.draw(st.sampled_from([1, 2, 4]))
    config, variant = data.draw(configs(tp)), data.draw(st.sampled_from(sm.VARIANTS))
    parallel = sm.ParallelConfig(tp, data.draw(st.sampled_from([e for e in (1, 2, 4) if e <= tp])))
    rank = data.draw(st.integers(0, tp - 1))
    comm = Communicator(RankGroup("tp", tuple(range(tp)), rank, None))
    stack = DecoderStack(config, parallel, layer_class(variant), comm)
    views = published_views(stack)
    layouts = tensor_layouts(config, parallel, rank)
    layouts.pop("lm_head.weight")
    assert {f"model.{name}": tuple(view.shape) for name, view in views.items()} == {
        name: layout.local_shape for name, layout in layouts.items()
    }
    for parameter in stack.parameters():
        parameter.data.zero_()
    for view in views.values():
        view += 1
    for name, parameter in stack.named_parameters():
        # Behind the parts of a merged weight stand less than 8 rows of zeros.
        is_matrix = parameter.dim() == 2
        kept = parameter[: int(parameter.any(dim=-1).sum())] if is_matrix else parameter
        assert kept.eq(1).all(), name
        assert len(parameter) - len(kept) < 8, name


def test_layout_of_the_published_launch():
    """--tp 8 --ep 4: 72 experts a rank in two halves of their intermediate size."""
    flash, parallel = sm.Step3p5Config.flash(), sm.ParallelConfig(tp=8, ep=4)
    up = tensor_layouts(flash, parallel, 5)["model.layers.7.moe.up_proj.weight"]
    assert up.slices == (slice(144, 216), slice(640, 1280), slice(0, 4096))
    down = tensor_layouts(flash, parallel, 4)["model.layers.7.moe.down_proj.weight"]
    assert down.slices == (slice(144, 216), slice(0, 4096), slice(0, 640))
    query = tensor_layouts(flash, parallel, 5)["model.layers.7.self_attn.q_proj.weight"]
    assert query.slices[0] == slice(5 * 12 * 128, 6 * 12 * 128)


def test_key_value_heads_are_replicated_when_there_are_fewer_than_ranks():
    config, parallel = sm.Step3p5Config.tiny(), sm.ParallelConfig(tp=8)
    held = [
        tensor_layouts(config, parallel, rank)["model.layers.0.self_attn.k_proj.weight"].slices[0]
        for rank in range(8)
    ]
    assert [part.start // 16 for part in held] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(part.stop - part.start == 16 for part in held)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp": 4, "ep": 3}, "ep=3 does not divide tp=4"),
        ({"tp": 0}, "tp must be a whole number of at least 1, got 0"),
        ({"tp": 2.0}, "got 2.0"),
        ({"tp": 2, "ep": -1}, "ep must be a whole number of at least 1, got -1"),
        ({"attention": "data"}, "got 'data'"),
    ],
)
def test_impossible_layouts(arguments, message):
    with pytest.raises(sm.ConfigError, match=message):
        sm.ParallelConfig(**arguments)


def test_any_kind_of_integer_is_a_whole_number():
    """np.int64(2) was refused, and what it compares equal to accepted."""
    parallel = sm.ParallelConfig(tp=np.int64(4), ep=np.uint8(2), simulate_rank=torch.tensor(3))
    assert parallel == sm.ParallelConfig(4, 2, simulate_rank=3)
    assert {type(n) for n in (parallel.tp, parallel.ep, parallel.simulate_rank)} == {int}
    for other in (True, np.bool_(True), np.float64(2), "2", None, np.array([2, 2])):
        with pytest.raises(sm.ConfigError, match="tp must be a whole number"):
            sm.ParallelConfig(tp=other)


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({}, sm.ParallelConfig(tp=3), "16 query heads of the full layers .* tp=3"),
        (
            {"num_attention_heads_sliding": 12},
            sm.ParallelConfig(tp=8),
            "12 query heads of the sliding",
        ),
        ({"intermediate_size": 100}, sm.ParallelConfig(tp=8), "intermediate_size=100 .* tp=8"),
        ({"num_experts": 6}, sm.ParallelConfig(tp=4, ep=4), "num_experts=6 .* ep=4"),
        ({"moe_intermediate_size": 6}, sm.ParallelConfig(tp=8, ep=2), "6 cannot be cut tp/ep=4"),
        ({"share_expert_dim": 6}, sm.ParallelConfig(tp=4), "share_expert_dim=6"),
        (
            {"num_key_value_heads": 3, "num_attention_heads": 24},
            sm.ParallelConfig(tp=2),
            "3 key-value heads",
        ),
    ],
)
def test_shapes_that_cannot_be_cut(changes, parallel, message):
    config = sm.Step3p5Config.tiny().replace(**changes)
    with pytest.raises(sm.ConfigError, match=message):
        parallel.check(config)


def test_heads_need_not_divide_under_data_parallel_attention():
    config = sm.Step3p5Config.tiny().replace(num_attention_heads_sliding=12)
    sm.ParallelConfig(tp=8, attention="dp").check(config)


def test_a_model_that_needs_ranks_says_so_before_anything_waits():
    with pytest.raises(sm.ConfigError, match=r"tp=4 needs a multiple of 4 ranks, this job has 1"):
        sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), parallel=sm.ParallelConfig(tp=4))


def test_rows_that_grouped_mm_cannot_take_are_named():
    config = sm.Step3p5Config.tiny().replace(moe_intermediate_size=12)
    with pytest.raises(sm.ConfigError, match=r"moe_intermediate_size .* = 12 in torch.bfloat16"):
        sm.Step3p5ForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_unknown_variant_is_named():
    with pytest.raises(
        sm.ConfigError, match="'two_all_reduces' is not known: use one of three_all"
    ):
        sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant="two_all_reduces")
