"""Grade-school word problems of one to four steps, with a worked answer: drawn, never downloaded.

A question is an opening, up to two moves and an ending, each a sentence of one scene:

    Emma has 4 boxes with 12 marbles in each. She loses 15 of them in a game.
    How many marbles does Emma have now?
    4 * 12 = 48. 48 - 15 = 33. #### 33

Its template is the scene with the kinds of its sentences, here "marbles: product, lose, left". One
template in five is held out: no question of it, in any paraphrase, is in the training split. The
layout of answers ("####" before the number) is GSM8K's (arXiv:2110.14168).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import Literal

from stepmoe.checks import whole_number
from stepmoe.errors import ConfigError
from stepmoe.mini.scenes import BOYS, GIRLS, SCENES, Scene

Split = Literal["train", "heldout"]
HELDOUT_QUESTIONS = 1319  # as many as GSM8K's test set has
MAX_STEPS = 4
LARGEST = 9999  # no number of a question or of its worked answer is larger

# What each kind of sentence computes, in order. v: the value so far; p: the result of the step just
# before; a, b: the numbers of the sentence. The last result is the new value.
OPENINGS = {"plain": (), "product": ("a * b",), "total": ("a + b",)}
MOVES = {
    "gain": ("v + a",),
    "lose": ("v - a",),
    "gain_each": ("a * b", "v + p"),
    "lose_each": ("a * b", "v - p"),
    "half": ("v / 2",),
    "double": ("v * 2",),
}
ENDINGS = {
    "left": (),
    "price": ("v * a",),
    "share": ("v / a",),
    "pack": ("v / a",),
    "more": ("v + a", "v + p"),
    "fewer": ("v - a", "v + p"),
    "times": ("v * a", "v + p"),
}
_FORMULAS: dict[str, tuple[str, ...]] = {**OPENINGS, **MOVES, **ENDINGS}

_LARGE, _FACTOR, _OTHER_FACTOR, _FEW = (15, 999), (11, 40), (11, 99), (3, 25)
_RANGES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {  # of a and of b
    "product": (_FACTOR, _OTHER_FACTOR),
    "gain_each": (_FACTOR, _OTHER_FACTOR),
    "lose_each": (_FACTOR, _OTHER_FACTOR),
    "price": (_FEW, _FEW),
    "share": (_FEW, _FEW),
    "pack": (_FEW, _FEW),
    "times": (_FEW, _FEW),
}


@dataclass(frozen=True)
class Question:
    """One word problem.

    Attributes:
        text: the question alone.
        worked: the answer with its steps, ending in "#### " and the number.
        answer: that number.
        steps: how many computations the worked answer has, 1 to 4.
        template: the scene and the kinds of its sentences.
    """

    text: str
    worked: str
    answer: int
    steps: int
    template: str


def questions(split: Split, count: int, seed: int = 0) -> list[Question]:
    """The first `count` distinct questions of a split: the same for the same seed everywhere.

    One to four steps are equally likely.

    Raises:
        ConfigError: another split, or a count below 1.
    """
    count = whole_number("count", count)
    found: dict[str, Question] = {}
    for question in stream(split, seed):
        found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


@cache
def heldout() -> tuple[Question, ...]:
    """The 1319 held-out questions that accuracy is measured on."""
    return tuple(questions("heldout", HELDOUT_QUESTIONS))


def stream(split: Split, seed: int) -> Iterator[Question]:
    """Questions of a split without end; one may come twice."""
    if split not in ("train", "heldout"):
        raise ConfigError(f"split must be 'train' or 'heldout', got {split!r}")
    rng = Random(f"{split} {seed}")
    by_steps = templates(split)
    while True:
        scene, kinds = rng.choice(by_steps[rng.randint(1, MAX_STEPS)])
        yield _draw(scene, kinds, rng)


def parse_answer(text: str) -> int | None:
    """The number behind the one "####" that ends a worked answer; None if the text lacks it.

    What follows the end of the answer ("<eos>") does not count.
    """
    found = re.fullmatch(r"[^#]*#### ([0-9]{1,9})", text.partition("<eos>")[0])
    return int(found[1]) if found else None


@cache
def templates(split: Split) -> dict[int, tuple[tuple[Scene, tuple[str, ...]], ...]]:
    """By number of steps: every template of a split, as a scene and the kinds of its sentences."""
    kept: dict[int, list[tuple[Scene, tuple[str, ...]]]] = {n + 1: [] for n in range(MAX_STEPS)}
    moves = [chosen for size in range(3) for chosen in product(MOVES, repeat=size)]
    for scene, opening, chosen, ending in product(SCENES, OPENINGS, moves, ENDINGS):
        kinds = (opening, *chosen, ending)
        steps = sum(len(_FORMULAS[kind]) for kind in kinds)
        if 1 <= steps <= MAX_STEPS and _is_heldout(template(scene, kinds)) == (split == "heldout"):
            kept[steps].append((scene, kinds))
    return {steps: tuple(found) for steps, found in kept.items()}


def template(scene: Scene, kinds: tuple[str, ...]) -> str:
    """The name of a template."""
    return f"{scene.noun}: {', '.join(kinds)}"


def _is_heldout(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def _draw(scene: Scene, kinds: tuple[str, ...], rng: Random) -> Question:
    """A question of one template; numbers that do not work out are drawn again."""
    girl = rng.random() < 0.5
    name, other = rng.sample(GIRLS if girl else BOYS, 2)
    pronoun = "she" if girl else "he"
    words = {"name": name, "other": other, "she": pronoun, "She": pronoun.capitalize()}
    words |= {"noun": scene.noun, "bags": scene.bags}
    while (numbers := _numbers(kinds, rng)) is None:
        pass
    drawn, steps = numbers
    sentences = [
        rng.choice(scene.paraphrases(kind)).format(**words, a=a, b=b)
        for kind, (a, b) in zip(kinds, drawn, strict=True)
    ]
    answer = int(steps[-1].split()[-1])
    worked = " ".join(f"{step}." for step in steps) + f" #### {answer}"
    return Question(" ".join(sentences), worked, answer, len(steps), template(scene, kinds))


def _numbers(kinds: tuple[str, ...], rng: Random) -> tuple[list[tuple[int, int]], list[str]] | None:
    """a and b of every sentence, and the worked steps; None if a result is not a whole number from
    1 to LARGEST."""
    drawn, steps, value = [], [], 0
    for kind in kinds:
        a, b = (rng.randint(*bounds) for bounds in _RANGES.get(kind, (_LARGE, _LARGE)))
        drawn.append((a, b))
        known = {"v": value, "a": a, "b": b, "p": value}
        for formula in _FORMULAS[kind]:
            left, sign, right = formula.split()
            x, y = known[left], known.get(right, 2)
            result = _apply(x, sign, y)
            if result is None:
                return None
            steps.append(f"{x} {sign} {y} = {result}")
            known["p"] = result
        value = known["p"] if _FORMULAS[kind] else value or a
    return drawn, steps


def _apply(x: int, sign: str, y: int) -> int | None:
    if sign == "/":
        return x // y if x % y == 0 and x > y else None
    result = x + y if sign == "+" else x - y if sign == "-" else x * y
    return result if 1 <= result <= LARGEST else None
