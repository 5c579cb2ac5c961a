"""How long the fused operation takes in each implementation, against the number of tokens."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from stepmoe.charts.style import INK, new_figure, style
from stepmoe.measure.report import where

# Colour (no variant's) tells the library, line and marker the number of shots.
_LOOKS: dict[str, dict[str, Any]] = {
    "unfused": {"color": INK, "marker": "o", "ls": "-"},
    "triton one-shot": {"color": "#0072B2", "marker": "^", "ls": "-"},
    "triton two-shot": {"color": "#0072B2", "marker": "v", "ls": "--", "mfc": "white"},
    "flashinfer one-shot": {"color": "#E69F00", "marker": "s", "ls": "-"},
    "flashinfer two-shot": {"color": "#E69F00", "marker": "D", "ls": "--", "mfc": "white"},
}


def fused_ops(recorded: dict[str, Any]) -> Figure:
    """Median time of a call, and below it how many times faster than unfused.

    Args:
        recorded: what stepmoe.measure.load_fused_ops read, or measured just now.
    """
    rows = [row for row in recorded["rows"] if "median_us" in row]
    tokens = sorted({row["tokens"] for row in rows})
    unfused = {row["tokens"]: row for row in rows if row["implementation"] == "unfused"}
    with style():
        figure = new_figure(8.0, 6.2)
        times, gains = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for name, look in _LOOKS.items():
            series = [row for row in rows if row["implementation"] == name]
            x = [row["tokens"] for row in series]
            median = [row["median_us"] for row in series]
            spread = (
                [row["median_us"] - row["p10_us"] for row in series],
                [row["p90_us"] - row["median_us"] for row in series],
            )
            times.errorbar(x, median, yerr=spread, label=name, lw=1.6, ms=6, capsize=2, **look)
            ratio = [unfused[row["tokens"]]["median_us"] / row["median_us"] for row in series]
            gains.plot(x, ratio, lw=1.6, ms=6, **look)
        floor = {row["tokens"]: row["wire_floor_us"] for row in rows}
        label = "fewest bytes over NVLink 4"
        times.plot(tokens, [floor[t] for t in tokens], color=INK, ls=":", lw=1.4, label=label)
        _label(times, gains, tokens, recorded)
        figure.tight_layout()
    return figure


def _label(times: Any, gains: Any, tokens: list[int], recorded: dict[str, Any]) -> None:
    made = f"recorded {recorded['date'][:10]}" if recorded["recorded"] else "measured just now"
    shape = f"hidden {recorded['hidden_size']}, {recorded['dtype']}"
    times.set(xscale="log", yscale="log", ylabel="µs a call (p10 to p90)")
    fastest = min(row["median_us"] for row in recorded["rows"] if "median_us" in row)
    times.set_ylim(bottom=fastest / 3)  # the floor of few tokens says nothing
    title = f"One all-reduce + add + norm, {shape}\n{made}: {where(recorded['hardware'])}"
    times.set_title(title, loc="left", fontsize=10.5)
    times.legend(frameon=False, fontsize=9.5, ncols=2)
    gains.axhline(1, color=INK, lw=1, ls=":")
    gains.set(xlabel="tokens", ylabel="times faster\nthan unfused", ylim=(0, None))
    gains.xaxis.set_major_locator(FixedLocator(tokens))
    gains.xaxis.set_minor_locator(NullLocator())
    gains.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    gains.tick_params(axis="x", labelrotation=45)
