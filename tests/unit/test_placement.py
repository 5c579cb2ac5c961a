"""Wrong sums cannot pass: each raises before anything is sent, naming layer, tensor and group.

The groups here have no process group: a check that came after the communication would crash.
"""

import time

import pytest
import torch

import stepmoe as sm
from stepmoe.comm.communicator import Communicator
from stepmoe.comm.groups import RankGroup
from stepmoe.variants.deferred import DeferredLayer
from stepmoe.variants.fused import FusedLayer

TP = Communicator(RankGroup("tp", (0, 1, 2, 3)))
MOE_TP = Communicator(RankGroup("moe_tp", (0, 1)))


@pytest.fixture
def x():
    return torch.randn(6, 8)


def test_reducing_what_is_complete(x):
    whole = TP.replicated(x, "mlp_output", layer=2)
    for reduce in (
        lambda: TP.all_reduce(whole, "mlp"),
        lambda: TP.reduce_scatter(whole, 2, "mlp"),
        lambda: TP.all_reduce_add_rms_norm(whole, whole, torch.zeros(8), 1e-5, "norm"),
    ):
        with pytest.raises(
            sm.PlacementError, match=r"layer 2, mlp_output is Replicate .* multiply it by 4"
        ):
            reduce()


def test_reducing_over_the_wrong_group(x):
    routed = TP.partial(x, "experts_output", layer=3)
    expected = (
        r"layer 3, experts_output is Partial over tp \(ranks 0, 1, 2, 3\).*moe_tp \(ranks 0, 1\)"
    )
    with pytest.raises(sm.PlacementError, match=expected):
        MOE_TP.all_reduce(routed, "experts")
    with pytest.raises(sm.PlacementError, match=expected):
        MOE_TP.reduce_scatter(routed, 3, "experts")


def test_a_nonlinear_operation_on_a_pending_sum(x):
    pending = TP.partial(x, "attn_output", layer=1)
    with pytest.raises(
        sm.PlacementError, match="layer 1, attn_output: the norm needs the complete"
    ):
        pending.complete("the norm")
    with pytest.raises(sm.PlacementError, match="all_gather needs the complete"):
        TP.all_gather(pending, "mlp_input")


def test_adding_a_complete_value_to_a_pending_sum(x):
    pending, whole = TP.partial(x, "attn_output", 1), TP.replicated(x, "residual", 1)
    with pytest.raises(sm.PlacementError, match="counted 4 times"):
        pending + whole
    with pytest.raises(sm.PlacementError, match="has no meaning"):
        pending + MOE_TP.partial(x, "experts_output", 1)
    assert (pending + TP.partial(x, "more", 1)).is_partial


def test_gathering_what_every_rank_holds(x):
    with pytest.raises(sm.PlacementError, match="repeat every token 4 times"):
        TP.all_gather(TP.replicated(x, "hidden_states", 0), "mlp_input")


def test_a_sharded_tensor_where_every_token_is_needed(x):
    with pytest.raises(sm.PlacementError, match="attention needs every token"):
        TP.sharded(x, 24, "hidden_states", 0).replicated("attention")


def test_reducing_the_same_partial_sum_twice(x):
    alone = Communicator(RankGroup("tp", (0,)))
    pending = alone.partial(x, "attn_output", layer=1)
    alone.all_reduce(pending, "o_proj")
    with pytest.raises(
        sm.PlacementError, match="attn_output: all_reduce of a partial sum that was already"
    ):
        alone.all_reduce(pending, "o_proj")
    with pytest.raises(sm.PlacementError, match="already reduced"):
        pending + alone.partial(x, "more", 1)


def test_a_second_name_of_a_reduced_sum_is_no_second_sum(x):
    """`with_` made a description that knew nothing of the reduction: the sum was counted twice."""
    alone = Communicator(RankGroup("tp", (0,)))
    pending = alone.partial(x, "attn_output", layer=1)
    alias = pending.with_(x, name="alias")
    alone.all_reduce(pending, "o_proj")
    for use in (lambda: alone.all_reduce(alias, "o_proj"), lambda: alone.partial(x, "y") + alias):
        with pytest.raises(sm.PlacementError, match=r"alias: .* already reduced"):
            use()
    alone.all_reduce(pending.with_(x.clone()), "another value")
    taken = alone.partial(x, "shared", layer=1)
    alias = taken.with_(taken.tensor)
    taken.take_over()
    with pytest.raises(sm.PlacementError, match="an addition before has taken over"):
        alone.all_reduce(alias, "mlp")


def test_why_two_placements_do_not_add_up(x):
    whole, own = TP.replicated(x, "residual", 1), TP.sharded(x, 24, "hidden_states", 1)
    with pytest.raises(sm.PlacementError, match=r"every token .* all_gather that one"):
        whole + own
    with pytest.raises(sm.PlacementError, match="Complete each over its own group"):
        TP.partial(x, "attn_output", 1) + MOE_TP.partial(x, "experts_output", 1)


def test_too_few_rows_for_the_tokens_are_counted(x):
    """It was "6 tokens do not fit in 4", without a name."""
    wanted = "mlp_output: reduce_scatter of 6 tokens over 4 ranks .*=1: give at least 2"
    with pytest.raises(sm.ConfigError, match=wanted):
        TP.reduce_scatter(TP.partial(x, "mlp_output", 2), 1, "mlp")
    with pytest.raises(sm.ConfigError, match="keep_own_tokens of 6 tokens"):
        TP.keep_own_tokens(TP.replicated(x, "embed_tokens"), 1)


class LosesTheResidualLayer(DeferredLayer):
    """Its residual is forgotten; the next layer would have started a new one."""

    def forward(self, hidden_states, residual, step):
        return super().forward(hidden_states, residual, step)[0], None


def test_a_layer_that_returns_no_residual():
    model = sm.Step3p5ForCausalLM.from_config(
        sm.Step3p5Config.tiny(), variant=LosesTheResidualLayer
    )
    with pytest.raises(
        sm.PlacementError, match=r"layer 0, residual: LosesTheResidualLayer.forward"
    ):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_using_again_what_an_addition_has_taken_over(x):
    taken = TP.replicated(x, "residual", layer=1)
    assert taken.take_over() is x
    with pytest.raises(sm.PlacementError, match="layer 1, residual: reading of a value that an"):
        taken.tensor  # noqa: B018
    with pytest.raises(sm.PlacementError, match="Use what that addition returned"):
        taken + TP.replicated(x, "more", 1)


class OldResidualLayer(DeferredLayer):
    """Adds the MLP's output to the residual that attention was added to already."""

    def forward(self, hidden_states, residual, step):
        kept = residual
        hidden_states, residual = super().forward(hidden_states, residual, step)
        return hidden_states, residual if kept is None else kept + residual


def test_a_residual_used_after_the_norm_that_took_it_over():
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant=OldResidualLayer)
    with pytest.raises(sm.PlacementError, match="layer 0, residual: the sum of a value that an"):
        model(torch.zeros(1, 3, dtype=torch.int64))


class SharedTwiceLayer(DeferredLayer):
    """Adds the shared expert to the routed ones, and once more."""

    def routed_experts(self, hidden_states, onto=None):
        return super().routed_experts(hidden_states, onto) + onto


def test_a_shared_expert_added_twice():
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant=SharedTwiceLayer)
    with pytest.raises(sm.PlacementError, match="layer 1, share_expert_output: the sum of a value"):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_routed_experts_are_added_to_a_partial_sum_only():
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny())
    layer, x = model.model.decoder_layers[1], torch.randn(3, 64)
    whole = model.comm.replicated(x, "mlp_input", 1)
    with pytest.raises(sm.PlacementError, match="counted 1 times"):
        layer.routed_experts(whole, onto=whole)


class ForgetfulLayer(FusedLayer):
    """Loses the last pending sum, as at a pipeline boundary."""

    def flush(self, hidden_states):
        return hidden_states


def test_a_pending_sum_forgotten_at_the_end_of_the_stack():
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant=ForgetfulLayer)
    with pytest.raises(
        sm.PlacementError, match=r"layer 4, share_expert_output \+ experts_output: the norm"
    ):
        model(torch.zeros(1, 3, dtype=torch.int64))


class DoubleReduceLayer(FusedLayer):
    """The published change's own bug: a dense layer whose MLP output was reduced already."""

    def dense_mlp(self, hidden_states, step):
        return self.comm.all_reduce(super().dense_mlp(hidden_states, step), "mlp")


def test_a_dense_layer_reduced_twice():
    model = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant=DoubleReduceLayer)
    with pytest.raises(sm.PlacementError, match=r"layer 0, mlp_output is Replicate"):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_the_check_takes_no_measurable_time(x):
    """One layer makes about 15 of these steps; 10 microseconds each would be 0.15 ms.

    Processor time, and the best of several rounds: what other processes do is not measured.
    """
    steps, taken = 1200, []
    for _ in range(5):
        start = time.process_time()
        for _ in range(steps // 3):
            placed = TP.partial(x, "attn_output", 1).with_(x, name="other").unspent("a step")
            TP._expect_partial(placed, "all_reduce")
        taken.append((time.process_time() - start) / steps)
    assert min(taken) < 1e-5, f"{min(taken) * 1e6:.1f} us a step"
