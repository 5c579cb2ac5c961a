"""The lab's game: every fault can be told from every other, and the check says so or why not."""

from pathlib import Path
from random import Random

import pytest
import torch

import stepmoe as sm
from stepmoe import faults
from stepmoe.faults import FAULTS, Case, Setting, WrongGuess
from stepmoe.faults.game import _draw, _suspects
from stepmoe.faults.traits import Place, Traits, factor, traits_of
from stepmoe.measure.task import Task

TINY = Path(__file__).parents[1] / "step3p5-tiny-reference"
IDS = torch.randint(256, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exact():
    return faults.exact_pass(TINY, IDS)


@pytest.mark.parametrize("attention", ["tp", "dp"])
@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_suspects_can_be_told_apart(ranks4, exact, variant, attention):
    setting = Setting(TINY, variant, sm.ParallelConfig(4, 2, attention), torch.float32)
    traits = {"one_rank_branches": Traits(hung=True)}
    for fault in _suspects(setting):
        if fault not in traits:
            traits[fault] = traits_of(faults.examine(ranks4, setting, IDS, fault, exact), exact)
    assert len(traits) >= 6
    for name, own in traits.items():
        assert own.difference(own) is None
        for other in traits.keys() - {name}:
            assert own.difference(traits[other]), (name, other)


def seed_of(fault: str) -> int:
    return next(s for s in range(1000) if _draw(TINY, Random(s))[0] == fault)


@pytest.mark.parametrize("fault", ["wrong_group", "gate_wrong_dimension", "dump_records_partial"])
def test_a_case_is_solved_by_its_name_alone(ranks4, fault):
    case = Case(ranks4, TINY, IDS, seed_of(fault))
    assert fault in case.suspects
    assert case.timeout == ""
    assert case.check(fault) == f"Yes: {FAULTS[fault].what}."
    for guess in set(FAULTS) - {fault}:
        with pytest.raises(WrongGuess, match=f"{guess} cannot occur|Not {guess}: then the") as hint:
            case.check(guess)
        assert fault not in str(hint.value)
    with pytest.raises(sm.ConfigError, match="'no such' is no fault"):
        case.check("no such")


def test_the_traffic_of_a_case_is_promise_and_ledger(ranks4):
    case = Case(ranks4, TINY, IDS, seed_of("wrong_group"))
    lines = case.traffic(1).splitlines()
    assert {line.split()[0] for line in lines} == {"promised", "sent"}
    assert any(line.startswith("sent") and "over ep (2 ranks)" in line for line in lines)
    assert not any(line.startswith("promised") and "over ep" in line for line in lines)


def test_every_fault_is_drawn():
    drawn = [_draw(TINY, Random(seed)) for seed in range(300)]
    assert {fault for fault, _ in drawn} == set(FAULTS)
    assert all(fault in _suspects(setting) for fault, setting in drawn)


def test_factor_is_the_least_squares_fit():
    x = torch.randn(50)
    assert factor(4 * x, x) == pytest.approx(4, rel=1e-6)  # float32 in, float64 inside
    noise = torch.randn(50)
    noise -= x * (noise @ x) / (x @ x)  # at right angles to x: no fit follows it
    assert factor(0.5 * x + noise, x) == pytest.approx(0.5, abs=1e-5)


def test_evidence_is_the_first_wrong_value_of_every_rank(ranks4, exact):
    setting = Setting(TINY, "deferred", sm.ParallelConfig(4, 2), torch.float32)
    found = faults.examine(ranks4, setting, IDS, "dense_reduced_twice", exact)
    name, right, arrived = faults.evidence(found, exact)
    assert name == str(Place(0, "mlp_output"))
    for value in arrived.values():
        # float32 against float64: 1e-4 of values up to some units
        torch.testing.assert_close(value.double(), 4 * right, atol=1e-3, rtol=1e-4)
    assert sorted(arrived) == [0, 1, 2, 3]
    correct = faults.evidence(faults.examine(ranks4, setting, IDS, None, exact), exact)
    assert correct[0] == "logits"


def test_answers_under_a_fault_are_scored(ranks4):
    """A random model's own answers count as right: without a fault all are, with one fewer."""
    alone = sm.Step3p5ForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    alone.config = alone.config.replace(eos_token_ids=())
    prompts = torch.randint(256, (6, 9), generator=torch.Generator().manual_seed(3))
    expected = alone.generate(prompts, 4)[:, 9:]
    keys = tuple(int(row @ torch.tensor([1, 300, 300**2, 300**3])) for row in expected)

    def read(tokens: list[int]) -> int:
        return sum(token * 300**i for i, token in enumerate(tokens))

    task = Task("itself", prompts, keys, read, 4)
    names = [None, "gate_wrong_dimension", "dense_reduced_twice", "pending_lost_at_end"]
    frame = faults.accuracy_under(ranks4, str(TINY), task, names, batch_size=4)
    assert list(frame.fault) == ["none", *names[1:]]
    assert list(frame.right[:2]) == [6, 6]  # fusion silently off: every answer right
    assert frame.right[2] < 6
    assert list(frame.ranks_agree[:3]) == [True] * 3
    assert not frame.ranks_agree[3]  # each rank has its own addend, and its own next token
    assert frame.attrs["questions"] == 6
