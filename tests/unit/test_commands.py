"""What a user of the command line can get wrong: named, with status 2, before any rank starts."""

import pytest
import torch

import stepmoe as sm
from stepmoe import command_checks
from stepmoe.__main__ import COMMANDS, main, parser
from stepmoe.launch import Ranks

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
        ("bench", "--timeout nan", "--timeout nan: give seconds"),
        ("accuracy", "--model {file}", "{file} is not valid JSON"),
        ("prefill", "--weights {file}", "{file} is a file: give the folder"),
        *(
            (name, "--json {folder}", "cannot write into {folder} (Is a directory)")
            for name in ("bench", "prefill", "accuracy", "recovery", "bench-fusion")
        ),
        ("bench", "--csv {file}/x.csv", "cannot write into {file}/x.csv (Not a directory)"),
        ("bench", "--json {folder}/no/x.json", "cannot write into {folder}/no/x.json"),
    ],
)
def test_a_wrong_argument_is_named(name, words, message, tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("no JSON")
    places = {"file": file, "folder": tmp_path}
    device = ["--device", "cpu"]
    assert main([name, *words.format(**places).split(), *device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m stepmoe {name}: ")
    assert message.format(**places) in error
    assert "Traceback" not in error


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
