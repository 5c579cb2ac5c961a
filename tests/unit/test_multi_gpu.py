"""The run on several GPUs: its plan, resuming, its budget, what it refuses; with made-up steps."""

import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import stepmoe as sm
from stepmoe.__main__ import main, parser
from stepmoe.multi_gpu import machine
from stepmoe.multi_gpu.plan import RANKS, RESULT, Setting, Step, steps_of
from stepmoe.multi_gpu.records import file_of, read, read_all, unfinished_file_of
from stepmoe.multi_gpu.run import Outcome, run_command, run_steps

REPO = Path(__file__).parents[2]
HERE = Setting(8, "cuda", "flash", 8, "NVIDIA H200", 141 * 10**9)
STEPS = [Step(name, "made up", f"python {name} {RESULT}", 100, 150) for name in ("a", "b", "c")]


class Machine:
    """Runs made-up commands in made-up time: name to (seconds, exit status, what it writes)."""

    def __init__(self, **steps):
        self.steps, self.now, self.ran = steps, 0.0, []

    def clock(self):
        return self.now

    def execute(self, words, limit):
        _, name, file = words
        seconds, status, written = self.steps[name]
        self.ran.append(name)
        self.now += min(seconds, limit)
        if written is not None:
            Path(file).write_text(written)
        return Outcome(None if seconds > limit else status, f"the output of {name}\n{Path.cwd()}/x")

    def run(self, folder, steps=STEPS, minutes=None):
        return run_steps(steps, folder, HERE, {"cpu": "x"}, minutes, self.execute, self.clock)


# A file of before the date was kept: a report would need it.
LACKING = json.dumps(
    {"run": {"step": "a", "status": "done", "seconds": 1, "setting": HERE.identity()}}
)


def left(folder):
    known = read_all(folder, STEPS, HERE)
    return [step for step in STEPS if step.name not in known or not known[step.name].done]


def test_it_goes_on_where_it_stopped(tmp_path):
    found = '{"format": "x", "rows": [1]}'
    first = Machine(a=(90, 0, found), b=(20, 1, None), c=(999, 0, '{"half'))
    assert not first.run(tmp_path).left
    runs = {step.name: read(tmp_path, step.name).run for step in STEPS}
    assert [run["status"] for run in runs.values()] == ["done", "failed", "over its limit"]
    assert [run["seconds"] for run in runs.values()] == [90, 20, 150]
    assert runs["b"]["output"].startswith("the output of b")
    assert str(Path.cwd()) not in file_of(tmp_path, "b").read_text()
    kept = json.loads(file_of(tmp_path, "a").read_text())
    assert (kept["format"], kept["rows"], kept["run"]["command"]) == ("x", [1], "python a a.json")

    second = Machine(b=(10, 0, found), c=(10, 0, found))
    second.run(tmp_path, left(tmp_path))
    assert second.ran == ["b", "c"]
    assert left(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]


def test_a_step_that_wrote_nothing_is_not_done(tmp_path):
    Machine(a=(1, 0, None), b=(1, 0, '{"half'), c=(1, 0, "{}")).run(tmp_path)
    assert [step.name for step in left(tmp_path)] == ["a", "b"]
    for step in ("a", "b"):
        run = read(tmp_path, step).run
        assert (run["status"], run["limit"]) == ("failed", 150)
        first, *_, last = run["output"].splitlines()
        assert (first, last) == (f"the output of {step}", "it wrote no whole result")
    assert not {"output", "limit"} & read(tmp_path, "c").run.keys()


def test_what_an_interrupted_step_wrote_is_no_result(tmp_path):
    unfinished_file_of(tmp_path, "a").write_text('{"format": "x"}')
    assert left(tmp_path) == STEPS
    Machine(a=(1, 1, None)).run(tmp_path, STEPS[:1])
    assert read(tmp_path, "a").content["format"] != "x"


def test_a_budget_starts_nothing_that_would_not_fit_and_ends_what_overruns(tmp_path):
    machine = Machine(a=(40, 0, "{}"), b=(140, 0, "{}"), c=(1, 0, "{}"))
    short = Step("c", "made up", f"python c {RESULT}", 20, 30)
    finished = machine.run(tmp_path, [*STEPS[:2], STEPS[0], short], minutes=3)
    # 40 s of 180 gone: b fits with its 100 and has the other 140; then nothing fits.
    assert machine.ran == ["a", "b"]
    assert finished.left == ["a", "c"]
    finished = Machine(a=(40, 0, "{}"), c=(1, 0, "{}")).run(tmp_path, [STEPS[0], short], minutes=1)
    assert finished.left == ["a"]  # a shorter step behind it still fits


@pytest.mark.parametrize("text", ["{", "[]", '{"run": 1}', '{"run": {"step": "b"}}', "{}", LACKING])
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    file_of(tmp_path, "a").write_text(text)
    with pytest.raises(sm.ConfigError, match=r"a\.json is not a whole result .* delete it"):
        read_all(tmp_path, STEPS, HERE)
    assert read_all(tmp_path, STEPS, HERE, anew=["a"]) == {}


def test_results_of_another_machine_are_not_mixed(tmp_path):
    Machine(a=(1, 0, "{}")).run(tmp_path, STEPS[:1])
    other = Setting(4, "cuda", "flash", 4, "NVIDIA H100", 80 * 10**9)
    with pytest.raises(sm.ConfigError, match=r"is of ranks 8.*H200.*this run of ranks 4.*another"):
        read_all(tmp_path, STEPS, other)


@pytest.mark.parametrize("memory", [80e9, 141e9])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_command_of_the_plan_exists(ranks, memory):
    settings = [
        Setting(ranks, "cuda", "flash", ranks, "x", int(memory)),
        Setting(ranks, "cuda", "tiny", 1, "x", int(memory)),
        Setting(ranks, "cpu", "tiny", 0, "", 0),
    ]
    for setting in settings:
        steps = steps_of(setting)
        assert len({step.name for step in steps}) == len(steps)
        for step in steps:
            words = step.words("x.json")
            assert "x.json" in words
            assert step.estimate < step.limit
            if "stepmoe" in words:
                args = parser().parse_args(words[words.index("stepmoe") + 1 :])
                assert args.json == Path("x.json")
            else:
                files = [word for word in words if word.startswith("tests/")]
                assert files
                assert all((REPO / file).exists() for file in files)


def test_as_many_layers_as_fit():
    # 45 layers take 51 GB a rank at tp=8 (recorded: notebooks/results/h100_prefill.json).
    assert Setting(8, "cuda", "flash", 8, "x", 80 * 10**9).num_layers() == 45
    two = Setting(2, "cuda", "flash", 2, "x", 80 * 10**9)
    layers = two.num_layers()
    assert 45 * 80 / 400 < layers + 1 < 45 / 2  # 200 GB a rank at tp=2
    # Almost all weights take half, and the first three layers, which have no experts, are small.
    assert 1.8 * layers < two.num_layers("fp8") < 2.1 * layers
    commands = {step.name: step.command for step in steps_of(two)}
    assert f"--layers 0-{layers - 1}" in commands["prefill"]
    assert f"--layers 0-{two.num_layers('fp8') - 1}" in commands["prefill-fp8"]
    with pytest.raises(sm.ConfigError, match="not one layer of the published shape fits"):
        Setting(2, "cuda", "flash", 2, "x", 10**9).num_layers()


def test_a_command_at_its_limit_ends_with_its_children():
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
        "print(child.pid, flush=True); time.sleep(99)"
    )
    done = run_command(["python", "-c", code], 3)
    assert done.status is None
    child = int(done.output)
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")


def test_children_have_time_to_end(tmp_path):
    """Their leader ends at once when it is told to; a child writes something first."""
    file = tmp_path / "written"
    child = (
        "import signal, sys, time, pathlib\n"
        "def end(*_):\n"
        f"    time.sleep(1); pathlib.Path({str(file)!r}).write_text('x'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(99)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = run_command(["python", "-c", code], 2)
    assert (done.status, done.output) == (None, "ready\n")
    assert file.exists()


def test_a_command_that_fails_is_heard():
    failed = run_command(["python", "-c", "import sys; print('bad'); sys.exit(3)"], 30)
    assert (failed.status, failed.output) == (3, "bad\n")


TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tPHB\tSYS\t0-31\t0
GPU1\tNV18\t X \tNV18\tSYS\t0-31\t0
GPU2\tPHB\tNV18\t X \tSYS\t0-31\t0
NIC0\tSYS\tSYS\tSYS\t X
"""


def test_links_between_gpus():
    assert machine.links_of(TOPOLOGY) == ["NV18", "PHB"]
    assert machine.links_of("") == []


def smi(tmp_path, monkeypatch, script):
    """A made-up nvidia-smi."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_slow_links_are_remarked(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name)
    for topology, said in ((TOPOLOGY, ["linked by PHB"]), (TOPOLOGY.replace("PHB", "NV6"), [])):
        smi(tmp_path, monkeypatch, f"cat <<'E'\n{topology}E")
        found = machine.remarks(HERE)
        assert len(found) == len(said)
        assert all(words in remark for words, remark in zip(said, found, strict=True))


def test_without_nvidia_smi_s_word_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "versions", lambda on_gpu: {})
    smi(tmp_path, monkeypatch, "echo no driver >&2; exit 9")
    described = machine.describe_machine(HERE)
    assert described["nvidia_smi_error"].endswith("exit status 9: no driver")
    assert not {"gpus", "topology", "links"} & described.keys()
    smi(tmp_path, monkeypatch, f"[ $1 = topo ] && cat <<'E' || echo 1.2, H200\n{TOPOLOGY}E")
    described = machine.describe_machine(HERE)
    assert described["links"] == ["NV18", "PHB"]
    assert described["gpus"] == [{"driver_version": "1.2", "name": "H200"}]
    assert "nvidia_smi_error" not in described


class Gpu:
    name, total_memory = "NVIDIA H100", 80 * 10**9


@pytest.mark.parametrize(
    ("gpus", "words", "message"),
    [
        (0, "", "torch sees no GPU here. This needs 2, 4 or 8 NVIDIA GPUs"),
        (1, "", "2 ranks and 1 GPU here: each rank needs one of its own"),
        (4, "--tp 8", "8 ranks and 4 GPUs here: each rank needs one of its own. Give --tp 4"),
        (0, "--device cpu", "the published shape needs GPUs; add --shape tiny"),
        (8, "--only prefil", "--only prefil: the steps are kernels, variants, collectives"),
        (8, "--only prefill --again decode", "--again decode: the steps are prefill"),
        (8, f"--folder {__file__}", f"--folder {__file__} is a file: give a folder"),
        (8, "--compute x.json", "--compute x.json is for --report"),
        (8, "--minutes 0", "--minutes 0.0: give more than 0"),
        (8, "--folder /proc/none", "--folder /proc/none: cannot be made"),
        (8, "--report --folder nowhere", "--folder nowhere: no results in it"),
    ],
)
def test_it_refuses_before_anything_starts(gpus, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests/cuda").mkdir(parents=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr("stepmoe.multi_gpu.command.run_steps", lambda *_: pytest.fail("it started"))
    assert main(["multi-gpu", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_what_only_a_checkout_has_is_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["multi-gpu", "--device", "cpu", "--shape", "tiny"]) == 2
    assert "needs the folder tests: run it from a checkout" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_missing_packages_are_named_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    words = ["--device", "cpu", "--shape", "tiny", "--folder", str(tmp_path / "x")]
    assert main(["multi-gpu", *words, "--only", "prefill", "recovery"]) == 2
    assert "cloudpickle, ipyparallel, pandas, scipy: not installed" in capsys.readouterr().err
    assert main(["multi-gpu", "--list"]) == 0
    assert "FlashInfer is not installed, and will be missing" in capsys.readouterr().out


def test_the_plan_can_be_seen_anywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["multi-gpu", "--list", "--tp", "4", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Assuming 4 x a GPU of 80 GB" in shown
    assert "torchrun --nproc-per-node 4 -m stepmoe prefill --shape flash --ep 2" in shown
    assert "11 of 11 steps left" in shown
    assert sys.executable not in shown
