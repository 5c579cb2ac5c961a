"""Answers on real ranks: what the oracle would say, from every variant, and from the command line.

The functions that take `config` or `setting` first run inside the ranks.
"""

import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

import stepmoe as sm
from stepmoe import mini
from stepmoe.checkpoint_writer import save_pretrained
from stepmoe.launch import rank_device
from stepmoe.measure.answering import answer
from stepmoe.measure.source import load
from stepmoe.measure.task import Task
from stepmoe.parallel import tensor_layouts
from stepmoe.random_weights import random_tensor

ROOT = Path(__file__).parents[2]
VOCABULARY = 61
# Every sixth token ends the sequence: ends come at different steps of different questions.
CONFIG = sm.Step3p5Config.tiny().replace(
    vocab_size=VOCABULARY, eos_token_ids=tuple(range(0, VOCABULARY, 6)), torch_dtype="float64"
)
NEW = 7


def completions_of_the_oracle(prompts):
    """Greedy, one question at a time, without a cache."""
    layouts = tensor_layouts(CONFIG, sm.ParallelConfig(), 0)
    weights = {name: random_tensor(name, layout, 0) for name, layout in layouts.items()}
    rows = []
    for prompt in prompts:
        ids = prompt[None]
        while ids.shape[1] < prompts.shape[1] + NEW:
            new = oracle.forward(CONFIG, weights, ids)["logits"][:, -1:].argmax(-1)
            ids = torch.cat((ids, new), dim=1)
            if int(new) in CONFIG.eos_token_ids:
                break
        rows.append(ids[0, prompts.shape[1] :].tolist())
    return [row + [row[-1]] * (NEW - len(row)) for row in rows]


def answers_here(config, variant, parallel, prompts, batch_size):
    model = load(config, variant, parallel, torch.float64, rank_device())
    return answer(model, prompts, NEW, batch_size)


@pytest.fixture(scope="module")
def asked():
    prompts = torch.randint(VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(11))
    expected = completions_of_the_oracle(prompts)
    going_on = [sum(token not in CONFIG.eos_token_ids for token in row) for row in expected]
    assert len(set(going_on)) > 1, "the case is to have sequences of different lengths"
    return prompts, expected


@pytest.mark.parametrize("attention", ["tp", "dp"])
@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_answers_are_the_oracle_s(ranks4, asked, variant, attention):
    prompts, expected = asked
    parallel = sm.ParallelConfig(4, 2, attention)
    # Batches of 3 and 2, which four ranks cannot share evenly. float64: no ties are broken.
    for completions in ranks4.run(answers_here, CONFIG, variant, parallel, prompts, 3):
        assert completions.tolist() == expected


def read_sum(tokens):
    """The answer of the made-up task; some are invalid."""
    total = sum(tokens)
    return total if total % 5 else None


def test_compare_accuracy_scores_what_the_oracle_answers(ranks4, asked):
    prompts, expected = asked
    truth = [read_sum(row) for row in expected]
    right = [0 if answer is None else answer for answer in truth]
    right[0] += 1  # so that at least one is wrong
    task = Task("sums", prompts, tuple(right), read_sum, NEW)
    frame = sm.measure.compare_accuracy(
        ["three_all_reduces", "fused"], task, source=CONFIG, parallel=sm.ParallelConfig(4),
        ranks=ranks4, dtype="float64", batch_size=2,
    )  # fmt: skip
    assert frame["variant"].tolist() == ["three_all_reduces", "fused"]
    for _, row in frame.iterrows():
        assert sm.measure.outcomes_of(row).answers == tuple(truth)
        wrong = 1 if truth[0] is not None else 0
        assert row["right"] == 5 - wrong - truth.count(None)
        assert row["invalid"] == truth.count(None)
        assert row["ranks_agree"]
        assert 0 < row["seconds"] < 60
    assert frame.attrs["hardware"]["ranks"] == 4
    first, second = frame.to_dict("records")
    assert sm.measure.paired(first, second).flips == 0


def test_the_command_measures_prints_and_keeps(tmp_path):
    config = mini.config().with_layers(0, 1)
    save_pretrained(sm.Step3p5ForCausalLM.from_config(config), tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "stepmoe", "accuracy", "--model", str(tmp_path), "--tp", "2",
         "--variants", "fused", "--questions", "5", "--batch-size", "4", "--device", "cpu",
         "--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of 5" in done.stdout
    assert "bfloat16" in done.stdout
    frame = sm.measure.load(tmp_path / "a.json")
    assert frame["questions"].tolist() == [5]
    assert frame.attrs["command"].startswith("python -m stepmoe accuracy --tp 2 --ep 1")
    assert frame["asked"][0] == sm.measure.word_problems(5).digest
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
