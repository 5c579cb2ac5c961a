"""The word problems of the mini model: right, reproducible, and not shared between the splits."""

import hashlib
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stepmoe as sm
from stepmoe.mini import few_shot, task, tokenizer
from stepmoe.mini.scenes import SCENES

TRAIN_DRAWN = 20_000


@pytest.fixture(scope="module")
def train():
    return task.questions("train", TRAIN_DRAWN, seed=torch.seed() % 1000)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_heldout_questions_are_pinned():
    """Scores of different machines and days are of the same 1319 questions."""
    found = task.heldout()
    assert len({digest(question.text) for question in found}) == len(found) == 1319
    joined = "\n".join(f"{question.text} {question.worked}" for question in found)
    assert digest(joined) == "fdabe013758b0221578234c6f778f9fe263a2f69662c5f392145ca1ef6f4f9c2"


def test_no_heldout_question_or_template_is_in_training(train):
    heldout = task.heldout()
    assert not {digest(q.text) for q in heldout} & {digest(q.text) for q in train}
    assert not {q.template for q in heldout} & {q.template for q in train}


def test_the_splits_divide_the_templates():
    """Not only what was drawn: of all templates, none is on both sides, and each side has many."""
    names = {
        split: {
            task.template(*entry) for found in task.templates(split).values() for entry in found
        }
        for split in ("train", "heldout")
    }
    assert not names["train"] & names["heldout"]
    share = len(names["heldout"]) / sum(map(len, names.values()))
    assert 0.15 < share < 0.25  # one in five, by a hash: 4 standard errors are 0.02
    for scene in SCENES:
        for found in names.values():
            assert any(name.startswith(f"{scene.noun}:") for name in found)


def test_seeds_repeat_and_differ():
    first = task.questions("train", 50, seed=3)
    assert task.questions("train", 50, seed=3) == first
    assert task.questions("train", 50, seed=4) != first


def test_every_worked_answer_is_arithmetically_right(train):
    """Recomputed by Python itself: each step, the chain, and the final number."""
    for question in [*train[:5000], *task.heldout()]:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", question.worked)
        assert len(steps) == question.steps
        for left, sign, right, result in steps:
            assert eval(f"{left} {sign} {right}") == int(result)  # digits and one sign only
        assert question.worked.endswith(f"= {question.answer}. #### {question.answer}")
        given = set(re.findall(r"\d+", question.text)) | {"2"}  # half, double
        for number, (left, _, right, _) in enumerate(steps):
            known = given | {result for *_, result in steps[:number]}
            assert {left, right} <= known, question


def test_every_number_of_the_text_is_used(train):
    for question in train[:2000]:
        asked = Counter(re.findall(r"\d+", question.text))
        operands = re.findall(r"\d+(?= [-+*/])|(?<=[-+*/] )\d+", question.worked)
        assert not asked - Counter(operands), question


def test_steps_are_equally_likely(train):
    counts = Counter(question.steps for question in train)
    expected, error = TRAIN_DRAWN / 4, math.sqrt(TRAIN_DRAWN * 3 / 16)
    # Duplicates are dropped, which costs the shortest questions a few; 5 standard errors.
    assert all(abs(counts[steps] - expected) < 5 * error for steps in (1, 2, 3, 4)), counts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("34 + 12 = 46. #### 46", 46),
        ("34 + 12 = 46. #### 46<eos>", 46),
        ("34 + 12 = 46. #### 46<eos><eos>\nQuestion: #### 3", 46),
        ("#### 7", 7),
        ("34 + 12 = 46.", None),
        ("34 + 12 = 46. ####", None),
        ("#### <eos> 12", None),
        ("#### 46 apples", None),
        ("#### 46. #### 47", None),
        ("#### ####", None),
        ("#### -4", None),
        ("", None),
    ],
)
def test_parse_answer(text, answer):
    assert task.parse_answer(text) == answer


def test_the_worked_answers_parse():
    assert all(task.parse_answer(q.worked) == q.answer for q in task.heldout())


def test_prompts_are_one_rectangle(train):
    asked = [*task.heldout(), *train[:500]]
    ids = few_shot.prompt_ids(asked)
    assert ids.shape == (len(asked), few_shot.PROMPT_TOKENS)
    for row, question in zip(ids.tolist(), asked, strict=True):
        text = tokenizer.decode(row)
        assert text == few_shot.prompt(question)
        assert text.endswith(f"Question: {question.text}\nAnswer:")
        assert text.count("<eos>") == 2


def test_examples_come_from_training():
    heldout = {question.text for question in task.heldout()}
    for question in task.heldout():
        shown = re.findall(r"Question: (.*)\nAnswer: \d", few_shot.prompt(question))
        assert len(set(shown)) == 2
        assert not set(shown) & heldout


def test_no_worked_answer_is_cut_off(train):
    longest = max(len(tokenizer.encode(q.worked)) for q in [*train, *task.heldout()])
    assert longest + 1 <= few_shot.MAX_NEW_TOKENS  # and <eos>


def test_texts_survive_the_tokenizer(train):
    for question in [*train[:2000], *task.heldout()]:
        text = few_shot.example(question)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, len(tokenizer.VOCABULARY) - 1), min_size=1, max_size=60))
def test_any_tokens_survive_the_tokenizer(ids):
    """Also what an untrained model writes."""
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_the_vocabulary_is_used_and_unique(train):
    used = set()
    for question in train:
        used.update(tokenizer.encode(few_shot.example(question)))
    assert used == set(range(len(tokenizer.VOCABULARY)))
    assert len(set(tokenizer.VOCABULARY)) == len(tokenizer.VOCABULARY)


def test_what_is_not_known_is_named():
    with pytest.raises(sm.ConfigError, match="'platypus' is not among the 288 tokens"):
        tokenizer.encode("Mia has 3 platypus.")
    with pytest.raises(sm.ConfigError, match="holds no token"):
        tokenizer.encode(" ")
    with pytest.raises(sm.ConfigError, match="token 288 does not exist"):
        tokenizer.decode([288])
    with pytest.raises(sm.ConfigError, match="split must be 'train' or 'heldout', got 'test'"):
        task.questions("test", 3)
    for count in (0, True, 2.0):
        with pytest.raises(sm.ConfigError, match="count must be a whole number"):
            task.questions("train", count)
    long = task.Question("Mia has 3 apples. " * 30, "#### 3", 3, 1, "none")
    with pytest.raises(sm.ConfigError, match="no two examples have 8 tokens together"):
        few_shot.prompt(long)
