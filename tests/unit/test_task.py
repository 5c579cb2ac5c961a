"""Questions, answers and scores, to a table, to a file and back."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd
import pytest
import torch

import stepmoe as sm
from stepmoe import mini
from stepmoe.__main__ import main
from stepmoe.checkpoint_writer import save_pretrained
from stepmoe.measure.report import accuracy_table
from stepmoe.measure.task import Outcomes, Task
from stepmoe.mini import few_shot, tokenizer
from stepmoe.mini.task import heldout


def first_token(tokens: list[int]) -> int | None:
    """Answers of a made-up task: the first token; 9 is no answer."""
    return None if tokens[0] == 9 else tokens[0]


def made_up(expected: list[int]) -> Task:
    return Task(
        "made up", torch.arange(2 * len(expected)).view(-1, 2), (*expected,), first_token, 1
    )


def test_every_mark_of_a_score():
    task = made_up([3, 4, 5, 6])
    outcomes = task.score(torch.tensor([[3, 0], [5, 4], [9, 5], [6, 9]]))
    assert outcomes == Outcomes("10-1", (3, 5, None, 6))
    assert outcomes.right == [True, False, False, True]
    assert (outcomes.num_right, outcomes.num_invalid) == (2, 1)
    assert outcomes.accuracy.value == 0.5
    assert outcomes.answers_changed(Outcomes("-0-1", (None, 7, None, 6))) == 2


def test_outcomes_survive_being_a_row():
    draw = random.Random()
    answers = tuple(draw.choice([None, draw.randint(0, 999)]) for _ in range(50))
    marks = "".join("-" if a is None else draw.choice("01") for a in answers)
    outcomes = Outcomes(marks, answers)
    assert Outcomes.from_row(**outcomes.to_row()) == outcomes


def test_word_problems_are_read_by_their_own_reader():
    task = sm.measure.word_problems(40)
    assert len(sm.measure.word_problems()) == 1319
    assert task.prompts.shape == (40, few_shot.PROMPT_TOKENS)
    assert task.expected == tuple(question.answer for question in heldout()[:40])
    # The worked answers themselves are what a perfect model adds; another question's is wrong, and
    # one token over and over is invalid.
    worked = [[*tokenizer.encode(q.worked), tokenizer.EOS] for q in heldout()[:40]]
    rows = [row + [tokenizer.EOS] * (task.max_new_tokens - len(row)) for row in worked]
    assert task.score(torch.tensor(rows)).marks == "1" * 40
    other = next(i for i in range(40) if task.expected[i] != task.expected[0])
    rows[0], rows[1] = rows[other], [worked[1][0]] * task.max_new_tokens
    assert task.score(torch.tensor(rows)).marks == "0-" + "1" * 38


def test_the_digest_tells_tasks_apart():
    task = made_up([3, 4])
    assert task.digest == made_up([3, 4]).digest
    assert task.digest != made_up([3, 5]).digest
    assert task.digest != Task("made up", task.prompts + 1, (3, 4), first_token, 1).digest
    assert sm.measure.word_problems(5).digest != sm.measure.word_problems(6).digest


def row(variant: str, marks: str, asked: str = "q") -> dict[str, object]:
    outcomes = Outcomes(marks, tuple(None if m == "-" else int(m) for m in marks))
    return {
        "variant": variant, "tp": 2, "ep": 1, "attention": "tp", "dtype": "float32",
        "questions": len(marks), "right": outcomes.num_right, "invalid": outcomes.num_invalid,
        "accuracy": outcomes.accuracy.value, "low": outcomes.accuracy.low,
        "high": outcomes.accuracy.high, "seconds": 1.5, "ranks_agree": variant != "fused",
        **outcomes.to_row(), "asked": asked,
    }  # fmt: skip


@pytest.fixture
def frame() -> pd.DataFrame:
    frame = pd.DataFrame([row("deferred", "1101-1"), row("fused", "011101")])
    frame.attrs = {
        "recorded": False,
        "hardware": {"ranks": 2, "gpus": [], "backend": "gloo", "hosts": 1, "cores": 2, "cpu": "A"},
        "versions": {"torch": "2.13.0"}, "dtype": "float32", "date": "2026-11-25T11:00:00+00:00",
        "parallel": {"tp": 2, "ep": 1, "attention": "tp"}, "task": "made up", "questions": 6,
        "batch_size": 4,
    }  # fmt: skip
    return frame


def test_rows_are_paired_question_by_question(frame):
    first, second = frame.to_dict("records")
    found = sm.measure.paired(first, second)
    assert (found.both, found.only_first, found.only_second, found.neither) == (3, 1, 1, 1)
    with pytest.raises(sm.ConfigError, match="deferred and fused were asked different questions"):
        sm.measure.paired(first, {**second, "asked": "other"})


def test_a_file_gives_every_outcome_back(frame, tmp_path):
    sm.measure.save(frame, tmp_path / "accuracy.json")
    again = sm.measure.load(tmp_path / "accuracy.json")
    pd.testing.assert_frame_equal(again, frame)
    assert again.attrs == {**frame.attrs, "recorded": True}
    assert [sm.measure.outcomes_of(r) for _, r in again.iterrows()] == [
        sm.measure.outcomes_of(r) for _, r in frame.iterrows()
    ]


def test_the_table_says_how_many_how_sure_and_where(frame):
    text = accuracy_table(frame)
    assert "4 of 6        1     0.667  0.300 to 0.903" in text
    assert text.count("DISAGREE") == 1
    assert "live: 2 CPU ranks on 2 cores (A), gloo, float32" in text
    with pytest.raises(sm.ConfigError, match="not what compare_accuracy returned"):
        accuracy_table(frame.drop(columns="marks"))


TASK = made_up([1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sm.measure.word_problems(0),
            "questions must be a whole number from 1 to 1319, got 0",
        ),
        (lambda: sm.measure.word_problems(1320), "got 1320"),
        (lambda: TASK.score(torch.zeros(3, 1)), "3 completions for 2 questions"),
        (lambda: Outcomes.from_row("11", "3"), "2 marks and 1 answers"),
        (lambda: Outcomes.from_row("1x", "3 4"), "2 marks and 2 answers"),
        (lambda: Outcomes("1", (1,)).answers_changed(Outcomes("11", (1, 1))), "1 and 2 questions"),
        (lambda: compare(batch_size=0), "batch_size must be a whole number of at least 1, got 0"),
        (lambda: compare(dtype="int8"), "'int8'"),
        (lambda: compare(variants=["four"]), "'four'"),
        (lambda: compare(variants=[]), "variants is empty"),
        (lambda: compare(parallel=sm.ParallelConfig(2)), "tp=2 and 1 rank"),
        (lambda: compare(parallel=sm.ParallelConfig(2, simulate_rank=0)), "simulate_rank=0"),
        (lambda: compare(source=sm.Step3p5Config.tiny().replace(vocab_size=3)), "vocabulary of 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(sm.ConfigError, match=message):
        call()


def compare(variants=("deferred",), source=None, **arguments):
    source = source or sm.Step3p5Config.tiny()
    return sm.measure.compare_accuracy(variants, TASK, source=source, **arguments)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(sm.Step3p5ForCausalLM.from_config(mini.config().with_layers(0, 1)), folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tp", "3"], "tp=3"),
        (["--questions", "0"], "from 1 to 1319, got 0"),
        (["--variants", "four"], "'four'"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--batch-size", "0"], "batch_size must be a whole number of at least 1, got 0"),
        (["--csv", "no/such/a.csv"], "no/such"),
        (["--timeout", "-1"], "timeout=-1.0: give seconds"),
    ],
)
def test_the_command_names_a_bad_argument_and_starts_nothing(
    arguments, named, capsys, monkeypatch, checkpoint
):
    from stepmoe import command

    monkeypatch.setattr(command, "Ranks", None)  # starting them would fail
    assert main(["accuracy", "--device", "cpu", "--model", checkpoint, *arguments]) == 2
    assert named in capsys.readouterr().err


RECORDED = sorted((Path(__file__).parents[2] / "notebooks" / "results").glob("accuracy_*.json"))


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_runs_were_asked_today_s_questions(file):
    """What is recorded is scored again from its answers: a change of the task makes it stale."""
    task = sm.measure.word_problems()
    for _, row in sm.measure.load(file).iterrows():
        assert row["asked"] == task.digest
        outcomes = sm.measure.outcomes_of(row)
        right = [a == b for a, b in zip(outcomes.answers, task.expected, strict=True)]
        assert outcomes.right == right
        assert row["right"] == sum(right)
        assert row["ranks_agree"]


def test_there_are_recorded_runs():
    assert len(RECORDED) >= 7
