"""What an accuracy can and cannot say: intervals and tests. How many questions: `sample_size`.

Two runs on the same questions are *paired*: what tells them apart are the questions that one got
right and the other wrong. Two runs on questions of their own, or whose answers were not kept, are
*independent*: each carries the whole sampling error of its questions.

The formulae are statsmodels'; imported late, because only this module and `sample_size` need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepmoe.errors import ConfigError
from stepmoe.measure.speedup import CONFIDENCE, NO_DIFFERENCE

ALPHA = 1 - CONFIDENCE


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
        if self.p_value >= ALPHA:
            return NO_DIFFERENCE
        return "better" if self.difference.value > 0 else "worse"

    def __str__(self) -> str:
        interval = self.difference
        values = (interval.value, interval.low, interval.high)
        points = [round(100 * value, 1) + 0.0 for value in values]  # + 0.0: no -0.0
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
    low, high = proportion_confint(right, questions, alpha=ALPHA, method="wilson")
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
        counts[0], sizes[0], counts[1], sizes[1], method="newcomb", alpha=ALPHA
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
        low, high = proportion_confint(only_second, flips, alpha=ALPHA, method="beta")
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


def _check_count(right: Any, questions: Any) -> None:
    if questions < 1 or not 0 <= right <= questions:
        raise ConfigError(f"{right} right of {questions} questions: give 0 to all of at least one")
