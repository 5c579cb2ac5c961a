"""The exercises that communicate, on real ranks: solutions pass, usual mistakes get their hint."""

import pytest
import torch
import torch.nn.functional as F
from exercise_cells import all_exercises, defined

import stepmoe as sm
from stepmoe.exercises import (
    ExerciseError,
    bug_lab,
    deferred,
    fused,
    reduce_scatter,
    three_all_reduces,
)
from stepmoe.variants import DecoderLayer, DeferredLayer

EXERCISES = [each for each in all_exercises() if each.ranks]
TRAFFIC = {"routed_block": (1, 1.5), "moe_block": (1, 1.5), "FifthVariant": (2, 3.0)}


@pytest.mark.parametrize("each", EXERCISES, ids=lambda each: each.name)
def test_the_solution_passes(ranks4, each):
    score = each.check(defined(f"solutions/{each.notebook}", each.name), ranks4)
    assert score.lines <= each.lines
    if each.name in TRAFFIC:
        assert (score.traffic.collectives, score.traffic.sent) == TRAFFIC[each.name]


def predict(config, tp, tokens, moe=3, dense=2, scale=None):
    num_moe = len(config.moe_layers)
    count = moe * num_moe + dense * (config.num_hidden_layers - num_moe)
    each = 2 * (tp - 1) / tp if scale is None else scale
    return count, count * each * tokens * config.hidden_size * 4


def three_in_every_layer(config, tp, tokens):
    return predict(config, tp, tokens, dense=3)


def the_tensor_once(config, tp, tokens):
    return predict(config, tp, tokens, scale=1)


def own_share_too(config, tp, tokens):
    return predict(config, tp, tokens, scale=2)


def once_round(config, tp, tokens):
    return predict(config, tp, tokens, scale=(tp - 1) / tp)


def all_ranks(config, tp, tokens):
    return predict(config, tp, tokens, scale=2 * (tp - 1))


def a_single_one(config, tp, tokens):
    count, sent = predict(config, tp, tokens)
    return count, sent / count


def one_token_more(config, tp, tokens):
    return predict(config, tp, tokens + 1)


def only_the_count(config, tp, tokens):
    return 14


def top_k_after(expert_outputs, weights, all_reduce):
    return (weights[..., None] * all_reduce(expert_outputs)).sum(1)


def one_by_one(expert_outputs, weights, all_reduce):
    by_expert = (weights[..., None] * expert_outputs).unbind(1)
    return sum(all_reduce(output) for output in by_expert)


def own_piece(expert_outputs, weights, all_reduce):
    return (weights[..., None] * expert_outputs).sum(1)


def no_weights(expert_outputs, weights, all_reduce):
    return all_reduce(expert_outputs.sum(1))


def residual_first(residual, shared, expert_outputs, weights, all_reduce):
    return all_reduce(residual + shared + (weights[..., None] * expert_outputs).sum(1))


def one_after_the_other(residual, shared, expert_outputs, weights, all_reduce):
    routed = (weights[..., None] * expert_outputs).sum(1)
    return residual + all_reduce(shared) + all_reduce(routed)


def no_sum(residual, shared, expert_outputs, weights, all_reduce):
    return residual + shared + (weights[..., None] * expert_outputs).sum(1)


def no_residual(residual, shared, expert_outputs, weights, all_reduce):
    return all_reduce(shared + (weights[..., None] * expert_outputs).sum(1))


def every_choice_sent(residual, shared, expert_outputs, weights, all_reduce):
    outputs = weights[..., None] * expert_outputs
    outputs[:, 0] += shared
    return residual + all_reduce(outputs).sum(1)


def not_padded(x, n, reduce_scatter, all_gather):
    return all_gather(reduce_scatter(x))


def not_cut_off(x, n, reduce_scatter, all_gather):
    return all_gather(reduce_scatter(F.pad(x, (0, 0, 0, -len(x) % n))))


def always_padded(x, n, reduce_scatter, all_gather):
    return all_gather(reduce_scatter(F.pad(x, (0, 0, 0, n - len(x) % n))))[: len(x)]


def only_one_half(x, n, reduce_scatter, all_gather):
    return reduce_scatter(F.pad(x, (0, 0, 0, -len(x) % n)))


def padded_in_front(x, n, reduce_scatter, all_gather):
    return all_gather(reduce_scatter(F.pad(x, (0, 0, -len(x) % n, 0))))[: len(x)]


def sent_for(rows, hidden_size, n):
    return 2 * (n - 1) / n * rows * hidden_size * 4


def no_padding(batch, length, hidden_size, n):
    return sent_for(batch * length, hidden_size, n)


def padded_tokens(batch, length, hidden_size, n):
    return sent_for(-(-batch * length // n) * n, hidden_size, n)


def two_whole_sums(batch, length, hidden_size, n):
    return 2 * sent_for(-(-batch // n) * n * length, hidden_size, n)


def in_bf16(batch, length, hidden_size, n):
    return sent_for(-(-batch // n) * n * length, hidden_size, n) / 2


def still_pending(comm, hidden_states, residual):
    sent = comm.replicated(hidden_states.tensor, "sent")  # not true: it is a partial sum
    return sent if residual is None else sent + residual


def residual_behind(comm, hidden_states, residual):
    return comm.all_reduce(hidden_states, "cut") if hidden_states.is_partial else hidden_states


def residual_in_the_sum(comm, hidden_states, residual):
    if residual is None:
        return hidden_states
    return comm.all_reduce(comm.partial(hidden_states.tensor + residual.tensor, "sum"), "cut")


def hidden_states_behind(comm, hidden_states, residual):
    return hidden_states if residual is None else residual


def added_while_pending(comm, hidden_states, residual):
    return hidden_states if residual is None else hidden_states + residual


def always_reduced(comm, hidden_states, residual):
    done = comm.all_reduce(hidden_states, "cut")
    return done if residual is None else done + residual


def embedding_doubled(comm, hidden_states, residual):
    if hidden_states.is_partial:
        hidden_states = comm.all_reduce(hidden_states, "cut")
    return hidden_states + (residual or hidden_states)


def two_tensors(comm, hidden_states, residual):
    return hidden_states, residual


def stays_away(can_fuse, all_reduce):
    if not can_fuse:
        return False
    return all_reduce(torch.ones(1)).item() > 0


def alone(can_fuse, all_reduce):
    all_reduce(torch.zeros(1))
    return can_fuse


def told(can_fuse, all_reduce):
    return True


def any_can(can_fuse, all_reduce):
    return all_reduce(torch.tensor([float(can_fuse)])).item() > 0


def asks_twice(can_fuse, all_reduce):
    cannot = torch.tensor(float(not can_fuse))
    return (all_reduce(cannot) + all_reduce(cannot)).item() == 0


def cries_wolf(ledger, config, tokens):
    return False


def lets_pass(ledger, config, tokens):
    return True


def counts(ledger, config, tokens):
    return ledger.counts() == {"all_reduce": 2 * config.num_hidden_layers}


def counts_and_groups(ledger, config, tokens):
    whole = all(entry.group_size == 4 for entry in ledger.entries)
    return counts(ledger, config, tokens) and whole


def totals(ledger, config, tokens):
    dtypes = {entry.dtype for entry in ledger.entries}
    return counts_and_groups(ledger, config, tokens) and dtypes == {torch.float32}


class Borrowed(DeferredLayer):
    def forward(self, hidden_states, residual, step):
        return super().forward(hidden_states, residual, step)


class DeferredAgain(DecoderLayer):
    def forward(self, hidden_states, residual, step):
        hidden_states, residual = self.add_norm(self.input_layernorm, hidden_states, residual)
        attn_output = self.comm.all_reduce(self.attention(hidden_states, step), "attention")
        norm = self.post_attention_layernorm
        hidden_states, residual = self.add_norm(norm, attn_output, residual)
        if not self.is_moe:
            return self.comm.all_reduce(self.dense_mlp(hidden_states, step), "mlp"), residual
        return self.end(self.shared_expert(hidden_states, step), hidden_states), residual

    def end(self, shared, hidden_states):
        return self.comm.all_reduce(shared + self.routed_experts(hidden_states), "mlp")


class ReducesApart(DecoderLayer):
    """Routed before shared: the steps of no other variant."""

    forward = DeferredAgain.forward

    def end(self, shared, hidden_states):
        routed = self.comm.all_reduce(self.routed_experts(hidden_states), "experts")
        return routed + self.comm.all_reduce(shared, "share_expert")


class ForgetsTheShared(DecoderLayer):
    forward = DeferredAgain.forward

    def end(self, shared, hidden_states):
        return self.comm.all_reduce(self.routed_experts(hidden_states), "mlp")


class LosesASum(DecoderLayer):
    forward = DeferredAgain.forward

    def end(self, shared, hidden_states):
        return shared + self.routed_experts(hidden_states)


class NoLayer:
    def forward(self, hidden_states, residual, step):
        return hidden_states, residual


WRONG = [
    (three_all_reduces.predict_ledger, only_the_count, "Return two numbers"),
    (three_all_reduces.predict_ledger, three_in_every_layer, "a dense one has"),
    (three_all_reduces.predict_ledger, the_tensor_once, "not the tensor once"),
    (three_all_reduces.predict_ledger, own_share_too, "the share that it sums itself"),
    (three_all_reduces.predict_ledger, once_round, "goes round the ring twice"),
    (three_all_reduces.predict_ledger, all_ranks, "the ledger is of one"),
    (three_all_reduces.predict_ledger, a_single_one, "a single all-reduce"),
    (three_all_reduces.predict_ledger, one_token_more, "whatever the sub-layer's inner size"),
    (three_all_reduces.routed_block, top_k_after, "it sends 3 x the bytes"),
    (three_all_reduces.routed_block, one_by_one, "Right, with 3 all-reduces"),
    (three_all_reduces.routed_block, own_piece, "Nothing was sent"),
    (three_all_reduces.routed_block, no_weights, "weight x expert output"),
    (deferred.moe_block, residual_first, "in it four times"),
    (deferred.moe_block, one_after_the_other, "Right, with 2 all-reduces"),
    (deferred.moe_block, no_sum, "Nothing was sent"),
    (deferred.moe_block, no_residual, r"Not residual \+ shared \+ routed"),
    (deferred.moe_block, every_choice_sent, "more than one row a token"),
    (reduce_scatter.all_reduce_in_halves, not_padded, "cannot deal 15 rows to 4 ranks"),
    (reduce_scatter.all_reduce_in_halves, not_cut_off, "15 rows went in and 16 came out"),
    (reduce_scatter.all_reduce_in_halves, always_padded, "8 rows were sent as 12"),
    (reduce_scatter.all_reduce_in_halves, only_one_half, "Two halves"),
    (reduce_scatter.all_reduce_in_halves, padded_in_front, "The sum of 15 rows is wrong"),
    (reduce_scatter.bytes_under_dp, no_padding, "fills up to the fullest one"),
    (reduce_scatter.bytes_under_dp, padded_tokens, "whole sequences"),
    (reduce_scatter.bytes_under_dp, two_whole_sums, "each half an all-reduce"),
    (reduce_scatter.bytes_under_dp, in_bf16, "for a MoE layer, you predict"),
    (fused.hand_over, two_tensors, "Return one Placed, not tuple"),
    (fused.hand_over, still_pending, "every rank sends something else"),
    (fused.hand_over, added_while_pending, "PlacementError: .*their sum has no meaning"),
    (fused.hand_over, always_reduced, "PlacementError: .*its sum is complete"),
    (fused.hand_over, residual_behind, "the residual stream stayed behind"),
    (fused.hand_over, residual_in_the_sum, "the residual is in it four times"),
    (fused.hand_over, hidden_states_behind, r"not residual \+ hidden_states"),
    (fused.hand_over, embedding_doubled, "Cut before layer 0: the logits"),
    (fused.agree, told, "Right by chance"),
    (fused.agree, alone, "ranks that disagree"),
    (fused.agree, any_can, "a rank that cannot would have to"),
    (fused.agree, asks_twice, "Right, with 2 messages"),
    (bug_lab.ledger_guard, cries_wolf, "It objects to a right pass"),
    (bug_lab.ledger_guard, lets_pass, "It lets dense_reduced_twice pass"),
    (bug_lab.ledger_guard, counts, "It lets wrong_group pass"),
    (bug_lab.ledger_guard, counts_and_groups, "It lets bf16_accumulation pass"),
    (bug_lab.ledger_guard, totals, "made twice in layer 0 and never in layer 1"),
    (reduce_scatter.FifthVariant, NoLayer, "a subclass of stepmoe.variants.DecoderLayer"),
    (reduce_scatter.FifthVariant, Borrowed, "It borrows from DeferredLayer"),
    (reduce_scatter.FifthVariant, DeferredAgain, "That is deferred"),
    (reduce_scatter.FifthVariant, ForgetsTheShared, "not the oracle's"),
    (reduce_scatter.FifthVariant, LosesASum, "PlacementError: layer 1, .* the norm needs"),
    (reduce_scatter.FifthVariant, ReducesApart, "added before they are reduced"),
    # The last: after a hang the ranks are new, and import everything again.
    (fused.agree, stays_away, "The ranks wait for each other"),
]


@pytest.mark.parametrize(
    ("judged", "attempt", "hint"), WRONG, ids=[attempt.__name__ for _, attempt, _ in WRONG]
)
def test_each_usual_mistake_gets_its_hint(ranks4, judged, attempt, hint):
    with pytest.raises(ExerciseError, match=hint):
        judged.check(attempt, ranks4)


def test_another_number_of_ranks_is_refused(ranks4, monkeypatch):
    monkeypatch.setattr(ranks4, "run", lambda *_: [2, 2])
    with pytest.raises(sm.ConfigError, match=r"judged on 4 ranks, got 2: use stepmoe\.Ranks\(4\)"):
        deferred.moe_block.check(no_sum, ranks4)
