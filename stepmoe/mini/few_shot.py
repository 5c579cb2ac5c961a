"""Few-shot prompts, all of one length.

The model has no mask for padding, so the prompts of one batch must be equally long. Every prompt
holds two worked examples of the training split, chosen for their lengths: with the question they
make exactly PROMPT_TOKENS tokens. Any set of prompts is therefore one rectangular batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from stepmoe.errors import ConfigError
from stepmoe.mini.task import Question, questions
from stepmoe.mini.tokenizer import ANSWER, EOS_TEXT, QUESTION, encode

PROMPT_TOKENS = 160
MAX_NEW_TOKENS = 64  # the longest worked answer with its <eos> can have 63
_EXAMPLES = 64


def prompt(question: Question) -> str:
    """Two worked examples and the question; ends where the answer begins.

    Raises:
        ConfigError: no two examples fill the prompt, which happens to questions of other makers.
    """
    asked = ask(question)
    room = PROMPT_TOKENS - len(encode(asked))
    pairs = _pairs().get(room)
    if not pairs:
        raise ConfigError(
            f"no two examples have {room} tokens together, which this question leaves of "
            f"{PROMPT_TOKENS}: {question.text!r}"
        )
    digest = hashlib.sha256(question.text.encode()).digest()
    first, second = pairs[int.from_bytes(digest[:8], "big") % len(pairs)]
    return "\n".join((example(first), example(second), asked))


def prompt_ids(asked: Iterable[Question]) -> Tensor:
    """The tokens of the prompts: (questions, PROMPT_TOKENS) int64."""
    return torch.tensor([encode(prompt(question)) for question in asked], dtype=torch.int64)


def example(question: Question) -> str:
    """A question with its worked answer, as the model is trained on it."""
    return f"{ask(question)} {question.worked}{EOS_TEXT}"


def ask(question: Question) -> str:
    """A question alone, up to where its answer begins."""
    return f"{QUESTION} {question.text}\n{ANSWER}"


@cache
def _pairs() -> dict[int, list[tuple[Question, Question]]]:
    """By their tokens together: every pair of two different examples."""
    examples = questions("train", _EXAMPLES)
    lengths = [len(encode(example(question))) for question in examples]
    found: dict[int, list[tuple[Question, Question]]] = {}
    for i, first in enumerate(examples):
        for j, second in enumerate(examples):
            if i != j:
                found.setdefault(lengths[i] + lengths[j], []).append((first, second))
    return found
