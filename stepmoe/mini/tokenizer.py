"""Words to numbers and back: one token a word, a digit or a sign, from a fixed list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from stepmoe.errors import ConfigError

# One token a line, its number is its line: the weights depend on this order.
VOCABULARY = tuple(Path(__file__).with_name("vocabulary.txt").read_text("utf-8").split())
EOS_TEXT, QUESTION, ANSWER = "<eos>", "Question:", "Answer:"

_NUMBER = {token: number for number, token in enumerate(VOCABULARY)}
_TOKEN = re.compile(r"<eos>|Question:|Answer:|####|[A-Za-z]+|[0-9]|\S")
EOS = _NUMBER[EOS_TEXT]


def encode(text: str) -> list[int]:
    """The tokens of a text, at least one.

    Raises:
        ConfigError: names the first word that is not in VOCABULARY, or the text is empty.
    """
    tokens = _TOKEN.findall(text)
    if not tokens:
        raise ConfigError(f"{text!r} holds no token: give at least one word")
    for token in tokens:
        if token not in _NUMBER:
            raise ConfigError(
                f"{token!r} is not among the {len(VOCABULARY)} tokens of the mini model: "
                "use words of stepmoe.mini.tokenizer.VOCABULARY"
            )
    return [_NUMBER[token] for token in tokens]


def decode(ids: Iterable[int]) -> str:
    """The text of some tokens, spaced as the questions and answers are: encode(decode(ids)) == ids.

    Raises:
        ConfigError: a number that no token has.
    """
    text, last = "", ""
    for number in map(int, ids):
        if not 0 <= number < len(VOCABULARY):
            raise ConfigError(
                f"token {number} does not exist: the mini model has 0 to {len(VOCABULARY) - 1}"
            )
        token = VOCABULARY[number]
        text += _space(last, token) + token
        last = token
    return text


def _space(last: str, token: str) -> str:
    """What stands between two tokens."""
    if not last or token in (".", "?", EOS_TEXT) or (last.isdigit() and token.isdigit()):
        return ""
    return "\n" if token in (QUESTION, ANSWER) else " "
