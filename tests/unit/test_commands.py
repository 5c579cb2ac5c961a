"""What a user of the command line can get wrong: named, with status 2, before any rank starts."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

import stepmoe as sm
from stepmoe import __main__, bench_fusion, command, command_checks, mini
from stepmoe.__main__ import COMMANDS, main, parser
from stepmoe.faults import __main__ as faults
from stepmoe.launch import Ranks
from stepmoe.multi_gpu import recovery

NAMES = [
    "doctor",
    "bench",
    "bench-fusion",
    "prefill",
    "layer-floor",
    "accuracy",
    "recovery",
    "multi-gpu",
]


class StartedError(Exception):
    """Ranks were about to start."""


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise StartedError

    monkeypatch.setattr(Ranks, "__init__", refuse)


def test_every_command_explains_itself(capsys):
    known = parser().format_help()
    assert len(COMMANDS) == len(NAMES)
    for name in NAMES:
        assert name in known
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        assert f"python -m stepmoe {name}" in capsys.readouterr().out


def options_of(name):
    """What the parser of a command knows."""
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]._actions


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained(name):
    for option in options_of(name):
        assert option.help, option.option_strings
        others = (True, False, None, [], "==SUPPRESS==")
        if option.default not in others and option.option_strings != ["--variants"]:
            assert "default: " in option.help, option.option_strings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("multi-gpu", "--ranks 2"),  # names that were
        ("bench-fusion", "--rounds 6"),
        ("prefill", "--weights folder"),
        *((name, "--nonsense") for name in NAMES),
    ],
)
def test_an_unknown_option_is_argparse_s_to_refuse(name, words, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, *words.split()])
    assert left.value.code == 2
    assert f"error: unrecognized arguments: {words}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench", "prefill", "accuracy"])
def test_the_defaults_are_accepted(name):
    """Those of prefill were not: 8192 tokens of input, and 2048 positions."""
    with pytest.raises(StartedError):
        main([name, "--device", "cpu"])


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("bench", "--tp 3", "16 query heads"),
        ("accuracy", "--tp 0", "tp must be a whole number of at least 1, got 0"),
        ("prefill", "--tp 4 --ep 3", "ep=3 does not divide tp=4"),
        ("bench", "--variants nope", "variant 'nope' is not known: use one of three_all_reduces"),
        ("accuracy", "--questions -1", "questions must be a whole number from 1 to 1319, got -1"),
        ("bench", "--timeout nan", "timeout=nan: give seconds"),
        ("accuracy", "--model {file}", "{file} is a file: give the folder"),
        ("prefill", "--model {file}", "{file} is a file: give the folder"),
        *(
            (name, "--json {folder}", "cannot write into {folder} (Is a directory)")
            for name in ("bench", "prefill", "accuracy", "recovery", "bench-fusion")
        ),
        ("prefill", "--model {weightless} --input-len 8", "holds neither model.safetensors nor"),
        ("accuracy", "--model {weightless}", "holds neither model.safetensors nor"),
        # A shell's variable that is not set: no reason to measure another model.
        ("prefill", "--model=", "no config.json at ."),
        ("accuracy", "--model=", "no config.json at ."),
        ("prefill", "--seed -1", "seed must be a whole number of at least 0, got -1"),
        ("prefill", "--shape flash --model {folder}", "a checkpoint has its own shape; give one"),
        ("bench", "--timeout inf", "timeout=inf: give seconds, more than 0 and at most"),
        ("recovery", "--tp 1", "--tp must be a whole number of at least 2, got 1"),
        ("recovery", "--hidden 0", "--hidden must be a whole number of at least 1, got 0"),
        ("bench", "--csv {file}/x.csv", "cannot write into {file}/x.csv (Not a directory)"),
        (
            "bench",
            "--json {folder}/x --csv {folder}/x",
            "--csv {folder}/x: give each a file of its",
        ),
        ("bench", "--json {folder}/no/x.json", "cannot write into {folder}/no/x.json"),
    ],
)
def test_a_wrong_argument_is_named(name, words, message, tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("no JSON")
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    shutil.copy(mini.path() / "config.json", weightless)
    places = {"file": file, "folder": tmp_path, "weightless": weightless}
    device = ["--device", "cpu"]
    assert main([name, *words.format(**places).split(), *device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m stepmoe {name}: ")
    assert message.format(**places) in error
    assert error.count("\n") == 1


class NoRanks:
    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Torchrun:
    """Makes this process one of two ranks that torchrun started."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.waited = monkeypatch, []
        monkeypatch.setattr(__main__.time, "sleep", self.waited.append)
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
            monkeypatch.setenv(name, value)

    def become(self, rank):
        self.monkeypatch.setenv("RANK", str(rank))


@pytest.fixture
def torchrun(monkeypatch):
    return Torchrun(monkeypatch)


def test_of_torchrun_s_ranks_the_first_says_what_is_refused(torchrun, capsys):
    """The others wait to be ended by torchrun; one that is not was alone with its error."""
    assert main(["bench", "--tp", "4"]) == 2
    said = "--tp 4: torchrun started 2 ranks; leave --tp out\n"
    assert capsys.readouterr().err == f"python -m stepmoe bench: {said}"
    assert torchrun.waited == []
    torchrun.become(1)
    assert main(["bench", "--tp", "4"]) == 2
    assert capsys.readouterr().err == f"python -m stepmoe bench: rank 1: {said}"
    assert torchrun.waited == [10]


@pytest.mark.parametrize(
    "error",
    [
        sm.RankError("it broke", rank=1),
        sm.RankTimeout("it broke", waiting={}),
        command.FailedError("it broke"),
    ],
)
def test_what_fails_later_each_rank_says_at_once(error, torchrun, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(bench_fusion, "_check", fail)
    for rank, where in ((0, ""), (1, "rank 1: ")):
        torchrun.become(rank)
        assert main(["bench-fusion"]) == 1
        assert capsys.readouterr().err == f"python -m stepmoe bench-fusion: {where}it broke\n"
    assert torchrun.waited == []


def test_a_wrong_sum_after_a_loss_is_said_in_a_line(monkeypatch, capsys):
    def wrong(*_):
        raise RuntimeError("triton: a rank was killed, and the next sum was off by 0.3")

    monkeypatch.setattr(recovery, "Ranks", NoRanks)
    monkeypatch.setattr(recovery, "measure_recovery", wrong)
    assert main(["recovery", "--device", "cpu"]) == 1
    said = "triton: a rank was killed, and the next sum was off by 0.3"
    assert capsys.readouterr().err == f"python -m stepmoe recovery: {said}\n"


def test_what_a_rank_finds_wrong_while_it_measures_has_failed(torchrun, monkeypatch, capsys):
    def wrong(*_):
        raise sm.ConfigError("not on this GPU")

    monkeypatch.setattr(command, "_measure", wrong)
    torchrun.become(1)
    assert main(["bench", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "python -m stepmoe bench: rank 1: not on this GPU\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("layer-floor", "torchrun started 2 ranks, and this command starts what it needs: leave"),
        ("recovery", "torchrun started 2 ranks, and this command starts what it needs: leave"),
        ("multi-gpu --list", "torchrun started 2 ranks, and this command starts what it needs"),
        ("bench --tp 4 --simulate-rank 1", "--simulate-rank 1 runs alone, and torchrun started 2"),
        ("prefill --tp 4 --simulate-rank 1", "--simulate-rank 1 runs alone, and torchrun started"),
    ],
)
def test_what_is_one_process_refuses_torchrun(words, message, torchrun, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_kept_without_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.shown_folder("models/mine") == "models/mine"
    assert command.shown_folder("stepfun-ai/Step-3.5-Flash") == "stepfun-ai/Step-3.5-Flash"
    assert command.shown_folder(f"{tmp_path}/models/mine") == "models/mine"
    assert command.shown_folder("/home/someone/models/mine/") == ".../mine"


@pytest.mark.parametrize("option", ["--model", "--shape"])
def test_the_recorded_command_names_no_place_of_this_machine(option, tmp_path, capsys):
    words = f"prefill {option} {mini.path()} --layers 0 --simulate-rank 0 --tp 1 --input-len 5"
    words += f" --prompts 1 --variants deferred --device cpu --json {tmp_path}/x.json"
    assert main([*words.split(), "--csv", f"{tmp_path}/x.csv"]) == 0
    text = (tmp_path / "x.json").read_text()
    line = json.loads(text)["attrs"]["command"]
    shown = command.shown_folder(str(mini.path()))
    assert f"{option} {shown} " in f"{line} "
    assert str(tmp_path) not in text
    assert str(Path.cwd()) not in text
    again = vars(parser().parse_args(line.split()[3:]))
    given = vars(parser().parse_args(words.split()))
    # What was left to its default is in the line, too.
    assert {name: again[name] for name in ("layers", "tp", "input_len", "prompts", "variants")} == {
        name: given[name] for name in ("layers", "tp", "input_len", "prompts", "variants")
    }


def test_the_bug_lab_s_command_is_kept_without_its_file(tmp_path, monkeypatch, capsys):
    kept = Path(__file__).parents[2] / "notebooks/results/bug_lab.json"
    monkeypatch.setattr(faults, "Ranks", NoRanks)
    monkeypatch.setattr(faults, "accuracy_under", lambda *_, **__: sm.measure.load(kept))
    file = tmp_path / "x.json"
    monkeypatch.setattr("sys.argv", ["x", "--questions", "3", "--json", str(file)])
    faults.main()
    found = json.loads(file.read_text())["attrs"]["command"]
    assert found == "python -m stepmoe.faults --questions 3"


@pytest.mark.parametrize(("kept", "words"), [(None, "torch.bfloat16"), ("fp8", "FP8 weights")])
def test_too_little_memory_is_said_of_the_weights_as_they_are_held(kept, words, monkeypatch):
    monkeypatch.setattr(command_checks.os, "sysconf", lambda name: 1000)  # 1 MB
    config, parallel = sm.Step3p5Config.flash(), sm.ParallelConfig(8, 4)
    with pytest.raises(sm.ConfigError, match=f"with tp=8 and {words}; this machine has 0"):
        command_checks.check_memory(config, parallel, torch.bfloat16, "cpu", kept)


def test_trying_to_write_leaves_nothing(tmp_path):
    kept, new = tmp_path / "kept.json", tmp_path / "new.json"
    kept.write_text("{}")
    for file in (kept, new):
        with pytest.raises(StartedError):
            main(["bench", "--device", "cpu", "--json", str(file)])
    assert kept.read_text() == "{}"
    assert not new.exists()


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ranks, "__init__", interrupt)
    assert main(["bench", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
