"""Figures that others published, as data: what was timed, on which hardware, and where it is told.

LATENCIES are times of one operation, GAINS are comparisons of whole runs, SCORES are accuracies.
The numbers are the sources' own, rounded as there; what is not stated there is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Latency:
    """One published time of one operation.

    Attributes:
        source: where it is told ("vLLM #42324").
        hardware: as told there.
        ranks: GPUs that took part; None if not stated.
        operation: "all_reduce", or "all_reduce_add_rms_norm" for the sum with residual and norm,
            in one kernel or in several: `implementation` says which.
        implementation: "NCCL", "multimem", "two-shot"; "NCCL + norm" where parts run one by one.
        seconds: the published time.
        nbytes: of the whole tensor; 0 where its shape is not stated.
        tokens, hidden: its shape, where stated.
    """

    source: str
    hardware: str
    ranks: int | None
    operation: str
    implementation: str
    seconds: float
    nbytes: int = 0
    tokens: int | None = None
    hidden: int | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the sum, the residual add and the norm are one kernel."""
        return self.operation == "all_reduce_add_rms_norm" and "+" not in self.implementation


@dataclass(frozen=True)
class Gain:
    """One published comparison.

    Attributes:
        what: what was changed, and on which workload.
        change: relative change of what is better when larger: 0.21 is 21 % more; for times, the
            reciprocal of the ratio minus 1. None where only `before` and `after` are given.
        before, after: the figures, in `unit`.
        note: what the figures leave out, and deductions marked "inferred".
    """

    source: str
    hardware: str
    what: str
    change: float | None = None
    before: float | None = None
    after: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Score:
    """One published accuracy, to as many digits as it was printed.

    Attributes:
        what: the code that was run.
        invalid: the share of answers that could not be read.
    """

    source: str
    benchmark: str
    what: str
    questions: int
    accuracy: float
    invalid: float


def _by_size(
    source: str, hardware: str, ranks: int | None, implementation: str, ms: Mapping[float, float]
) -> list[Latency]:
    """Plain all-reduces by MiB, in ms."""
    return [
        Latency(source, hardware, ranks, "all_reduce", implementation, t * 1e-3, int(size * MIB))
        for size, t in ms.items()
    ]


def _with_norm(
    source: str,
    hardware: str,
    ranks: int,
    implementation: str,
    us: Mapping[int, float] | Mapping[tuple[int, int], float],
) -> list[Latency]:
    """All-reduce, add and norm in two-byte numbers, by tokens or (tokens, hidden), in µs."""
    rows = []
    for shape, t in us.items():
        tokens, hidden = shape if isinstance(shape, tuple) else (shape, None)
        nbytes = tokens * (hidden or 0) * 2
        operation = "all_reduce_add_rms_norm"
        made = Latency(
            source, hardware, ranks, operation, implementation, t * 1e-6, nbytes, tokens, hidden
        )
        rows.append(made)
    return rows


# fmt: off
_SM90 = "8 GPUs, likely SM90 (inferred: the table stands before the SM 10.0 ones)"
LATENCIES: tuple[Latency, ...] = (
    *_by_size("vLLM #42324", _SM90, 8, "NCCL", {
        0.5: .024, 1: .025, 2: .037, 4: .050, 8: .076, 16: .121, 32: .195, 64: .316, 128: .561}),
    *_by_size("vLLM #42324", _SM90, 8, "multimem", {
        0.5: .011, 1: .014, 2: .018, 4: .027, 8: .046, 16: .087, 32: .165, 64: .320, 128: .631}),
    *_by_size("vLLM #42324", _SM90, 8, "two-shot", {
        0.5: .015, 1: .017, 2: .022, 4: .037, 8: .065, 16: .125, 32: .242, 64: .468, 128: .923}),
    *_by_size("vLLM #37756", "B300", None, "NCCL", {1: .027, 16: .083, 64: .219, 128: .393}),
    *_with_norm("vLLM #22086", "H100 x2", 2, "all-reduce + norm", {
        (32, 8192): 10, (64, 8192): 12, (128, 8192): 17}),
    *_with_norm("vLLM #22086", "H100 x2", 2, "FlashInfer one-shot", {
        (32, 8192): 10, (64, 8192): 16, (128, 8192): 30}),
    *_with_norm("vLLM #22086", "H100 x2", 2, "FlashInfer two-shot", {
        (32, 8192): 79, (64, 8192): 85}),
    *_with_norm("FlagTree #888", "H20 x8", 8, "NCCL + norm", {
        8: 68, 512: 86, 4096: 253, 8192: 419}),
    *_with_norm("FlagTree #888", "H20 x8", 8, "NVSHMEM fused", {
        8: 45, 512: 67, 4096: 251, 8192: 470}),
    *_with_norm("TensorRT-LLM #14534", "GB200 x4", 4, "one-shot", {
        (128, 8192): 38.0, (512, 8192): 54.3, (2048, 16384): 422}),
    *_with_norm("TensorRT-LLM #14534", "GB200 x4", 4, "two-shot", {
        (128, 8192): 38.2, (512, 8192): 47.2, (2048, 16384): 278}),
    *_with_norm("aiter #2586", "AMD x4", 4, "all-reduce + norm", {(1, 4096): 20.0}),
    *_with_norm("aiter #2586", "AMD x4", 4, "fused", {(1, 4096): 11.4}),
)

GAINS: tuple[Gain, ...] = (
    Gain("sglang #22773", "H200 x8", "three all-reduces to two; TP8 EP4, FP8, prefill 8192/1",
         0.21, 46e3, 56e3, "tokens/s"),
    Gain("vLLM #44079", "H200 x8", "fused all-reduce + norm, TP8, decode at batch 96", -0.034,
         note="the fused operation loses 1.9 to 4.3 µs at 256 to 512 KB"),
    Gain("vLLM #44079", "H200 x8", "fused all-reduce + norm, TP8, decode at batch 128", -0.074),
    Gain("sglang #7621", "B200", "all-reduce + norm fused, DeepSeek-R1 TP8",
         13.5 / 8.7 - 1, 13.5, 8.7, "µs"),
    Gain("LightLLM #1405", "H200, TP4", "fused, 1 client", 0.017),
    Gain("LightLLM #1405", "H200, TP4", "fused, 8 clients", 0.048),
    Gain("vLLM #42646", "B300 x4", "fused with Gemma's norm, 2 clients", 0.083),
    Gain("vLLM #42646", "B300 x4", "fused with Gemma's norm, 512 clients", 0.009),
    Gain("sglang #9973", "not stated", "fused, Qwen3-MoE, end to end", 0.022, 19.7, 13.0,
         "% of the time in all-reduce + norm"),
    Gain("vLLM docs/design/fusions.md", "not stated", "fusion, few tokens", None, 5, 20,
         "% faster, from - to", "indicative"),
    Gain("vLLM docs/design/fusions.md", "not stated", "async TP, many tokens", None, 7, 10,
         "% faster, from - to", "indicative; sequence parallelism alone: none"),
    Gain("TokenWeave (openreview rh2Ylffkq6)", "H100 x8", "latency, at best", 0.28,
         note="communication is about 20 % of the time"),
    Gain("TokenWeave (openreview rh2Ylffkq6)", "H100 x8", "throughput, at best", 0.19),
    Gain("sglang #8539", "not stated", "reduce-scatter for all-reduce, TP8, DP attention 2", 0.117),
    Gain("vLLM #47070", "not stated", "MoE sequence parallel, GLM, TP8/TP4, at least", 0.019),
    Gain("vLLM #47070", "not stated", "MoE sequence parallel, GLM, TP8/TP4, at best", 0.050),
    Gain("vLLM #48763", "not stated", "one collective fewer, GLM", 0.05),
    Gain("NVIDIA blog on TensorRT-LLM MultiShot", "NVSwitch",
         "two steps by multicast for a ring's 2N - 2, all-reduce, up to", 2.0),
)
# fmt: on


SCORES = (
    Score("sglang #22773", "GSM8K", "before: three all-reduces", 1319, 0.875, 0.001),
    Score("sglang #22773", "GSM8K", "after: deferred", 1319, 0.879, 0.001),
)


def latencies(
    source: str | None = None, implementation: str | None = None, ranks: int | None = None
) -> list[Latency]:
    """The published times that match every argument given."""
    return [
        row
        for row in LATENCIES
        if source in (None, row.source)
        and implementation in (None, row.implementation)
        and ranks in (None, row.ranks)
    ]


@dataclass(frozen=True)
class LayerPoint:
    """A published time, doubled: the two sums that a MoE layer needs.

    Attributes:
        variant: "fused" for one kernel, "deferred" for an all-reduce with separate add and norm.
        tokens: as many of the layer at hand as make the published number of bytes; as published
            where the hidden size is not stated.
        label: source, hardware and what was timed.
    """

    variant: str
    tokens: float
    seconds: float
    label: str


def layer_points(ranks: int, hidden: int, dtype_bytes: int) -> list[LayerPoint]:
    """Published times of `ranks` GPUs beside a layer of `hidden` entries a token.

    Plain all-reduces other than NCCL's are left out: no variant here runs them.
    """
    points = []
    for row in LATENCIES:
        plain = row.operation == "all_reduce"
        if row.ranks != ranks or (plain and row.implementation != "NCCL"):
            continue
        tokens = row.nbytes / (hidden * dtype_bytes) if row.nbytes else float(row.tokens or 0)
        what = row.implementation + (" all-reduce, no add or norm" if plain else "")
        unstated = "" if row.nbytes else "; hidden size not stated"
        hardware = row.hardware.partition(" (")[0]
        label = f"{row.source}, {hardware}: {what}{unstated}"
        variant = "fused" if row.is_fused else "deferred"
        points.append(LayerPoint(variant, tokens, 2 * row.seconds, label))
    return points
