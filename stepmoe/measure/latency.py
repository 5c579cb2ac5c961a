"""compare_latency: how long a step of each variant takes here, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from stepmoe.comm.groups import world_size
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.launch import Ranks
from stepmoe.measure.frame import build_frame
from stepmoe.measure.plan import PHASES, Plan
from stepmoe.measure.rounds import run_plan
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS, DecoderLayer

if TYPE_CHECKING:
    import pandas as pd

Result = TypeVar("Result")


def compare_latency(
    config: Step3p5Config,
    variants: Sequence[str | type[DecoderLayer]] = VARIANTS,
    tokens: Iterable[int] = (1, 64, 1024),
    *,
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
    phases: Sequence[str] = PHASES,
    repeats: int = 20,
    warmup: int = 3,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    timeout: float | None = 600,
) -> pd.DataFrame:
    """Time one forward pass of every variant on the same ranks, weights and kinds of input.

    A round times each variant once, all ranks beginning together, so that a machine that gets
    slower does so for all of them; the next round begins with the next variant. Then the round is
    repeated with a meeting of the ranks before every collective, which tells waiting for the
    slowest rank from communication; those times are kept apart. Inputs are random ids from the
    seed; several sets take turns, and `attrs["inputs"]` says whether they exceed the cache.

    One row a variant, phase and number of tokens. Columns, times in seconds:
        variant, tokens, phase; batch, length, context: the step's new tokens are (batch, length),
            after `context` cached ones (decode: one new token a sequence).
        median, p10, p90: of the rounds; a round's time is that of the rank that took longest.
        compute, communication, waiting: the mean rank's parts, medians over rounds. What a fused
            collective computes counts as communication.
        split_total: median of what these are parts of; split_overhead: what the ledger and the
            meetings add to a step, as a fraction of it, the median over rounds.
        bytes_sent, collectives, counts: of one rank and step, as in sm.Ledger.
        speedup, speedup_low, speedup_high, verdict: against three_all_reduces, with the interval of
            `attrs["method"]`; NaN where it was not measured.
        repeats: the rounds.
    `attrs` holds hardware, versions, dtype, seed, date, parallel, config, command, the order of the
    variants in each round (the same for all rows), every round's time ("samples"), and how long a
    meeting takes when nobody is late ("meeting").

    Ranks that outnumber the cores take turns on them: what then looks like communication is mostly
    waiting for a core. Ranks that share a GPU take turns as well.

    Args:
        variants: names of sm.VARIANTS, or DecoderLayer subclasses.
        tokens: new tokens of a step.
        parallel: None means tp over all ranks. tp must be the number of ranks, unless
            simulate_rank has one rank run alone.
        ranks: where to run; None means this process and, under torchrun, its peers.
        phases: "prefill" and "decode".
        repeats: rounds, at least 6; warmup: rounds before them that do not count.
        dtype: None means the config's.
        timeout: seconds for the whole measurement in `ranks`; None for no limit.

    Raises:
        ConfigError: an argument that cannot be measured, before anything is.
        RankError, RankTimeout: as `Ranks.run`.
    """
    parallel = parallel or ParallelConfig(tp=ranks_in(ranks))
    check_world(parallel, ranks)
    plan = Plan.of(config, variants, tokens, parallel, phases, repeats, warmup, dtype, seed)
    return build_frame(plan, run_everywhere(ranks, timeout, run_plan, plan))


def ranks_in(ranks: Ranks | None) -> int:
    """How many ranks there are to run on."""
    return int(ranks.run(world_size)[0]) if ranks is not None else world_size()


def check_world(parallel: ParallelConfig, ranks: Ranks | None) -> None:
    """Raise ConfigError unless tp takes all ranks: a second copy would compete for the machine."""
    there = ranks_in(ranks)
    if parallel.simulate_rank is not None:
        if there > 1:
            raise ConfigError(
                f"simulate_rank={parallel.simulate_rank} runs alone, and there are {there} ranks "
                "that would compete for the machine: leave ranks out"
            )
        return
    if there != parallel.tp:
        raise ConfigError(
            f"tp={parallel.tp} and {there} rank{'s' if there > 1 else ''}: measuring needs as many "
            f"ranks as tp. Use ranks=Ranks({parallel.tp}), or torchrun --nproc-per-node "
            f"{parallel.tp} and stepmoe.init_distributed()"
        )


def run_everywhere(
    ranks: Ranks | None, timeout: float | None, function: Callable[..., Result], *args: Any
) -> list[Result]:
    """One result a rank: of `ranks`, or of this process and its peers."""
    if ranks is not None:
        return ranks.run(function, *args, timeout=timeout)
    own = function(*args)
    if world_size() == 1:
        return [own]
    results: list[Any] = [None] * world_size()
    dist.all_gather_object(results, own)
    return results
