"""Exercise: what the notebooks ask the reader to write, and how it is judged.

    exercise.columns_and_rows.try_out(columns_and_rows)   # in a lesson: prints the score or a hint
    exercise.columns_and_rows.check(columns_and_rows)     # raises ExerciseError with the hint

An exercise is a judge with a line budget. The judge runs the reader's code on fresh random inputs,
compares with an answer of its own, counts collectives in ledgers, and raises ExerciseError with a
hint for every usual mistake. What is asked for stands in the notebook; how it can be solved, in
notebooks/solutions.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stepmoe.comm.groups import world_size
from stepmoe.errors import ConfigError, RankError, RankTimeout
from stepmoe.exercises.source import code_lines, is_stub
from stepmoe.launch import Ranks


class ExerciseError(Exception):
    """An attempt that does not solve its exercise; the message is a hint."""


@dataclass(frozen=True)
class Traffic:
    """What a solution makes one rank send.

    Attributes:
        collectives: how many.
        sent: bytes, in units of the tensor that the exercise's spec calls whole.
    """

    collectives: int
    sent: float

    def __str__(self) -> str:
        plural = "" if self.collectives == 1 else "s"
        return f"{self.collectives} collective{plural}, a rank sends {self.sent:g} x the tensor"


@dataclass(frozen=True)
class Score:
    """A solved exercise: lines of code of the budget, and the traffic where there is some."""

    lines: int
    budget: int
    traffic: Traffic | None = None

    def __str__(self) -> str:
        plural = "" if self.lines == 1 else "s"
        text = f"solved: {self.lines} line{plural} of at most {self.budget}"
        return text if self.traffic is None else f"{text}; {self.traffic}"


Judge = Callable[..., Traffic | None]


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook.

    Attributes:
        name: of the function or class to be written.
        notebook: that asks for it ("01_one_layer").
        lines: most lines of code in its body.
        hint: what an untouched stub is told: where to begin.
        ranks: how many ranks the judge needs; 0 if it runs in this process.
    """

    name: str
    notebook: str
    lines: int
    hint: str
    ranks: int
    judge: Judge

    def check(self, attempt: Any, ranks: Ranks | None = None) -> Score:
        """Judge the reader's function or class.

        Args:
            ranks: running ranks, for an exercise that needs some.

        Raises:
            ExerciseError: it does not solve the exercise; the message says what to think about.
            ConfigError: the exercise needs ranks and got none, or not as many.
        """
        if is_stub(attempt):
            raise ExerciseError(self.hint)
        self._expect_ranks(ranks)
        traffic = self.judge(attempt, ranks) if self.ranks else self.judge(attempt)
        lines = code_lines(attempt)
        if lines > self.lines:
            raise ExerciseError(
                f"It is right, in {lines} lines of code. It can be said in {self.lines}."
            )
        return Score(lines, self.lines, traffic)

    def try_out(self, attempt: Any, ranks: Ranks | None = None) -> None:
        """Print what `check` says: the score, or that it is not solved yet and a hint."""
        try:
            verdict = str(self.check(attempt, ranks))
        except ExerciseError as error:
            verdict = f"not solved yet. {error}"
        print(textwrap.fill(verdict, 96))

    def _expect_ranks(self, ranks: Ranks | None) -> None:
        if not self.ranks:
            return
        if ranks is None:
            raise ConfigError(
                f"{self.name} communicates: give running ranks, check({self.name}, ranks) with "
                f"ranks = stepmoe.Ranks({self.ranks})"
            )
        if (given := ranks.run(world_size)[0]) != self.ranks:
            raise ConfigError(
                f"{self.name} is judged on {self.ranks} ranks, got {given}: "
                f"use stepmoe.Ranks({self.ranks})"
            )


def exercise(
    notebook: str, *, lines: int, hint: str, ranks: int = 0
) -> Callable[[Judge], Exercise]:
    """Make an Exercise, named like the judge, of a judge: judge(attempt) or judge(attempt, ranks).

    The judge returns the traffic of a right attempt, None where nothing communicates.
    """

    def decorate(judge: Judge) -> Exercise:
        return Exercise(judge.__name__, notebook, lines, hint, ranks, judge)

    return decorate


def call(attempt: Callable[..., Any], *args: Any) -> Any:
    """The attempt's answer; what it raises becomes a hint."""
    try:
        return attempt(*args)
    except ExerciseError:
        raise
    except Exception as error:
        raise ExerciseError(f"It raised {type(error).__name__}: {error}") from error


def call_on(ranks: Ranks, job: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Run a job that calls the attempt in every rank; what fails there becomes a hint."""
    try:
        return ranks.run(job, *args, timeout=timeout)
    except RankTimeout as error:
        places = "; ".join(f"rank {rank}: {place}" for rank, place in error.waiting.items())
        raise ExerciseError(
            f"The ranks wait for each other ({places}). Every rank must enter the same "
            "collectives, in the same order."
        ) from error
    except RankError as error:
        raised = str(error).partition("\n")[0].partition(" raised ")[2]
        kind, _, message = raised.partition(": ")
        if kind.endswith(ExerciseError.__name__):
            raise ExerciseError(message) from error
        raise ExerciseError(f"It raised {kind.rpartition('.')[2]}: {message}") from error


def require(condition: bool, hint: str) -> None:
    """Raise ExerciseError(hint) unless the condition holds."""
    if not condition:
        raise ExerciseError(hint)


def fresh() -> tuple[random.Random, torch.Generator]:
    """Sources of numbers that no earlier check has used: an answer cannot be learned by heart."""
    numbers = random.Random()
    return numbers, torch.Generator().manual_seed(numbers.getrandbits(63))


def same(answer: Any, expected: torch.Tensor) -> bool:
    """Whether the answer is a float64 tensor equal to the expected one, up to its rounding.

    1e-9: float64 keeps 16 digits, and the judges add and multiply a few hundred numbers of size 1.
    """
    return (
        isinstance(answer, torch.Tensor)
        and answer.shape == expected.shape
        and torch.allclose(answer.to(expected.dtype), expected, rtol=1e-9, atol=1e-9)
    )
