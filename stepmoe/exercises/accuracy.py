"""Exercises of notebook 07: what a number of right answers says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stepmoe.exercises.exercise import call, exercise, fresh, require
from stepmoe.measure.sample_size import POWER, questions_needed_independent
from stepmoe.measure.significance import compare_paired

NOTEBOOK = "07_accuracy"


@exercise(
    NOTEBOOK,
    lines=4,
    hint="Hint: how large is the standard error of a difference of two accuracies, each from n "
    "questions? It must be so small that the difference is 1.96 + 0.84 of it.",
)
def questions_needed(attempt: Callable[..., Any]) -> None:
    """Judges the questions that each of two independent runs needs, by statsmodels' number.

    Within 3 %: with or without pooling the two accuracies, textbooks differ by about 1 %.
    """
    numbers, _ = fresh()
    for accuracy, difference in (
        (0.875, 0.004),
        (numbers.uniform(0.6, 0.8), numbers.uniform(0.01, 0.03)),
    ):
        right = questions_needed_independent(accuracy, accuracy + difference, POWER)
        answer = call(attempt, accuracy, difference)
        require(isinstance(answer, (int, float)), f"Return a number, not {answer!r}.")
        where = f"{accuracy:.3f} and {100 * difference:.1f} points more: you say {answer:,.0f}. "
        for share, hint in (
            (0.5, "About half: do both runs carry a sampling error, and is the difference seen in "
             "80 of 100 repetitions, or only in 50?"),
            (0.245, "About a quarter: both runs carry a sampling error, and a difference of just "
             "1.96 standard errors is seen in one repetition of two."),
            (0.79, "That is for a one-sided test. Nobody knows beforehand which run is better."),
        ):  # fmt: skip
            require(abs(answer / right / share - 1) > 0.05, where + hint)
        require(abs(answer / right - 1) < 0.03, f"{where}It takes {right:,}.")


@exercise(
    NOTEBOOK,
    lines=6,
    hint="Hint: a question that both runs got right says nothing. Count those that only one of "
    "them got right; if the runs are equally good, each of these is a toss of a coin.",
)
def mcnemar(attempt: Callable[..., Any]) -> None:
    """Judges the exact p-value of paired outcomes by statsmodels' test."""
    numbers, _ = fresh()
    for only_first, only_second in ((9, 2), (2, 9), (5, 5), (0, 0), (0, numbers.randint(3, 9))):
        pairs = [(True, True)] * numbers.randint(50, 90) + [(False, False)] * numbers.randint(5, 20)
        pairs += [(True, False)] * only_first + [(False, True)] * only_second
        numbers.shuffle(pairs)
        first, second = (list(run) for run in zip(*pairs, strict=True))
        right = compare_paired(first, second).p_value
        p_value = call(attempt, first, second)
        where = f"{only_first} and {only_second} flips of {len(pairs)} questions: "
        require(isinstance(p_value, (int, float)), f"{where}return a number, not {p_value!r}.")
        require(
            p_value < 1 + 1e-9,
            f"{where}a probability of {p_value:.3g}? Twice one tail is more than everything when "
            "the tails overlap.",
        )
        require(
            right == 1 or abs(p_value - right / 2) > 1e-9,
            f"{where}{p_value:.3g} is the chance in one direction. Equal runs differ in either.",
        )
        require(
            abs(p_value - right) < 1e-9,
            f"{where}you say p = {p_value:.3g}, it is {right:.3g}. Only the flips count: of "
            f"{only_first + only_second} tosses of a coin, {min(only_first, only_second)} or fewer "
            "on one side.",
        )


@exercise(
    NOTEBOOK,
    lines=3,
    hint="Hint: k tosses of a coin, all heads or all tails. How likely is that?",
)
def fewest_flips(attempt: Callable[..., Any]) -> None:
    """Judges how many flips, all in one direction, it takes for a p-value below alpha."""
    numbers, _ = fresh()
    for alpha in (0.05, 0.01, numbers.uniform(0.001, 0.2)):
        right = 1
        while compare_paired([False] * right, [True] * right).p_value >= alpha:
            right += 1
        answer = call(attempt, alpha)
        where = f"alpha = {alpha:.3g}: "
        require(
            answer != right - 1,
            f"{where}{answer} in one direction: all heads *or* all tails, p = 2 x 0.5 ^ k, is not "
            "below it yet.",
        )
        require(answer == right, f"{where}you say {answer}, it is {right}.")
