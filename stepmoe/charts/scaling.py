"""Pictures of scaling on paper: where a variant pays, how a step changes with ranks, imbalance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from stepmoe.charts.style import COLOURS, FAINT, HATCHES, INK, MARKERS, PAPER, new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.scaling import ScaledStep, gains
from stepmoe.simulated_routing import Imbalance

_PARTS = {
    "compute": ("sub-layers (floor x recorded factor)", COLOURS["attention"], None),
    "communication": ("communication (modelled)", COLOURS["all_reduce"], HATCHES["all_reduce"]),
    "passes": ("adds and norms (modelled)", COLOURS["norm"], HATCHES["add"]),
}
_CLAIMS = {
    "deferred": "deferred saves of\nthree_all_reduces",
    "fused": "fused saves of\ndeferred",
    "reduce_scatter": "reduce_scatter saves of\ndeferred",
}
_LEAST = 0.01  # a saving below it is drawn as none: the model is not that good


def where_it_pays(steps: Sequence[ScaledStep]) -> Figure:
    """What each variant saves of the step of the one it improves on: tokens x ranks."""
    saved = gains(steps)
    tokens = sorted({step.tokens for step in steps})
    layouts = {step.parallel.tp: step for step in steps}
    ranks = sorted(layouts)
    if not saved:
        raise ConfigError("no saving to draw: give the steps of a variant and of its base")
    with style():
        figure = new_figure(11.2, 4.6)
        figure.suptitle(
            "Predicted: where each variant pays, and where it stops", weight="bold", size=13.5
        )
        for panel, (variant, claim) in enumerate(_CLAIMS.items()):
            axes = figure.add_axes((0.12 + 0.3 * panel, 0.2, 0.27, 0.58))
            grid = np.array([[saved[variant, n, tp] for n in tokens] for tp in ranks])
            _savings(axes, grid, COLOURS[variant])
            axes.set_title(claim, size=11.5)
            axes.set_xticks(range(len(tokens)), [_short(number) for number in tokens])
            axes.set_xlabel("tokens of a step")
            axes.set_yticks(range(len(ranks)), [_rank_label(layouts[tp]) for tp in ranks])
            if panel:
                axes.set_yticklabels([])
            if 0 < (inside := sum(layouts[tp].nodes == 1 for tp in ranks)) < len(ranks):
                axes.axhline(inside - 0.5, color=INK, lw=1.5)  # below it: several nodes
        figure.text(
            0.5, 0.03, "share of the whole step, %; -: less than 1 % either way", ha="center"
        )
    return figure


def _savings(axes: Axes, grid: np.ndarray, colour: str) -> None:
    """A table (ranks, tokens) of shares; darker is more."""
    shades = LinearSegmentedColormap.from_list("saved", [PAPER, colour])
    axes.imshow(grid, cmap=shades, vmin=0, vmax=0.45, aspect="auto")
    for (row, column), share in np.ndenumerate(grid):
        words = "-" if abs(share) < _LEAST else f"{share * 100:.0f}"
        axes.text(column, row, words, ha="center", va="center", size=10.5)
    axes.tick_params(length=0)


def _rank_label(step: ScaledStep) -> str:
    parallel = step.parallel
    nodes = "1 node" if step.nodes == 1 else f"{step.nodes} nodes"
    return f"tp={parallel.tp}, {nodes}" + ("\nattention dp" if parallel.attention == "dp" else "")


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


def scaled_steps(
    steps: Sequence[ScaledStep],
    source: str,
    uneven: Sequence[ScaledStep] = (),
    too_large: Sequence[int] = (),
) -> Figure:
    """Left: the parts of a step of one variant on more and more ranks. Right: tokens/s per GPU.

    Args:
        steps: of one variant and one number of tokens.
        source: what the compute was recorded on.
        uneven: the same with uneven routing.
        too_large: ranks (tp) on which the weights do not fit.
    """
    if len({(step.variant, step.tokens) for step in steps}) != 1:
        raise ConfigError("give steps of one variant and of one number of tokens")
    labels = [
        _rank_label(step).replace(", ", "\n").replace("attention dp", "dp")
        + ("\ntoo large" if step.parallel.tp in too_large else "")
        for step in steps
    ]
    with style():
        figure = new_figure(11.2, 4.9)
        figure.suptitle(
            f"Predicted: a step of {steps[0].tokens} tokens on more ranks, {steps[0].variant}",
            weight="bold",
            size=13.5,
        )
        figure.text(0.5, 0.88, f"rule from: {source}", ha="center", size=10)
        parts = figure.add_axes((0.07, 0.27, 0.41, 0.55))
        _bars(parts, labels, steps)
        parts.set_ylabel("ms a step")
        figure.legend(
            *parts.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False
        )
        speed = figure.add_axes((0.57, 0.27, 0.41, 0.55))
        for curve, words, line in ((steps, "even routing", "-"), (uneven, "skewed routing", "--")):
            values = [step.tokens_per_gpu_second / 1e3 for step in curve]
            colour = COLOURS[steps[0].variant]
            if values:
                speed.plot(
                    range(len(values)), values, ls=line, marker="o", color=colour, label=words
                )
        speed.legend(loc="upper right", frameon=False)
        speed.set_xticks(range(len(labels)), labels, size=9.5)
        speed.set(ylim=(0, None), ylabel="thousand tokens/s for each GPU")
    return figure


def _bars(axes: Axes, labels: Sequence[str], steps: Sequence[ScaledStep]) -> None:
    """The parts of each step, stacked."""
    level = np.zeros(len(steps))
    for part, (words, colour, hatch) in _PARTS.items():
        heights = np.array([getattr(step, part) * 1e3 for step in steps])
        axes.bar(
            range(len(steps)),
            heights,
            bottom=level,
            color=colour,
            hatch=hatch,
            edgecolor=PAPER,
            width=0.7,
            label=words,
        )
        level += heights
    axes.set_xticks(range(len(labels)), labels, size=9.5)


def step_at(
    steps: Sequence[ScaledStep], curves: Mapping[str, Sequence[ScaledStep]], setting: str
) -> Figure:
    """Left: the parts of each variant's step at one setting. Right: what each saves of the step of
    three_all_reduces, over tokens.

    Args:
        steps: of every variant at the setting; curves: by variant, over tokens.
        setting: ranks, nodes and links, in words.
    """
    with style():
        figure = new_figure(11.2, 4.9)
        tokens = steps[0].tokens
        figure.suptitle(f"Predicted: {tokens} tokens, {setting}", weight="bold", size=13)
        parts = figure.add_axes((0.07, 0.25, 0.41, 0.6))
        _bars(parts, [step.variant.replace("_", "\n") for step in steps], steps)
        parts.set_ylabel("ms a step")
        figure.legend(
            *parts.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False
        )
        saved = figure.add_axes((0.57, 0.25, 0.28, 0.6))
        base = [step.seconds for step in curves["three_all_reduces"]]
        for variant in (name for name in curves if name != "three_all_reduces"):
            curve = curves[variant]
            shares = [
                100 * (1 - step.seconds / whole) for step, whole in zip(curve, base, strict=True)
            ]
            numbers = [step.tokens for step in curve]
            colour, marker = COLOURS[variant], MARKERS[variant]
            line = "--" if variant == "fused" else "-"  # shows deferred where they are the same
            saved.plot(numbers, shares, line, color=colour, marker=marker, ms=5, label=variant)
        saved.axvline(tokens, color=FAINT, ls=":")
        saved.set_xscale("log", base=2)
        saved.set_xticks(numbers[::2], [_short(number) for number in numbers[::2]])
        saved.set(xlabel="tokens of a step", ylabel="% saved of three_all_reduces")
        saved.set_ylim(bottom=min(0.0, saved.get_ylim()[0]))
        saved.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def expert_imbalance(results: Sequence[Imbalance]) -> Figure:
    """The busiest rank's rows over the mean, against the number of expert groups."""
    if not results:
        raise ConfigError("no simulation to draw: give what simulate_imbalance returned")
    looks = {"uniform": (COLOURS["all_gather"], "o"), "skewed": (COLOURS["share_expert"], "s")}
    lines = ("-", "--", ":")
    every = sorted({one.tokens for one in results}, reverse=True)
    if len(every) > len(lines):
        raise ConfigError(
            f"{len(every)} numbers of tokens ({every}): the picture tells {len(lines)} apart, draw "
            "the others in another"
        )
    with style():
        figure = new_figure(8.6, 4.2)
        axes = figure.add_axes((0.1, 0.16, 0.6, 0.68))
        figure.suptitle(
            "Simulated: rows of the busiest rank over the mean", weight="bold", size=13.5
        )
        for routing, (colour, marker) in looks.items():
            for line, tokens in zip(lines[: len(every)], every, strict=True):
                curve = [one for one in results if (one.routing, one.tokens) == (routing, tokens)]
                aside = 1.04 if routing == "skewed" and tokens == every[0] else 1.0
                axes.errorbar(
                    [one.ep * aside for one in curve],
                    [one.mean for one in curve],
                    [
                        [one.mean - one.low for one in curve],
                        [one.high - one.mean for one in curve],
                    ],
                    color=colour,
                    marker=marker,
                    ls=line,
                    capsize=3,
                    label=f"{routing}, {tokens} tokens",
                )
        groups = sorted({one.ep for one in results})
        axes.axhline(1, color=INK, lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(groups, [str(ep) for ep in groups])
        axes.set(xlabel="expert groups (ep)", ylabel="busiest rank / mean")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure
