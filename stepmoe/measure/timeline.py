"""profile: one step of a variant as torch.profiler sees it, on every rank, on one clock."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepmoe.causal_lm import Step3p5ForCausalLM
from stepmoe.checks import check_alignment, check_input
from stepmoe.comm.groups import meet
from stepmoe.comm.ledger import Ledger
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.launch import Ranks, rank_device
from stepmoe.measure.environment import Place, look_around, provenance
from stepmoe.measure.latency import check_world, ranks_in, run_everywhere
from stepmoe.measure.traces import FORWARD, events_of, merged
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import DecoderLayer, layer_class

if TYPE_CHECKING:
    import pandas as pd

_WARMUP = 2


@dataclass(frozen=True)
class RankTrace:
    """One rank's export of torch.profiler, parsed, and the collectives its ledger recorded."""

    trace: dict[str, Any]
    collectives: list[str]
    place: Place


@dataclass(frozen=True)
class Profile:
    """One step of all ranks.

    Attributes:
        events: a row for each `traces.Event`, and its rank; starts count from the earliest.
        attrs: variant, hardware, versions, dtype, date.
        traces: of each rank, as torch.profiler exported it.
    """

    events: pd.DataFrame
    attrs: dict[str, Any]
    traces: list[dict[str, Any]]

    def save_chrome_trace(self, path: str | Path) -> None:
        """Write all ranks into one file for chrome://tracing or ui.perfetto.dev; pid is the rank.

        Raises:
            ConfigError: there is no such folder.
        """
        file = Path(path)
        if not file.parent.is_dir():
            raise ConfigError(f"{file}: there is no folder {file.parent}; make it first")
        file.write_text(json.dumps(merged(self.traces)))


def profile(
    config: Step3p5Config,
    variant: str | type[DecoderLayer],
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
    input_ids: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    timeout: float | None = 120,
) -> Profile:
    """Record one forward pass of a variant with torch.profiler, after two to warm up.

    The profiler costs time of its own in every operation: see what runs when and beside what, and
    measure how long with `compare_latency`. The ranks' clocks are those of their hosts: on one host
    they agree, on several as well as the hosts' clocks do.

    Args:
        parallel: None means tp over all ranks. tp must be the number of ranks.
        ranks: where to run; None means this process and, under torchrun, its peers.
        input_ids: (batch, length) int64; None means one sequence of 64 random ones.
        dtype: None means the config's.
        timeout: seconds in `ranks`; None for no limit.

    Raises:
        ConfigError: an argument that cannot work, before anything runs.
        RankError, RankTimeout: as `Ranks.run`.
    """
    parallel = parallel or ParallelConfig(tp=ranks_in(ranks))
    check_world(parallel, ranks)
    parallel.check(config)
    dtype = dtype or getattr(torch, config.torch_dtype)
    check_alignment(config, parallel, dtype)
    layer = layer_class(variant)
    if input_ids is None:
        random = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(config.vocab_size, (1, 64), generator=random)
    check_input(config, input_ids, None)
    found = run_everywhere(
        ranks, timeout, _profile_here, config, layer, parallel, input_ids, dtype, seed
    )
    name = variant if isinstance(variant, str) else variant.__name__
    return _profile_of(found, name, str(dtype).removeprefix("torch."))


def _profile_here(
    config: Step3p5Config,
    layer: type[DecoderLayer],
    parallel: ParallelConfig,
    input_ids: Tensor,
    dtype: torch.dtype,
    seed: int,
) -> RankTrace:
    device = rank_device()
    model = Step3p5ForCausalLM.from_config(config, layer, parallel, dtype, device, seed)
    ids = input_ids.to(device)
    for _ in range(_WARMUP):
        model(ids)
    # Kineto announces its start and its end; only what is above their level is news.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        meet(model.comm.group, device)
        with torch.profiler.record_function(FORWARD), Ledger(annotates=True) as ledger:
            model(ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    kept = {name: trace[name] for name in ("baseTimeNanoseconds", "traceEvents")}
    return RankTrace(kept, sorted(ledger.counts()), look_around(device))


def _profile_of(found: list[RankTrace], variant: str, dtype: str) -> Profile:
    import pandas as pd

    where = provenance([rank.place for rank in found])
    events = pd.DataFrame(
        [
            {"rank": number, **asdict(event)}
            for number, rank in enumerate(found)
            for event in events_of(
                rank.trace,
                str(where["hardware"]["device"]),
                rank.collectives,
                host_waits=rank.place.backend == "gloo",
            )
        ]
    )
    events["start"] -= events["start"].min()
    attrs = {"variant": variant, "dtype": dtype, "recorded": False, **where}
    return Profile(events, attrs, [rank.trace for rank in found])
