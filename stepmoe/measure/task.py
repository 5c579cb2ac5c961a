"""A task with right answers: what a model is asked, what it answered, and how that is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from stepmoe.checks import whole_number
from stepmoe.errors import ConfigError
from stepmoe.measure.significance import Interval, wilson

if TYPE_CHECKING:
    from stepmoe.mini.task import Question

_RIGHT, _WRONG, _INVALID, _NO_ANSWER = "1", "0", "-", "-"


@dataclass(frozen=True)
class Task:
    """Questions as tokens, with the answers they should get.

    Attributes:
        name: what is asked.
        prompts: (questions, length) int64, all equally long: the model has no mask for padding.
        expected: the right answer of each.
        read: from the tokens a model added to a prompt to its answer; None is an invalid one.
        max_new_tokens: enough for every right answer.
    """

    name: str
    prompts: Tensor
    expected: tuple[int, ...]
    read: Callable[[list[int]], int | None]
    max_new_tokens: int

    def __len__(self) -> int:
        return len(self.expected)

    @cached_property
    def digest(self) -> str:
        """Tells whether two runs were asked the same, so that they can be paired."""
        content = f"{self.prompts.tolist()} {self.expected}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def score(self, completions: Tensor) -> Outcomes:
        """What the answers are worth.

        Args:
            completions: (questions, new tokens) int64, what the model added to each prompt.

        Raises:
            ConfigError: not one row a question.
        """
        if len(completions) != len(self):
            raise ConfigError(f"{len(completions)} completions for {len(self)} questions")
        answers = tuple(self.read(row) for row in completions.tolist())
        marks = [
            _INVALID if answer is None else _RIGHT if answer == expected else _WRONG
            for answer, expected in zip(answers, self.expected, strict=True)
        ]
        return Outcomes("".join(marks), answers)


@dataclass(frozen=True)
class Outcomes:
    """What became of each question.

    Attributes:
        marks: a character a question: "1" right, "0" wrong, "-" invalid (no answer to be read).
        answers: the answers themselves; None where invalid.
    """

    marks: str
    answers: tuple[int | None, ...]

    @property
    def right(self) -> list[bool]:
        """Whether each question was answered rightly: for `significance.compare_paired`."""
        return [mark == _RIGHT for mark in self.marks]

    @property
    def num_right(self) -> int:
        return self.marks.count(_RIGHT)

    @property
    def num_invalid(self) -> int:
        return self.marks.count(_INVALID)

    @property
    def accuracy(self) -> Interval:
        """The share of right answers, with Wilson's interval."""
        return wilson(self.num_right, len(self.marks))

    def answers_changed(self, other: Outcomes) -> int:
        """Questions to which the other run gave another answer, right or not."""
        if len(self.answers) != len(other.answers):
            raise ConfigError(f"runs of {len(self.answers)} and {len(other.answers)} questions")
        return sum(a != b for a, b in zip(self.answers, other.answers, strict=True))

    def to_row(self) -> dict[str, str]:
        """As two texts, for a table or a file: a mark a question, and the answers."""
        answers = (_NO_ANSWER if answer is None else str(answer) for answer in self.answers)
        return {"marks": self.marks, "answers": " ".join(answers)}

    @classmethod
    def from_row(cls, marks: str, answers: str) -> Outcomes:
        """Of what `to_row` made."""
        read = tuple(None if a == _NO_ANSWER else int(a) for a in answers.split())
        if len(read) != len(marks) or set(marks) - {_RIGHT, _WRONG, _INVALID}:
            raise ConfigError(f"{len(marks)} marks and {len(read)} answers are not one run's")
        return cls(marks, read)


def word_problems(count: int | None = None, questions: Sequence[Question] | None = None) -> Task:
    """The held-out word problems of stepmoe.mini, each behind two worked examples.

    Args:
        count: the first so many; None means all 1319.
        questions: others, of the same making; None means the held-out ones.

    Raises:
        ConfigError: a count that there are not.
    """
    from stepmoe.mini import few_shot, task, tokenizer

    every = task.heldout() if questions is None else questions
    if count is None:
        count = len(every)
    count = whole_number("the count of questions", count, most=len(every))

    def read(tokens: list[int]) -> int | None:
        return task.parse_answer(tokenizer.decode(tokens))

    return Task(
        name="held-out word problems" if questions is None else "word problems",
        prompts=few_shot.prompt_ids(every[:count]),
        expected=tuple(question.answer for question in every[:count]),
        read=read,
        max_new_tokens=few_shot.MAX_NEW_TOKENS,
    )
