"""Pictures of the prediction for eight GPUs, and of the published gain taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepmoe.attribution import Share
from stepmoe.charts.style import COLOURS, FAINT, HATCHES, INK, PAPER, new_figure, style
from stepmoe.errors import ConfigError
from stepmoe.predict import AFTER, BEFORE, BEST, TOKENS, Prediction

_PUBLISHED = {"before": BEFORE, "after": AFTER, "best launch": BEST}


def predicted_steps(by_source: Mapping[str, Sequence[Prediction]]) -> Figure:
    """Left: a predicted step's parts. Right: tokens/s with their interval, beside the published.

    Args:
        by_source: what the compute was measured on, and the predictions from it: a row of the
            figure each, on the same scales.
    """
    if not all(by_source.values()) or not by_source:
        raise ConfigError("no prediction to draw: give those of stepmoe.predict.predict")
    rows = len(by_source)
    height = 2.6 * rows + 1.3
    every = [p for predictions in by_source.values() for p in predictions]
    with style():
        figure = new_figure(10.4, height)
        figure.suptitle(
            "Predicted: one prefill step on 8 GPUs", weight="bold", size=13.5, y=1 - 0.13 / height
        )
        for row, (source, predictions) in enumerate(by_source.items()):
            top = height - 0.85 - 2.6 * row  # inches
            figure.text(0.29, (top + 0.08) / height, f"compute: {source}", size=9.5, ha="center")
            place = (top - 1.9) / height, 1.9 / height
            steps = figure.add_axes((0.16, place[0], 0.34, place[1]))
            _parts(steps, predictions)
            steps.set_xlim(0, max(p.seconds for p in every) * 1.05e3)
            speeds = figure.add_axes((0.56, place[0], 0.4, place[1]))
            _speeds(speeds, predictions, every, with_names=row == 0)
        steps.set_xlabel("ms a step")
        speeds.set_xlabel("thousand tokens/s; dashed: published for sglang")
        figure.legend(*steps.get_legend_handles_labels(), loc="lower left", ncols=3, frameon=False)
    return figure


def _parts(axes: Axes, predictions: Sequence[Prediction]) -> None:
    """Compute, communication and idle time of each step, one behind the other."""
    names = [p.variant for p in predictions]
    start = [0.0] * len(names)
    looks = {
        "compute": (COLOURS["attention"], None),
        "communication": (COLOURS["all_reduce"], HATCHES["all_reduce"]),
        "idle": (PAPER, ".."),
    }
    for part, (colour, hatch) in looks.items():
        widths = [getattr(p, part) * 1e3 for p in predictions]
        if any(widths):
            basis = {"compute": "recorded", "communication": "modelled"}.get(part, "assumed")
            axes.barh(
                names,
                widths,
                left=start,
                color=colour,
                hatch=hatch,
                edgecolor=INK if colour == PAPER else PAPER,
                label=f"{part} ({basis})",
            )
        start = [left + width for left, width in zip(start, widths, strict=True)]
    axes.invert_yaxis()


def _speeds(
    axes: Axes, predictions: Sequence[Prediction], every: Sequence[Prediction], with_names: bool
) -> None:
    """Tokens/s of each step with its interval, and the published as dashed lines."""
    for row, p in enumerate(predictions):
        axes.plot((p.tokens / p.high / 1e3, p.tokens / p.low / 1e3), (row, row), color=INK)
        axes.plot(p.tokens_per_second / 1e3, row, "o", ms=9, color=COLOURS[p.variant])
    for words, speed in _PUBLISHED.items():
        axes.axvline(speed / 1e3, color=FAINT, ls="--")
        if with_names:
            place = (speed / 1e3, 1.02)
            axes.annotate(words, place, xycoords=("data", "axes fraction"), rotation=25, size=9.5)
    ends = [*_PUBLISHED.values(), *(p.tokens / t for p in every for t in (p.low, p.high))]
    axes.set_xlim(min(ends) / 1e3 - 3, max(ends) / 1e3 + 3)
    axes.set(ylim=(len(predictions) - 0.5, -0.5), yticks=[])


def gain_waterfall(shares: Sequence[Share]) -> Figure:
    """The published step before and after, and between them what each part is known to save."""
    with style():
        figure = new_figure(10.0, 4.4)
        axes = figure.add_axes((0.09, 0.27, 0.88, 0.6))
        figure.suptitle(
            f"The published gain taken apart: ms for {TOKENS} tokens", weight="bold", size=13.5
        )
        level = TOKENS / BEFORE * 1e3
        bars: list[tuple[str, float, float, str, str | None, str]] = []
        bars.append(("before\n(published)", level, 0.0, FAINT, None, f"{level:.0f}"))
        looks = {
            "modelled": (COLOURS["all_reduce"], "///"),
            "not exercised": (PAPER, None),
            "unknown": (PAPER, ".."),
        }
        for share in shares:
            saved = share.seconds * 1e3
            level -= saved
            colour, hatch = looks[share.basis]
            label = f"{share.name.replace(' ', chr(10), 1)}\n({share.basis})"
            bars.append((label, saved, level, colour, hatch, f"-{saved:.1f}" if saved else "0"))
        bars.append(("after\n(published)", level, 0.0, FAINT, None, f"{level:.0f}"))
        for x, (_, height, bottom, colour, hatch, words) in enumerate(bars):
            axes.bar(
                x,
                height,
                bottom=bottom,
                color=colour,
                hatch=hatch,
                edgecolor=INK,
                lw=0.7,
                width=0.6,
            )
            axes.annotate(
                words,
                (x, bottom + height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                size=11,
            )
        axes.set_xticks(range(len(bars)), [bar[0] for bar in bars], size=9.5)
        axes.set(ylabel="ms a step (axis cut)", ylim=(TOKENS / AFTER * 1e3 * 0.9, None))
    return figure


def assumptions_matter(speeds: Mapping[str, tuple[float, float]]) -> Figure:
    """Predicted tokens/s at both ends of each assumption, the widest on top."""
    with style():
        figure = new_figure(9.6, 0.55 * len(speeds) + 1.6)
        axes = figure.add_axes((0.42, 0.28, 0.54, 0.54))
        figure.suptitle("Predicted: which assumption matters most", weight="bold", size=13.5)
        for row, (low, high) in enumerate(speeds.values()):
            axes.barh(
                row, (high - low) / 1e3, left=low / 1e3, color=COLOURS["attention"], height=0.5
            )
        axes.set_xlim(0)
        axes.axvline(BEST / 1e3, color=INK, ls="--", lw=1)
        axes.annotate(
            "best launch (published)", (BEST / 1e3, 1.02), xycoords=("data", "axes fraction")
        )
        axes.set(
            yticks=range(len(speeds)), yticklabels=list(speeds), ylim=(len(speeds) - 0.5, -0.5)
        )
        axes.set_xlabel("thousand tokens/s, variant deferred")
    return figure
