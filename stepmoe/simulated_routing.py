"""How unevenly experts' rows fall on ranks: routing drawn at random, its rows counted.

What is drawn is what a model with random weights does (stepmoe.random_weights): logits are normal
with deviation 1, because hidden states are normalised and the router's rows have length 1; a
router's biases, normal with deviation 0.1, are kept ("skewed") or nearly taken away ("uniform"). A
trained router is balanced by its biases instead; how well, this does not know.

Legend: T tokens, E experts, K top-k, ep expert groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.kernels.routing import choose_experts

BIASES = {"uniform": 0.001, "skewed": 0.1}  # deviation; those of the prefill command's --routing


@dataclass(frozen=True)
class Imbalance:
    """The busiest rank's rows over the mean rank's, for one setting.

    Attributes:
        mean, low, high: over the draws (a draw is a layer): mean, 10th and 90th percentile. All
            ranks wait in every layer, so a step feels the mean.
    """

    routing: str
    tokens: int
    ep: int
    mean: float
    low: float
    high: float


def draw_load(
    config: Step3p5Config, tokens: int, routing: str, generator: torch.Generator
) -> Tensor:
    """Rows of each expert (E,) int64 in one layer; their sum is T K.

    Raises:
        ConfigError: another routing, or no token.
    """
    if routing not in BIASES or tokens < 1:
        raise ConfigError(
            f"routing={routing!r} must be one of {', '.join(map(repr, BIASES))} and tokens="
            f"{tokens} at least 1"
        )
    experts = config.num_experts
    # One seed draws other numbers in another dtype: not torch's default, which may be changed.
    draw = partial(torch.randn, generator=generator, dtype=torch.float32)
    bias, logits = BIASES[routing] * draw(experts), draw(tokens, experts)
    topk_ids, _ = choose_experts(logits, bias, config.num_experts_per_tok, False, 1.0)
    return topk_ids.flatten().bincount(minlength=experts)


def group_rows(load: Tensor, ep: int) -> Tensor:
    """Rows of an expert group's ranks: (..., E) to (..., ep). Its tp / ep ranks have all of them,
    each on a slice of the intermediate size.

    Raises:
        ConfigError: ep does not divide the experts.
    """
    if ep < 1 or load.shape[-1] % ep:
        raise ConfigError(f"{load.shape[-1]} experts cannot be dealt to ep={ep} groups")
    return load.unflatten(-1, (ep, -1)).sum(-1)


def simulate_imbalance(
    config: Step3p5Config,
    tokens: Iterable[int],
    groups: Iterable[int],
    draws: int = 10,
    seed: int = 0,
) -> list[Imbalance]:
    """Draw the routing of `draws` layers for each number of tokens, uniform and skewed, and deal
    the same rows to each number of expert groups."""
    if draws < 1:
        raise ConfigError(f"draws={draws} must be at least 1")
    generator, every_ep, found = torch.Generator().manual_seed(seed), list(groups), []
    for routing in BIASES:
        for number in tokens:
            loads = [draw_load(config, number, routing, generator) for _ in range(draws)]
            for ep in every_ep:
                rows = group_rows(torch.stack(loads), ep).double()
                over = rows.amax(-1) / rows.mean(-1)
                low, high = over.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
                found.append(Imbalance(routing, number, ep, float(over.mean()), low, high))
    return found
