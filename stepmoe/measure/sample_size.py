"""How many questions a test needs to see a difference of accuracies, and how often it sees one.

For the two tests of `significance`: of independent runs, and of runs paired question by question.
The formulae are statsmodels' and scipy's; imported late.
"""

from __future__ import annotations

import numpy as np

from stepmoe.errors import ConfigError
from stepmoe.measure.significance import ALPHA

POWER = 0.8  # how often a test shall see the difference that it was planned for
_MOST_QUESTIONS = 10**9


def power_independent(first: float, second: float, questions: int) -> float:
    """How often two runs of `questions` each, with these true accuracies, are told apart."""
    from statsmodels.stats.proportion import power_proportions_2indep

    _check_rates(first, second)
    return float(power_proportions_2indep(second - first, first, questions, alpha=ALPHA).power)


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
        second - first, first, power, alpha=ALPHA, alternative="two-sided"
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
    critical = stats.binom.ppf(ALPHA / 2, flips, 0.5)
    critical = np.where(stats.binom.cdf(critical, flips, 0.5) > ALPHA / 2, critical - 1, critical)
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
