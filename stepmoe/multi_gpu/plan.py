"""What a run on several GPUs consists of: steps, each a command line of its own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.filling import weight_bytes
from stepmoe.fp8 import Quantization
from stepmoe.parallel import ParallelConfig

#: Stands in a command for the file that a step writes.
RESULT = "RESULT.json"
RANKS = (2, 4, 8)
# Of a GPU's memory: the rest is for activations, caches, graphs and the fused operation's windows.
# 45 layers at tp=8 take 0.64 of 80 GB (recorded), and are to fit.
_FOR_WEIGHTS = 0.72
# The published workload is 200 prompts on 8 GPUs. Fewer GPUs take longer over each, and get fewer.
_PROMPTS_A_GPU = 25
# Seconds of it, all layers. 200 prompts of 8192 tokens by four variants take 104 to 142 at the
# published 46 to 63 thousand tokens/s; the rest is for making weights and warming up.
_PREFILL = 240
_FLASH = Step3p5Config.flash()
_PYTEST = "python -m pytest -q -o addopts="  # the project's own ask for a plug-in
_PUBLISHED = "--input-len 8192 --output-len 1 --chunk 16384"
_DECODE = "--decode 1 4 16 64 256 --context 4096 --decode-steps 20"


@dataclass(frozen=True)
class Setting:
    """What a run is of; a folder holds the results of one.

    Attributes:
        ranks: of tensor parallelism; the experts are in half as many groups.
        device: "cuda" or "cpu".
        shape: "flash", the published one; or "tiny", with which everything is a rehearsal: small,
            and allowed where ranks share a GPU or have none.
        gpus: how many there are; 0 with device="cpu".
        gpu: name and memory (bytes) of the smallest.
    """

    ranks: int
    device: str
    shape: str
    gpus: int
    gpu: str
    memory: int

    @property
    def rehearsal(self) -> bool:
        """Whether nothing it measures means anything."""
        return self.shape == "tiny"

    @property
    def shares(self) -> bool:
        """Whether ranks have no GPU of their own."""
        return self.gpus < self.ranks

    @property
    def ep(self) -> int:
        """Expert groups: 4 of 8 ranks, as published."""
        return self.ranks // 2

    def identity(self) -> dict[str, Any]:
        """What results must have in common to belong together."""
        return {k: v for k, v in asdict(self).items() if k in ("ranks", "device", "shape", "gpu")}

    def num_layers(self, quantization: Quantization = None) -> int:
        """How many of the model's first layers fit; all variants share the weights.

        Args:
            quantization: None for weights in bfloat16.

        Raises:
            ConfigError: not one.
        """
        parallel = ParallelConfig(self.ranks, self.ep)
        for count in range(_FLASH.num_hidden_layers, 0, -1):
            part = _FLASH.with_layers(*range(count))
            size = weight_bytes(part, parallel, torch.bfloat16, quantization)
            if size <= _FOR_WEIGHTS * self.memory:
                return count
        raise ConfigError(
            f"not one layer of the published shape fits {self.gpu}; --shape tiny does"
        )


@dataclass(frozen=True)
class Step:
    """One part of a run, resumed as a whole.

    Attributes:
        command: RESULT stands for the file that it writes.
        estimate, limit: seconds that it will probably take, and after which it is ended.
        inside: folder that must be there, for what only a checkout has.
    """

    name: str
    what: str
    command: str
    estimate: int
    limit: int
    inside: str = ""

    def words(self, result: str) -> list[str]:
        """The command that writes to the file `result`."""
        return [result if word == RESULT else word for word in shlex.split(self.command)]

    @property
    def typed(self) -> str:
        """The command as one would type it."""
        return self.command.replace(RESULT, f"{self.name}.json")


def steps_of(setting: Setting) -> list[Step]:
    """The steps in the order of their worth: a run that ends early has the first ones."""
    return _rehearsal(setting) if setting.rehearsal else _measurement(setting)


def choose(steps: Sequence[Step], names: Sequence[str], flag: str) -> list[Step]:
    """Those of these names, in the plan's order; all for none.

    Raises:
        ConfigError: an unknown name.
    """
    known = [step.name for step in steps]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{flag} {' '.join(unknown)}: the steps are {', '.join(known)}")
    return [step for step in steps if not names or step.name in names]


def check_places(steps: Sequence[Step]) -> None:
    """Raise ConfigError unless the folders that these steps need are here."""
    for step in steps:
        if step.inside and not Path(step.inside).is_dir():
            others = "--only with the other steps runs from anywhere"
            raise ConfigError(
                f"step {step.name} needs the folder {step.inside}: run it from a checkout of the "
                f"repository; {others}"
            )


def _measurement(setting: Setting) -> list[Step]:
    ranks = setting.ranks
    number, every = _PROMPTS_A_GPU * ranks, _PROMPTS_A_GPU * RANKS[-1]
    prompts = f"--prompts {number}"
    share = "the" if number == every else f"{number} of {every} prompts of the"
    stack, some, work = _stack(setting, None)
    stack_fp8, some_fp8, work_fp8 = _stack(setting, "fp8")
    torchrun = f"torchrun --nproc-per-node {ranks} -m stepmoe"
    prefill = f"{torchrun} prefill --shape flash --ep {setting.ep} {_PUBLISHED} --json {RESULT}"
    one = f"--prompts 40 {_DECODE}"
    tests = f"{_PYTEST} -m cuda --record {RESULT}"
    smaller = [number for number in RANKS if number < ranks]
    return [
        Step("kernels", "compiles FlashInfer's and Triton's kernels, in minutes the first time",
             f"{torchrun} bench-fusion --tokens 64 --repeats 6 --json {RESULT}", 240, 900),
        Step("variants", f"tests: every variant right at tp {_up_to(ranks)}, ep, attention, graphs",
             f"{tests} tests/cuda/test_several_gpus.py", 200, 600, "tests/cuda"),
        Step("collectives", "collectives alone and the fused operation, 1 to 16384 tokens",
             f"{torchrun} bench-fusion --json {RESULT}", 60, 240),
        Step("prefill", f"{stack}, all variants: {share} published workload",
             f"{prefill} {prompts}{some}", work, 3 * work),
        Step("decode", f"{stack}, all variants: decode at batch 1 to 256",
             f"{prefill} --prompts 2 {_DECODE}{some}", 120, 400),
        Step("prefill-fp8",
             f"{stack_fp8}, all variants, in FP8: as the published figures were made",
             f"{prefill} --quantization fp8 {prompts}{some_fp8}", work_fp8, 3 * work_fp8),
        Step("layer-full", "one layer with full attention: prefill and decode",
             f"{prefill} --layers 4 {one}", 60, 240),
        Step("layer-sliding", "one layer with sliding attention: prefill and decode",
             f"{prefill} --layers 5 {one}", 60, 240),
        Step("recovery", "a rank killed in a fused all-reduce: how the others end, when usable",
             f"python -m stepmoe recovery --tp {ranks} --device cuda --json {RESULT}", 150, 400),
        Step("fused-tests", "tests: the fused operation in every implementation, graphs, a death",
             f"{tests} tests/cuda/test_fusion.py", 400, 1200, "tests/cuda"),
        *(Step(f"collectives-{n}", f"the same on {n} GPUs, for the limits between implementations",
               f"torchrun --nproc-per-node {n} -m stepmoe bench-fusion --json {RESULT}", 50, 240)
          for n in smaller[::-1]),
    ]  # fmt: skip


def _stack(setting: Setting, quantization: Quantization) -> tuple[str, str, int]:
    """The layers that fit, in words and as an argument; seconds of the prefill workload then."""
    every, layers = _FLASH.num_hidden_layers, setting.num_layers(quantization)
    seconds = round(_PREFILL * layers / every)
    if layers == every:
        return f"the {every}-layer stack", "", seconds
    words = f"the first {layers} of {every} layers (all that fit)"
    return words, f" --layers 0-{layers - 1}", seconds


def _rehearsal(setting: Setting) -> list[Step]:
    """The same steps at sizes that CPU ranks, or ranks that share a GPU, get through."""
    ranks, device = setting.ranks, f"--device {setting.device}"
    torchrun = f"torchrun --nproc-per-node {ranks} -m stepmoe"
    prefill = (
        f"{torchrun} prefill --shape tiny --ep {setting.ep} --input-len 24 --chunk 48 {device} "
        f"--json {RESULT}"
    )
    one = "--layers 3 --prompts 2 --decode 1 3 --context 16 --decode-steps 6"
    tests, shared = f"{_PYTEST} --record {RESULT}", setting.device == "cuda"
    variants = (
        'tests/cuda/test_one_gpu.py -m cuda -k "four_ranks and 2-tp"'
        if shared
        else 'tests/ranks/test_variants.py -k "test_reference and 4-2-tp"'
    )
    names = "unfused triton" if shared else "unfused"
    return [
        Step("variants", "tests: some layouts of every variant on four ranks",
             f"{tests} {variants}", 60, 240, "tests"),
        Step("collectives", "collectives alone and the fused operation, a few tokens",
             f"{torchrun} bench-fusion --rehearse {device} --hidden 64 --tokens 3 --repeats 6 "
             f"--json {RESULT}", 20, 180),
        Step("prefill", "the tiny model, all variants", f"{prefill} --prompts 12", 20, 180),
        Step("decode", "the tiny model, all variants: decode",
             f"{prefill} --prompts 2 --decode 1 3 --context 16 --decode-steps 6", 20, 180),
        Step("layer", "one layer: prefill and decode", f"{prefill} {one}", 20, 180),
        Step("recovery", "a rank killed in an all-reduce: how the others end, when usable",
             f"python -m stepmoe recovery --tp {ranks} {device} --tokens 8 --hidden 64 "
             f"--implementations {names} --json {RESULT}", 40, 240),
    ]  # fmt: skip


def _up_to(ranks: int) -> str:
    return ", ".join(str(number) for number in RANKS if number <= ranks)
