"""What an accuracy can and cannot say: intervals, tests, and how many questions a test needs.

Two runs on the same questions are *paired*: what tells them apart are the questions that one got
right and the other wrong. Two runs on questions of their own, or whose answers were not kept, are
*independent*: each carries the whole sampling error of its questions.

The formulae are statsmodels' and scipy's; imported late, because only this module needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepmoe.errors import ConfigError
from stepmoe.measure.statistics import CONFIDENCE, NO_DIFFERENCE

POWER = 0.8  # how often a test shall see the difference that it was planned for
_ALPHA = 1 - CONFIDENCE
_MOST_QUESTIONS = 10**9


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """Whether two accuracies differ.

    Attributes:
        difference: second minus first, with its interval.
        p_value: how often equal models would differ at least as much.
        method: the test.
    """

    difference: Interval
    p_value: float
    method: str

    @property
    def verdict(self) -> str:
        """ "better", "worse" (the second than the first), or "no difference seen"."""
        if self.p_value >= _ALPHA:
            return NO_DIFFERENCE
        return "better" if self.difference.value > 0 else "worse"

    def __str__(self) -> str:
        points = [100 * x for x in (self.difference.value, self.difference.low)]
        points.append(100 * self.difference.high)
        return (
            "{:+.1f} points ({:+.1f} to {:+.1f}), ".format(*points)
            + f"p = {self.p_value:.2g}: {self.verdict}"
        )


@dataclass(frozen=True)
class Paired(Comparison):
    """A comparison question by question.

    Attributes:
        both, neither: questions that both or neither got right.
        only_first, only_second: the flips: right in one run alone.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def flips(self) -> int:
        """Questions whose result differs between the runs."""
        return self.only_first + self.only_second


def wilson(right: int, questions: int) -> Interval:
    """Accuracy with Wilson's 95 % interval; unlike the textbook one it stays between 0 and 1.

    Raises:
        ConfigError: `right` is not between 0 and `questions`, or there is no question.
    """
    from statsmodels.stats.proportion import proportion_confint

    _check_count(right, questions)
    low, high = proportion_confint(right, questions, alpha=_ALPHA, method="wilson")
    value = right / questions  # at 0 or 1 an end of the interval, but for the last digit
    return Interval(value, min(float(low), value), max(float(high), value))


def compare_independent(
    right_first: int, questions_first: int, right_second: int, questions_second: int
) -> Comparison:
    """Two runs of which only the totals are known: two-proportion z test, Newcombe's interval.

    Raises:
        ConfigError: as `wilson`.
    """
    from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

    _check_count(right_first, questions_first)
    _check_count(right_second, questions_second)
    counts, sizes = [right_second, right_first], [questions_second, questions_first]
    all_alike = sum(counts) in (0, sum(sizes))  # no variance: the test would divide by it
    p_value = 1.0 if all_alike else float(proportions_ztest(counts, sizes)[1])
    low, high = confint_proportions_2indep(
        counts[0], sizes[0], counts[1], sizes[1], method="newcomb", alpha=_ALPHA
    )
    difference = counts[0] / sizes[0] - counts[1] / sizes[1]
    interval = Interval(difference, float(low), float(high))
    return Comparison(interval, p_value, "two-proportion z test, independent runs")


def compare_paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Two runs over the same questions in the same order: McNemar's exact test.

    Given the number of flips, those in favour of the second run are binomial with probability 1/2
    if the runs are equally good. The interval is that probability's (Clopper and Pearson), turned
    into a difference of accuracies, so that it contains 0 exactly where the test sees nothing.

    Args:
        first, second: whether each question was answered rightly.

    Raises:
        ConfigError: no question, or runs of different length.
    """
    if len(first) != len(second) or not len(first):
        raise ConfigError(
            f"paired runs answer the same questions: got {len(first)} and {len(second)} outcomes"
        )
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    table = [int(np.sum(x)) for x in (one & two, one & ~two, ~one & two, ~one & ~two)]
    return paired_from_counts(*table)


def paired_from_counts(both: int, only_first: int, only_second: int, neither: int) -> Paired:
    """The same from the four counts of questions."""
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.proportion import proportion_confint

    questions = both + only_first + only_second + neither
    if min(both, only_first, only_second, neither) < 0 or not questions:
        raise ConfigError(
            f"counts of questions cannot be {both}, {only_first}, {only_second}, {neither}"
        )
    flips = only_first + only_second
    p_value, low, high = 1.0, 0.5, 0.5
    if flips:
        table = [[both, only_first], [only_second, neither]]
        p_value = float(mcnemar(table, exact=True).pvalue)
        low, high = proportion_confint(only_second, flips, alpha=_ALPHA, method="beta")
    difference = Interval(
        (only_second - only_first) / questions,
        float(2 * low - 1) * flips / questions,
        float(2 * high - 1) * flips / questions,
    )
    method = "McNemar's exact test, paired runs"
    return Paired(difference, p_value, method, both, only_first, only_second, neither)


def counts_that_round_to(accuracy: float, questions: int, digits: int = 3) -> list[int]:
    """Every number of right answers that prints as this accuracy.

    Raises:
        ConfigError: no number of right answers does.
    """
    near = int(accuracy * questions)
    reach = int(questions * 10.0**-digits) + 2
    candidates = range(max(0, near - reach), min(questions, near + reach) + 1)
    found = [n for n in candidates if round(n / questions, digits) == round(accuracy, digits)]
    if not found:
        raise ConfigError(f"no number of {questions} questions is {accuracy} to {digits} digits")
    return found


def power_independent(first: float, second: float, questions: int) -> float:
    """How often two runs of `questions` each, with these true accuracies, are told apart."""
    from statsmodels.stats.proportion import power_proportions_2indep

    _check_rates(first, second)
    return float(power_proportions_2indep(second - first, first, questions, alpha=_ALPHA).power)


def questions_needed_independent(first: float, second: float, power: float = POWER) -> int:
    """Questions each of two independent runs needs to see a true difference.

    Args:
        first, second: the true accuracies.
        power: how often the test shall see it.

    Raises:
        ConfigError: accuracies that are equal or outside 0 to 1.
    """
    from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

    _check_rates(first, second)
    number = samplesize_proportions_2indep_onetail(
        second - first, first, power, alpha=_ALPHA, alternative="two-sided"
    )
    return int(np.ceil(number))


def power_paired(only_first: float, only_second: float, questions: int) -> float:
    """How often McNemar's exact test tells two models apart, exactly.

    Args:
        only_first, only_second: the true rates of flips, as fractions of all questions.

    Raises:
        ConfigError: rates that no two models can have.
    """
    from scipy import stats

    _check_flip_rates(only_first, only_second)
    flip_rate = only_first + only_second
    # Numbers of flips that never occur are left out: five standard deviations and some.
    mean, reach = questions * flip_rate, 5 * (questions * flip_rate) ** 0.5 + 30
    flips = np.arange(max(0, int(mean - reach)), min(questions, int(mean + reach)) + 1)
    # The largest k for which 2 P(at most k of the flips are the second's) is below alpha.
    critical = stats.binom.ppf(_ALPHA / 2, flips, 0.5)
    critical = np.where(stats.binom.cdf(critical, flips, 0.5) > _ALPHA / 2, critical - 1, critical)
    share = only_second / flip_rate
    seen = stats.binom.cdf(critical, flips, share)
    seen = seen + stats.binom.sf(flips - critical - 1, flips, share)
    seen = np.where(critical < 0, 0.0, seen)
    return float(np.sum(stats.binom.pmf(flips, questions, flip_rate) * seen))


def questions_needed_paired(only_first: float, only_second: float, power: float = POWER) -> int:
    """Questions that two runs over the same questions need to see a true difference.

    The exact power moves up and down by a hair from one number of questions to the next, where
    whole flips are counted; what is returned reaches it, and one question less does not.

    Args:
        only_first, only_second: the true rates of flips; their difference is what shall be seen.

    Raises:
        ConfigError: equal rates, or rates that no two models can have.
    """
    _check_flip_rates(only_first, only_second)
    if only_first == only_second:
        raise ConfigError(f"flip rates {only_first} and {only_second}: no difference to be seen")
    low, high = 1, 2
    while power_paired(only_first, only_second, high) < power:
        low, high = high, 2 * high
        if high > _MOST_QUESTIONS:
            raise ConfigError(
                f"flip rates {only_first} and {only_second} need over {_MOST_QUESTIONS:,} questions"
            )
    while high - low > 1:
        middle = (low + high) // 2
        if power_paired(only_first, only_second, middle) < power:
            low = middle
        else:
            high = middle
    return high


def _check_count(right: Any, questions: Any) -> None:
    if questions < 1 or not 0 <= right <= questions:
        raise ConfigError(f"{right} right of {questions} questions: give 0 to all of at least one")


def _check_rates(first: float, second: float) -> None:
    if first == second or not (0 < first < 1 and 0 < second < 1):
        raise ConfigError(
            f"accuracies {first} and {second}: give two different ones between 0 and 1"
        )


def _check_flip_rates(only_first: float, only_second: float) -> None:
    if min(only_first, only_second) < 0 or not 0 < only_first + only_second <= 1:
        raise ConfigError(
            f"flip rates {only_first} and {only_second}: give two of at least 0, not both 0, "
            "that add up to at most 1"
        )
