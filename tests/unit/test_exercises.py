"""The exercises that need no ranks, and what all of them have in common."""

import math
import re

import pytest
import torch
from exercise_cells import all_exercises, cells, defined

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError, RankError, RankTimeout
from stepmoe.exercises import (
    ExerciseError,
    Score,
    Traffic,
    accuracy,
    bug_lab,
    deferred,
    eight_gpus,
    fused,
    latency,
    one_layer,
)
from stepmoe.exercises.exercise import call_on
from stepmoe.exercises.source import code_lines, is_stub
from stepmoe.parallel import ParallelConfig
from stepmoe.roofline import Chip, layer_roofline

EXERCISES = all_exercises()
LESSONS = sorted({each.notebook for each in EXERCISES})


def named(each):
    return getattr(each, "name", None)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_has_two_or_three(lesson):
    assert 2 <= sum(each.notebook == lesson for each in EXERCISES) <= 3


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_ends_with_its_exercises(lesson):
    assert any(cell.source.startswith("## Exercises") for cell in cells(lesson))


@pytest.mark.parametrize("each", EXERCISES, ids=named)
def test_the_stub_is_refused_with_its_hint_and_the_text_states_the_budget(each):
    with pytest.raises(ExerciseError) as refused:
        each.check(defined(each.notebook, each.name))
    assert str(refused.value) == each.hint
    every = cells(each.notebook)
    (stub,) = [i for i, c in enumerate(every) if f"exercise.{each.name}.try_out(" in c.source]
    spec = " ".join(every[stub - 1].source.split())
    assert spec.startswith("### ")
    assert f"At most {each.lines} lines." in spec


@pytest.mark.parametrize("each", [e for e in EXERCISES if not e.ranks], ids=named)
def test_the_solution_passes(each):
    score = each.check(defined(f"solutions/{each.notebook}", each.name))
    assert score.lines <= each.lines
    assert (score.traffic is None) == (each is not eight_gpus.over_nodes)  # which counts its own


def rows_of_a(A, B, rank, n):
    return A.tensor_split(n, dim=0)[rank], B.tensor_split(n, dim=0)[rank]


def columns_of_b(A, B, rank, n):
    return A.tensor_split(n, dim=1)[rank], B.tensor_split(n, dim=1)[rank]


def other_rows(A, B, rank, n):
    return A.tensor_split(n, dim=1)[rank], B.tensor_split(n, dim=0)[n - 1 - rank]


def remainder_lost(A, B, rank, n):
    each = len(B) // n
    mine = slice(rank * each, (rank + 1) * each)
    return A[:, mine], B[mine]


def everything(A, B, rank, n):
    return A, B


def remainder_on_the_last(A, B, rank, n):
    each = len(B) // n
    mine = slice(rank * each, (rank + 1) * each if rank < n - 1 else None)
    return A[:, mine], B[mine]


def reversed_rows(A, B, rank, n):
    return A.tensor_split(n, dim=1)[rank], B.tensor_split(n, dim=0)[rank].flip(0)


def one_matrix(A, B, rank, n):
    return A.tensor_split(n, dim=1)[rank]


def dealt_round(rank, tp, ep, num_experts, size):
    group, place, experts = rank % ep, rank // ep, num_experts // ep
    rows = size * ep // tp
    first = group * experts
    return range(first, first + experts), range(place * rows, (place + 1) * rows)


def cut_by_all(rank, tp, ep, num_experts, size):
    group, experts, rows = rank // (tp // ep), num_experts // ep, size // tp
    first = group * experts
    return range(first, first + experts), range(rank * rows, (rank + 1) * rows)


def whole_experts(rank, tp, ep, num_experts, size):
    group, experts = rank // (tp // ep), num_experts // ep
    return range(group * experts, (group + 1) * experts), range(size)


def first_experts(rank, tp, ep, num_experts, size):
    return 0, size


def bias_everywhere(x, w, bias, rank, n):
    return x @ w + bias


def bias_nowhere(x, w, bias, rank, n):
    return x @ w


def bias_on_the_second(x, w, bias, rank, n):
    return x @ w + bias * (rank + 1)


def a_number(x, w, bias, rank, n):
    return 0.0


def same_direction(size):
    return torch.ones(size), 2 * torch.ones(size)


def opposite(size):
    return torch.ones(size), -torch.ones(size)


def too_small(size):
    return torch.ones(1), torch.ones(1)


def of_the_call(first, second, ranks):
    (size_1, time_1), (size_2, time_2) = first, second
    per_byte = (time_2 - time_1) / (size_2 - size_1)
    return time_1 - per_byte * size_1, 2 * (ranks - 1) / ranks / per_byte


def of_the_tensor(first, second, ranks):
    (size_1, time_1), (size_2, time_2) = first, second
    per_byte = (time_2 - time_1) / (size_2 - size_1)
    return (time_1 - per_byte * size_1) / (2 * (ranks - 1)), 1 / per_byte


def no_latency(first, second, ranks):
    return 0.0, second[0] / second[1]


def of_one_point(first, second, ranks):
    return second[1]


def half_the_bandwidth(first, second, ranks):
    latency, bandwidth = of_the_tensor(first, second, ranks)
    return latency, bandwidth * (ranks - 1) / ranks


def compute_bound(hidden, size, chip, operations=2, matrices=3, rows=2):
    gain = operations * matrices * size / 2 - chip.balance * rows
    return math.floor(chip.balance * matrices * size / gain) + 1 if gain > 0 else None


def multiplies_only(hidden, size, chip):
    return compute_bound(hidden, size, chip, operations=1)


def weights_only(hidden, size, chip):
    return compute_bound(hidden, size, chip, rows=0)


def one_of_three(hidden, size, chip):
    return compute_bound(hidden, size, chip, matrices=1)


def never_none(hidden, size, chip):
    return compute_bound(hidden, size, chip) or 10**6


def off_by_two(hidden, size, chip):
    return (compute_bound(hidden, size, chip) or 0) + 2


def pays_from(hidden, ranks, link, memory, launch, start):
    """The number the judge builds its constants around, from those constants."""
    saved = 2 * launch + 2 * (ranks - 2) * link.latency
    return round((start - saved) / (3 * hidden * 2 / memory) + 0.5)


def one_too_few(hidden, ranks, link, memory, launch, start, gate):
    return pays_from(hidden, ranks, link, memory, launch, start) - 1 or 1


def no_gate(hidden, ranks, link, memory, launch, start, gate):
    return pays_from(hidden, ranks, link, memory, launch, start)


def at_once(hidden, ranks, link, memory, launch, start, gate):
    return 1


def never(hidden, ranks, link, memory, launch, start, gate):
    return None


def weight_as_it_is(kernel, x, residual, weight, eps):
    return kernel(x, residual, weight.float(), eps)


def added_in_bf16(kernel, x, residual, weight, eps):
    return kernel(x, residual, 1 + weight, eps)


def no_residual(kernel, x, residual, weight, eps):
    return kernel(x, torch.zeros_like(x), 1 + weight.float(), eps)


def only_the_norm(kernel, x, residual, weight, eps):
    return kernel(x, residual, 1 + weight.float(), eps)[0]


def twice_as_large(kernel, x, residual, weight, eps):
    return kernel(x, residual, 2 + 2 * weight.float(), eps)


def questions(accuracy, difference, errors=1.96 + 0.84, runs=2):
    return runs * errors**2 * accuracy * (1 - accuracy) / difference**2


def one_run(accuracy, difference):
    return questions(accuracy, difference, runs=1)


def no_power(accuracy, difference):
    return questions(accuracy, difference, errors=1.96)


def neither(accuracy, difference):
    return questions(accuracy, difference, errors=1.96, runs=1)


def one_sided(accuracy, difference):
    return questions(accuracy, difference, errors=1.645 + 0.84)


def one_error(accuracy, difference):
    return questions(accuracy, difference, errors=1)


def a_word(*_):
    return "many"


def flips_of(first, second):
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = (pairs.count(flip) for flip in ((True, False), (False, True)))
    tail = math.fsum(
        math.comb(only_first + only_second, k) for k in range(min(only_first, only_second) + 1)
    )
    return tail / 2 ** (only_first + only_second), only_first, only_second


def one_tail(first, second):
    return flips_of(first, second)[0]


def twice_the_tail(first, second):
    return 2 * flips_of(first, second)[0]


def unpaired(first, second):
    return 0.2


def one_direction(alpha):
    return math.floor(math.log2(1 / alpha)) + 1


def a_hundred(alpha):
    return 100


def always_right(exact, found):
    return "right"


def to_the_bit(exact, found):
    return "right" if torch.equal(found[0].double(), exact) else "reduced twice"


def a_number_of_faults(exact, found):
    return 3


def of_exact_figures(before, after, unit, tokens, removed):
    return (removed / (tokens / before - tokens / after),) * 2


def of_ends(before, after, unit, tokens, removed, *, ends):
    return tuple(
        removed / (tokens / (before + b * unit) - tokens / (after + a * unit)) for b, a in ends
    )


def whole_units(*given):
    return of_ends(*given, ends=((-1, 1), (1, -1)))


def most_first(*given):
    return of_ends(*given, ends=((0.5, -0.5), (-0.5, 0.5)))


def ends_along(*given):
    return of_ends(*given, ends=((-0.5, -0.5), (0.5, 0.5)))


def of_the_difference(before, after, unit, tokens, removed):
    return removed / tokens * (after - before), removed / tokens * (after - before + unit)


def rows_by(group, ep):
    rows = torch.bincount(group.flatten(), minlength=ep)
    return int(rows.max()), float(rows.max() / rows.float().mean())


def of_an_expert(topk_ids, num_experts, tp, ep):
    return rows_by(topk_ids, num_experts)


def dealt_one_by_one(topk_ids, num_experts, tp, ep):
    return rows_by(topk_ids % ep, ep)


def dealt_to_tp(topk_ids, num_experts, tp, ep):
    return rows_by(topk_ids // (num_experts // tp), tp)


def tokens_not_choices(topk_ids, num_experts, tp, ep):
    group = topk_ids // (num_experts // ep)
    rows = [int((group == one).any(1).sum()) for one in range(ep)]
    return max(rows), max(rows) * ep / sum(rows)


def all_choices(topk_ids, num_experts, tp, ep):
    return topk_ids.numel() + 1, 1.0


def only_busy_groups(topk_ids, num_experts, tp, ep):
    group = topk_ids // (num_experts // ep)
    return rows_by(group.unique(return_inverse=True)[1], 1)


def over_the_tokens(topk_ids, num_experts, tp, ep):
    rows, _ = rows_by(topk_ids // (num_experts // ep), ep)
    return rows, rows / len(topk_ids)


def node_groups(nodes, per_node):
    ranks = list(range(nodes * per_node))
    within = [ranks[node * per_node :][:per_node] for node in range(nodes)]
    return ranks, within, [ranks[place::per_node] for place in range(per_node)]


def one_ring(values, nodes, per_node, reduce_scatter, all_reduce, all_gather):
    return all_reduce(values, [list(range(nodes * per_node))])


def whole_tensors_across(values, nodes, per_node, reduce_scatter, all_reduce, all_gather):
    _, within, across = node_groups(nodes, per_node)
    return all_reduce(all_reduce(values, across), within)


def nodes_apart(values, nodes, per_node, reduce_scatter, all_reduce, all_gather):
    return all_reduce(values, node_groups(nodes, per_node)[1])


def not_gathered(values, nodes, per_node, reduce_scatter, all_reduce, all_gather):
    _, within, across = node_groups(nodes, per_node)
    return all_reduce(reduce_scatter(values, within), across)


def summed_once_more(values, nodes, per_node, reduce_scatter, all_reduce, all_gather):
    ranks, within, _ = node_groups(nodes, per_node)
    return all_reduce(all_reduce(values, [ranks]), within)


def a_rank_left_out(values, nodes, per_node, reduce_scatter, all_reduce, all_gather):
    return all_reduce(values, [list(range(nodes * per_node - 1))])


def parts_swapped(values, nodes, per_node, reduce_scatter, all_reduce, all_gather):
    _, within, across = node_groups(nodes, per_node)
    parts = all_reduce(reduce_scatter(values, within), across)
    return all_gather(parts, [group[::-1] for group in within])


def fails(*_):
    raise ZeroDivisionError("division by zero")


WRONG = [
    (one_layer.columns_and_rows, one_matrix, "Return two matrices"),
    (one_layer.columns_and_rows, rows_of_a, "cut A by columns"),
    (one_layer.columns_and_rows, columns_of_b, "Cut B by rows"),
    (one_layer.columns_and_rows, remainder_lost, "nobody holds"),
    (one_layer.columns_and_rows, everything, "counts some of them twice"),
    (one_layer.columns_and_rows, remainder_on_the_last, "the fullest rank"),
    (one_layer.columns_and_rows, other_rows, "do not add up|more or fewer columns"),
    (one_layer.columns_and_rows, reversed_rows, "its own row of B"),
    (one_layer.columns_and_rows, fails, "It raised ZeroDivisionError: division by zero"),
    (one_layer.expert_slice, first_experts, "Return two ranges"),
    (one_layer.expert_slice, dealt_round, "share the first experts"),
    (one_layer.expert_slice, cut_by_all, "not by all tp"),
    (one_layer.expert_slice, whole_experts, "of each expert it holds rows"),
    (one_layer.row_product, a_number, "whole shape"),
    (one_layer.row_product, bias_everywhere, "the bias [4-7] times"),
    (one_layer.row_product, bias_nowhere, "no rank added it"),
    (one_layer.row_product, bias_on_the_second, "do not add up"),
    (deferred.counterexample, too_small, "two tensors of 2 entries"),
    (deferred.counterexample, same_direction, "c = 0.5 your colleague is right"),
    (deferred.counterexample, opposite, "zero or nearly"),
    (latency.fit_link, of_one_point, "Return latency and bandwidth"),
    (latency.fit_link, of_the_call, "the latency is of one"),
    (latency.fit_link, no_latency, "you say a latency is 0 s"),
    (latency.fit_link, of_the_tensor, r"A rank sends 2 \(n - 1\)/n of them"),
    (latency.fit_link, half_the_bandwidth, "the times were made with"),
    (latency.first_compute_bound, multiplies_only, "two operations"),
    (latency.first_compute_bound, weights_only, "What goes in and what comes out"),
    (latency.first_compute_bound, one_of_three, "three matrices"),
    (latency.first_compute_bound, never_none, "never reaches it"),
    (latency.first_compute_bound, off_by_two, "you say 3, it is 1"),
    (latency.first_that_pays, one_too_few, "still the slower one"),
    (latency.first_that_pays, no_gate, "the gate ends at 2048: None"),
    (latency.first_that_pays, at_once, "has to begin, too"),
    (latency.first_that_pays, never, "you say never"),
    (fused.gemma_from_plain, only_the_norm, "Return what the kernel returns"),
    (fused.gemma_from_plain, no_residual, r"The new residual is x \+ residual"),
    (fused.gemma_from_plain, weight_as_it_is, r"That is x / rms\(x\) \* weight"),
    (fused.gemma_from_plain, added_in_bf16, "rounded to bfloat16"),
    (fused.gemma_from_plain, twice_as_large, r"not x / rms\(x\) \* \(1 \+ weight\)"),
    (accuracy.questions_needed, a_word, "Return a number"),
    (accuracy.questions_needed, one_run, "About half"),
    (accuracy.questions_needed, no_power, "About half"),
    (accuracy.questions_needed, neither, "About a quarter"),
    (accuracy.questions_needed, one_sided, "one-sided"),
    (accuracy.questions_needed, one_error, "It takes"),
    (accuracy.mcnemar, a_word, "return a number"),
    (accuracy.mcnemar, one_tail, "the chance in one direction"),
    (accuracy.mcnemar, twice_the_tail, r"a probability of 1\."),
    (accuracy.mcnemar, unpaired, "Only the flips count: of 11 tosses"),
    (accuracy.fewest_flips, one_direction, "all heads"),
    (accuracy.fewest_flips, a_hundred, "you say 100, it is 6"),
    (bug_lab.name_the_fault, a_number_of_faults, "Return one of 'right'"),
    (bug_lab.name_the_fault, always_right, "you say 'right'"),
    (bug_lab.name_the_fault, to_the_bit, "[48] ranks, of which"),
    (eight_gpus.explained, a_word, "Return the least and the most share"),
    (eight_gpus.explained, of_exact_figures, "printed figures for exact"),
    (eight_gpus.explained, whole_units, "off by half a unit at most"),
    (eight_gpus.explained, most_first, "the least share first"),
    (eight_gpus.explained, ends_along, "Move their ends apart"),
    (eight_gpus.explained, of_the_difference, "the shares are"),
    (eight_gpus.busiest_rank, a_word, "Return the rows and the imbalance"),
    (eight_gpus.busiest_rank, of_an_expert, "that is the busiest expert"),
    (eight_gpus.busiest_rank, dealt_one_by_one, "dealt in blocks"),
    (eight_gpus.busiest_rank, dealt_to_tp, "not to tp ranks"),
    (eight_gpus.busiest_rank, tokens_not_choices, "two rows there"),
    (eight_gpus.busiest_rank, all_choices, r"has \d+ rows, you say"),
    (eight_gpus.busiest_rank, only_busy_groups, "a group got no row at all"),
    (eight_gpus.busiest_rank, over_the_tokens, "in the mean"),
    (eight_gpus.over_nodes, a_word, "return a list of 8 tensors"),
    (eight_gpus.over_nodes, one_ring, r"sends 1\.75 x the tensor .* 0\.25 will do"),
    (eight_gpus.over_nodes, whole_tensors_across, r"sends 1\.00 x the tensor"),
    (eight_gpus.over_nodes, nodes_apart, "The nodes never met"),
    (eight_gpus.over_nodes, not_gathered, "does not hold a tensor of"),
    (eight_gpus.over_nodes, summed_once_more, "holds the sum 4 times"),
    (eight_gpus.over_nodes, a_rank_left_out, "Every rank belongs to one group"),
    (eight_gpus.over_nodes, parts_swapped, "does not hold the sum of all"),
]


@pytest.mark.parametrize(
    ("judged", "attempt", "hint"), WRONG, ids=[attempt.__name__ for _, attempt, _ in WRONG]
)
def test_each_usual_mistake_gets_its_hint(judged, attempt, hint):
    with pytest.raises(ExerciseError, match=hint):
        judged.check(attempt)


def test_try_out_prints_what_check_says(capsys):
    one_layer.row_product.try_out(bias_nowhere)
    solution = defined("solutions/01_one_layer", "row_product")
    one_layer.row_product.try_out(solution)
    refused, solved = capsys.readouterr().out.splitlines()
    assert refused == "not solved yet. The bias is missing: no rank added it."
    assert solved == "solved: 1 line of at most 2"


def test_a_score_says_what_was_sent():
    assert str(Score(2, 3, Traffic(1, 1.5))) == (
        "solved: 2 lines of at most 3; 1 collective, a rank sends 1.5 x the tensor"
    )


def wordy(x, w, bias, rank, n):
    product = x @ w
    if rank == 0:
        product = product + bias
    return product


def test_a_right_answer_over_the_budget_is_refused():
    with pytest.raises(ExerciseError, match=r"right, in 4 lines of code\. .* in 2\."):
        one_layer.row_product.check(wordy)


def documented():
    """A docstring

    of three lines."""
    # a comment
    one = max(
        1,
        2,
    )

    two = 2; return one, two  # fmt: skip  # noqa: E702


class Twice:
    """A class."""

    number = 1

    def first(self):
        """Documented."""
        return 1

    def second(self):
        return 2


class Untouched:
    def forward(self): ...


def untouched():
    """Says what to do."""
    ...


def test_lines_are_statements():
    assert code_lines(documented) == 3
    assert code_lines(wordy) == 4
    assert code_lines(Twice) == 2
    assert not any(map(is_stub, (documented, Twice)))
    assert all(map(is_stub, (Untouched, untouched)))


@pytest.mark.parametrize(
    "attempt",
    [3, lambda x: x, max, eval("lambda: 1")],
    ids=["a number", "a lambda", "built-in", "evaluated"],
)
def test_what_has_no_readable_definition_is_refused(attempt):
    with pytest.raises(ConfigError, match=r"give the function or class|write it with `def`"):
        one_layer.row_product.check(attempt)


def test_an_exercise_that_communicates_asks_for_ranks():
    with pytest.raises(ConfigError, match=re.escape("ranks = stepmoe.Ranks(4)")):
        deferred.moe_block.check(wordy)


class Failing:
    """Stands in for Ranks: every call ends in this error."""

    def __init__(self, error):
        self.error = error

    def run(self, *_, **__):
        raise self.error


def test_what_fails_in_a_rank_becomes_a_hint():
    raised = "rank 2 raised stepmoe.errors.PlacementError: layer 0: no\nTraceback ..."
    with pytest.raises(ExerciseError, match=r"^It raised PlacementError: layer 0: no$"):
        call_on(Failing(RankError(raised, rank=2)), wordy)
    with pytest.raises(ExerciseError, match=r"rank 0: all_reduce; rank 1: not in one"):
        call_on(Failing(RankTimeout("", waiting={0: "all_reduce", 1: "not in one"})), wordy)


def test_the_made_up_chips_agree_with_the_roofline():
    solve = defined("solutions/06_latency", "first_compute_bound")
    shape = Step3p5Config.flash().replace(share_expert_dim=1500)
    chip = Chip("test", 300e12, 1e12, "a test")
    tokens = solve(shape.hidden_size, 1500, chip)
    for number, bound in ((tokens - 1, "memory"), (tokens, "compute")):
        parts = layer_roofline(shape, 5, ParallelConfig(), number, context=number)
        (shared,) = [part for part in parts if part.name == "shared expert"]
        assert shared.bound(chip) == bound
