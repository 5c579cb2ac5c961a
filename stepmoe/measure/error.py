"""Numerical error: how far a variant, a dtype and an order of summation are from float64.

The reference is the same weights in float64 on one rank, where nothing is summed over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepmoe.capture import Capture
from stepmoe.checks import check_dtype, check_input, check_model
from stepmoe.comm.summation import check_order, summation
from stepmoe.errors import ConfigError
from stepmoe.launch import Ranks, progress, rank_device
from stepmoe.measure.distance import distance, fingerprint, relative_error
from stepmoe.measure.environment import Place, attributes, look_around
from stepmoe.measure.latency import check_world, ranks_in, run_everywhere
from stepmoe.measure.plan import named_layers
from stepmoe.measure.source import Source, config_of, load
from stepmoe.parallel import ParallelConfig
from stepmoe.variants import VARIANTS, DecoderLayer

if TYPE_CHECKING:
    import pandas as pd

_STATE = "layer_output"


@dataclass(frozen=True)
class Exact:
    """The float64 model: logits (B, L, V), and what leaves each layer (B, L, D)."""

    logits: Tensor
    layers: list[Tensor]


@dataclass(frozen=True)
class _Case:
    name: str
    layer: type[DecoderLayer]
    dtype: torch.dtype
    order: str


def exact_pass(source: Source, input_ids: Tensor) -> Exact:
    """The reference, computed in this process on the CPU."""
    model = load(source, "deferred", ParallelConfig(), torch.float64, torch.device("cpu"))
    capture = Capture()
    logits = model(input_ids, capture=capture)
    return Exact(logits, [capture[layer][_STATE] for layer in sorted(capture.states)])


def numerical_error(
    source: Source,
    input_ids: Tensor,
    variants: Sequence[str | type[DecoderLayer]] = VARIANTS,
    *,
    dtypes: Iterable[str | torch.dtype] = ("float32", "bfloat16"),
    orders: Iterable[str] = ("library",),
    parallel: ParallelConfig | None = None,
    ranks: Ranks | None = None,
    timeout: float | None = 600,
) -> pd.DataFrame:
    """One forward pass of every variant in every dtype and order of summation, against float64.

    One row each. Columns: variant, dtype, order; layers: the relative error of what leaves each
    layer; those of `Distance` for the logits; fingerprint: equal where logits are equal bit for
    bit; ranks_agree: whether all ranks have the same bits.

    Weights of a folder are the same numbers in every dtype that holds its own; random ones are
    drawn in float32 and rounded to a smaller one.

    Args:
        source: a folder in the published layout, or a config for random weights.
        input_ids: (batch, length) int64.
        orders: of stepmoe.comm.summation.ORDERS.
        parallel: None means tp over all ranks. tp must be the number of ranks.
        ranks: where to run; None means this process and, under torchrun, its peers.
        timeout: seconds for all of it in `ranks`; None for no limit.

    Raises:
        ConfigError: an argument that cannot work, before anything runs in a rank.
        RankError, RankTimeout: as `Ranks.run`.
    """
    kinds, orders = [check_dtype(dtype) for dtype in dtypes], list(orders)
    parallel = checked_layout(source, input_ids, parallel, ranks, kinds)
    if not kinds or not orders:
        raise ConfigError(
            f"{len(kinds)} dtypes and {len(orders)} orders: give at least one of each"
        )
    for order in orders:
        check_order(order)
    cases = [
        _Case(name, layer, dtype, order)
        for dtype, (name, layer), order in product(kinds, named_layers(variants).items(), orders)
    ]
    exact = exact_pass(source, input_ids)
    found = run_everywhere(ranks, timeout, _errors_here, source, parallel, input_ids, exact, cases)
    names = ", ".join(dict.fromkeys(str(kind).removeprefix("torch.") for kind in kinds))
    return frame_of(found, names, parallel)


def _errors_here(
    source: Source,
    parallel: ParallelConfig,
    input_ids: Tensor,
    exact: Exact,
    cases: list[_Case],
) -> tuple[Place, list[dict[str, Any]]]:
    """In a rank: every case's row."""
    rows = []
    for case in progress(cases, desc="errors"):
        model = load(source, case.layer, parallel, case.dtype, rank_device())
        capture = Capture()
        with summation(case.order):
            logits = model(input_ids, capture=capture).cpu()
        layers = [capture[i][_STATE].cpu() for i in sorted(capture.states)]
        row = {
            "variant": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "order": case.order,
            "layers": [relative_error(a, b) for a, b in zip(layers, exact.layers, strict=True)],
            **asdict(distance(logits, exact.logits)),
            "fingerprint": fingerprint(logits),
        }
        rows.append(row)
    return look_around(rank_device()), rows


def checked_layout(
    source: Source,
    input_ids: Tensor,
    parallel: ParallelConfig | None,
    ranks: Ranks | None,
    kinds: list[torch.dtype],
) -> ParallelConfig:
    """The layout; ConfigError for what cannot be measured on these ranks."""
    parallel = parallel or ParallelConfig(tp=ranks_in(ranks))
    check_world(parallel, ranks)
    if parallel.simulate_rank is not None:
        raise ConfigError(
            f"simulate_rank={parallel.simulate_rank}: a simulated rank's values are not the "
            "model's; leave it out to measure errors"
        )
    config = config_of(source)
    for kind in kinds:
        check_model(config, parallel, kind)
    check_input(config, input_ids, None)
    return parallel


def frame_of(
    found: list[tuple[Place, list[dict[str, Any]]]], dtype: str, parallel: ParallelConfig
) -> pd.DataFrame:
    """The table of what every rank found, in rank order: the first one's rows."""
    import pandas as pd

    rows = [
        {**same[0], "ranks_agree": len({row["fingerprint"] for row in same}) == 1}
        for same in zip(*(rows for _, rows in found), strict=True)
    ]
    frame = pd.DataFrame(rows)
    frame.attrs = attributes([place for place, _ in found], dtype, parallel)
    return frame
