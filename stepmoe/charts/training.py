"""How the mini model was trained: loss, held-out accuracy, and how evenly its experts are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from stepmoe.charts.style import COLOURS, FAINT, INK, new_figure, style
from stepmoe.errors import ConfigError


def training(log: Mapping[str, Any]) -> Figure:
    """Three panels: loss and held-out accuracy by step, and each expert's load by layer.

    The figure says what it was recorded on: it is never live.

    Args:
        log: what `python -m stepmoe.mini.train --log` wrote, as `stepmoe.mini.training_log()`
            reads it.

    Raises:
        ConfigError: the log is of something else.
    """
    if str(log.get("format", "")).partition(" 1")[0] != "stepmoe training":
        raise ConfigError(
            f"this is no training log: its format is {log.get('format')!r}. "
            "Give stepmoe.mini.training_log() or what `python -m stepmoe.mini.train --log` wrote"
        )
    with style():
        figure = new_figure(11.0, 3.9)
        loss, accuracy, load = figure.subplots(1, 3)
        _loss(loss, log)
        _accuracy(accuracy, log)
        _load(load, log["final"]["load"]["tokens_per_expert"])
        hardware = log["hardware"]
        machine = ", ".join(hardware["gpus"]) or hardware["cpu"]
        figure.text(
            0.01,
            0.015,
            f"recorded {log['date']} on {machine}, torch {log['versions']['torch']}, "
            f"{log['seconds'] / 60:.1f} minutes",
            color=FAINT,
            fontsize=10,
        )
        figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _loss(axes: Axes, log: Mapping[str, Any]) -> None:
    points = log["loss"]
    axes.plot([p["step"] for p in points], [p["loss"] for p in points], color=INK, lw=1.4)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(f"step  ({log['tokens_per_step']:,} tokens each)")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.set_title("Loss on answers", loc="left")


def _accuracy(axes: Axes, log: Mapping[str, Any]) -> None:
    """Points with one binomial standard error; the last is of all questions."""
    points = [*log["accuracy"], {**log["final"], "step": log["settings"]["steps"]}]
    for score in points:
        share = score["right"] / score["questions"]
        error = math.sqrt(share * (1 - share) / score["questions"])
        is_last = score is points[-1]
        axes.errorbar(
            score["step"],
            share,
            error,
            fmt="D" if is_last else "o",
            color=COLOURS["all_reduce"] if is_last else INK,
            ms=7 if is_last else 5,
            capsize=3,
            zorder=3 if is_last else 2,
            label=f"{score['questions']:,} questions: {share:.3f}"
            if is_last
            else f"{score['questions']:,} questions"
            if score is points[0]
            else None,
        )
    axes.set(xlim=(0, None), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("step")
    axes.set_ylabel("right answers ± 1 standard error")
    axes.legend(frameon=False, loc="upper left")
    axes.set_title("Held-out accuracy", loc="left")


def _load(axes: Axes, tokens_per_expert: Mapping[str, list[int]]) -> None:
    """A dot an expert: its tokens over the mean of its layer."""
    highest = 0.0
    for place, counts in enumerate(tokens_per_expert.values()):
        mean = sum(counts) / len(counts)
        spread = place + np.linspace(-0.25, 0.25, len(counts))
        highest = max(highest, max(counts) / mean)
        axes.plot(spread, np.array(counts) / mean, "o", mfc="none", color=INK, ms=5)
    axes.axhline(1.0, color=COLOURS["all_reduce"], lw=1.2, zorder=0)
    axes.text(len(tokens_per_expert) - 0.55, 1.02, "even", color=COLOURS["all_reduce"], ha="left")
    axes.set_xticks(range(len(tokens_per_expert)), list(tokens_per_expert))
    axes.set_xlim(-0.5, len(tokens_per_expert) + 0.2)
    axes.set_ylim(0, 1.1 * highest)
    axes.set_xlabel("MoE layer, a circle an expert")
    axes.set_ylabel("tokens over the layer's mean")
    axes.set_title("Router load, held out", loc="left")
