"""The statistics of accuracy: against published examples, hand-written formulae and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stepmoe as sm
from stepmoe.measure import sample_size, significance
from stepmoe.measure.speedup import NO_DIFFERENCE

Z = 1.959963984540054  # the normal distribution's 97.5 % point
Z_POWER = 0.8416212335729143  # and its 80 % point


# R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17 (1998),
# table I, method 3 (Wilson).
@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(right, questions, low, high):
    interval = significance.wilson(right, questions)
    # 5e-5: four digits are printed there.
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert interval.value == right / questions


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_inverts_the_score_test(case):
    """Its ends are where the distance to the estimate is Z of *their own* standard deviations."""
    right, questions = case
    interval = significance.wilson(right, questions)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    for end in (interval.low, interval.high):
        deviation = Z * math.sqrt(end * (1 - end) / questions)
        # 1e-7: the square root of an end near 0 magnifies float64's rounding of it.
        assert abs(interval.value - end) == pytest.approx(deviation, abs=1e-7)


def test_wilson_covers_the_truth_nineteen_times_in_twenty():
    generator, truth = np.random.default_rng(), 0.875
    draws = generator.binomial(1319, truth, size=2000)
    intervals = {int(k): significance.wilson(int(k), 1319) for k in set(draws)}
    covered = np.mean([intervals[int(k)].low <= truth <= intervals[int(k)].high for k in draws])
    # Binomial error of 2000 draws at 0.95 is 0.005: five of them, and Wilson's own error of 0.005.
    assert abs(covered - 0.95) < 0.03


def test_independent_runs_as_published():
    """Newcombe, "Interval estimation for the difference", Stat. Med. 17 (1998): 56/70, 48/80."""
    found = significance.compare_independent(48, 80, 56, 70)
    interval = found.difference
    assert interval.value == pytest.approx(0.2)
    assert (interval.low, interval.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    pooled = (48 + 56) / 150
    z = 0.2 / math.sqrt(pooled * (1 - pooled) * (1 / 70 + 1 / 80))
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-9)
    assert found.verdict == "better"
    assert significance.compare_independent(56, 70, 48, 80).verdict == "worse"


def test_runs_without_a_wrong_answer_do_not_differ():
    assert significance.compare_independent(20, 20, 30, 30).p_value == 1
    assert significance.compare_independent(0, 20, 0, 30).verdict == NO_DIFFERENCE


def test_paired_runs_as_published():
    """A. Agresti, "Categorical Data Analysis", 10.1: approval of a prime minister, two surveys."""
    found = significance.paired_from_counts(794, 150, 86, 570)
    ours = 2 * sum(math.comb(236, k) for k in range(87)) / 2**236
    assert found.p_value == pytest.approx(ours, rel=1e-9)
    assert found.p_value == pytest.approx(3.716e-05, rel=1e-3)  # as R's exact2x2 prints it
    assert (found.flips, found.verdict) == (236, "worse")
    assert found.difference.value == pytest.approx(-64 / 1600)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_counts_and_interval_agree_with_the_test(pairs):
    first, second = zip(*pairs, strict=True)
    found = significance.compare_paired(first, second)
    counts = [pairs.count(p) for p in [(True, True), (True, False), (False, True), (False, False)]]
    assert [found.both, found.only_first, found.only_second, found.neither] == counts
    tail = range(min(found.only_first, found.only_second) + 1)
    exact = min(1, 2 * sum(math.comb(found.flips, k) for k in tail) / 2**found.flips)
    assert found.p_value == pytest.approx(exact, rel=1e-9)
    inside = found.difference.low <= 0 <= found.difference.high
    assert inside == (found.verdict == NO_DIFFERENCE)
    mirrored = significance.compare_paired(second, first)
    assert mirrored.p_value == found.p_value
    assert mirrored.difference.value == -found.difference.value


def test_the_published_pair():
    """sglang PR #22773: 0.875 before, 0.879 after, of 1319 questions."""
    assert significance.counts_that_round_to(0.875, 1319) == [1154]
    assert significance.counts_that_round_to(0.879, 1319) == [1159, 1160]
    for after in (1159, 1160):
        found = significance.compare_independent(1154, 1319, after, 1319)
        assert found.verdict == NO_DIFFERENCE
        assert 0.7 < found.p_value < 0.8
    # Even if every one of the five were a flip to the better and there were no other flip.
    assert significance.paired_from_counts(1154, 0, 5, 160).p_value == 2 / 2**5
    assert significance.paired_from_counts(1154, 0, 5, 160).verdict == NO_DIFFERENCE
    assert str(significance.paired_from_counts(1154, 0, 5, 160)).startswith(
        "+0.4 points (+0.0 to +0.4)"
    )


def test_questions_for_independent_runs():
    """Fleiss, "Statistical Methods for Rates and Proportions": pooled and separate variances."""
    first, second = 0.875, 0.879
    pooled = (first + second) / 2
    root = Z * math.sqrt(2 * pooled * (1 - pooled))
    root += Z_POWER * math.sqrt(first * (1 - first) + second * (1 - second))
    expected = (root / (second - first)) ** 2
    needed = sample_size.questions_needed_independent(first, second)
    assert needed == pytest.approx(expected, rel=1e-3)  # statsmodels pools a little differently
    assert sample_size.power_independent(first, second, needed) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("only_first", "only_second"), [(0.02, 0.1), (0.0, 0.3), (0.4, 0.2)])
def test_power_of_the_paired_test_counts_every_case(only_first, only_second):
    """The sum over all outcomes of 25 questions whose exact p-value is below 0.05."""
    questions, rest, total = 25, 1 - only_first - only_second, 0.0
    for a in range(questions + 1):
        for b in range(questions + 1 - a):
            ways = math.comb(questions, a) * math.comb(questions - a, b)
            chance = ways * only_first**a * only_second**b * rest ** (questions - a - b)
            tail = 2 * sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
            total += chance if tail < 0.05 else 0.0
    # 1e-6: cases beyond five standard deviations are left out.
    assert sample_size.power_paired(only_first, only_second, questions) == pytest.approx(
        total, abs=1e-6
    )


def test_questions_for_paired_runs():
    needed = sample_size.questions_needed_paired(0.008, 0.012)
    assert sample_size.power_paired(0.008, 0.012, needed) >= 0.8
    assert sample_size.power_paired(0.008, 0.012, needed - 1) < 0.8
    # Miettinen's approximation for paired proportions, which neglects that flips are whole.
    rough = ((Z * math.sqrt(0.02) + Z_POWER * math.sqrt(0.02 - 0.004**2)) / 0.004) ** 2
    assert needed == pytest.approx(rough, rel=0.1)
    # Fewer flips, fewer questions; and either way round.
    assert sample_size.questions_needed_paired(0.001, 0.005) < needed
    assert sample_size.questions_needed_paired(0.012, 0.008) == needed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: significance.wilson(5, 4), "5 right of 4 questions"),
        (lambda: significance.wilson(0, 0), "0 right of 0 questions"),
        (lambda: significance.compare_independent(-1, 4, 2, 4), "-1 right of 4"),
        (lambda: significance.compare_paired([True], [True, False]), "got 1 and 2 outcomes"),
        (lambda: significance.compare_paired([], []), "got 0 and 0 outcomes"),
        (lambda: significance.paired_from_counts(1, -1, 0, 2), "cannot be 1, -1, 0, 2"),
        (lambda: significance.counts_that_round_to(0.5, 3), "no number of 3 questions is 0.5"),
        (
            lambda: sample_size.questions_needed_independent(0.8, 0.8),
            "0.8 and 0.8: give two different",
        ),
        (lambda: sample_size.power_independent(0.8, 1.2, 10), "0.8 and 1.2"),
        (lambda: sample_size.questions_needed_paired(0.1, 0.1), "no difference to be seen"),
        (lambda: sample_size.questions_needed_paired(0.7, 0.6), "add up to at most 1"),
        (lambda: sample_size.questions_needed_paired(1e-7, 1.1e-7), "need over 1,000,000,000"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(sm.ConfigError, match=message):
        call()
