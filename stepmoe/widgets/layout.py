"""Who holds which head, expert and slice; over which ranks each sum must run: predict, then see."""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

from stepmoe.charts.layout import layout
from stepmoe.charts.sums import Sum, layer_sums, sums
from stepmoe.config import Step3p5Config
from stepmoe.errors import ConfigError
from stepmoe.parallel import ParallelConfig
from stepmoe.widgets.explorer import Explorer, choice, drawn, notice

Groups = tuple[tuple[int, ...], ...]


class LayoutExplorer(Explorer):
    """Choose tp, ep and attention; answer which ranks a sum must span; then the picture shows it.

    A combination that cannot be cut says why, in the words of the ConfigError.

    Args:
        config: the model's shape; None means Step3p5Config.flash().
        parallel: what to begin with; None means tp=4, ep=2.
        layer: which decoder layer to begin with; None means the first with experts.
    """

    def __init__(
        self,
        config: Step3p5Config | None = None,
        parallel: ParallelConfig | None = None,
        layer: int | None = None,
    ) -> None:
        self.config = config or Step3p5Config.flash()
        start = parallel or ParallelConfig(tp=4, ep=2)
        first = layer if layer is not None else min(self.config.moe_layers, default=0)
        sizes = sorted({1, 2, 3, 4, 6, 8, start.tp, start.ep})  # 3 and 6 are there to be refused
        self.tp = choice("tp", sizes, start.tp)
        self.ep = choice("ep", sizes, start.ep)
        self.attention = choice("attention", ["tp", "dp"], start.attention)
        self.layer = choice("layer", _layers(self.config), first)
        self.question = choice("predict", [""], "")
        self.question.layout.width = "34em"
        self.answer = ipywidgets.ToggleButtons(style={"button_width": "auto"})
        self.answered = False
        self._asking = False
        self._drawn: dict[tuple[object, ...], Image.Image] = {}
        super().__init__(
            [[self.tp, self.ep], [self.attention, self.layer], [self.question], [self.answer]]
        )
        self.watch(self.tp, self.ep, self.attention, self.layer, then=self._ask)
        self.watch(self.question, then=self._offer)
        self.watch(self.answer, then=self._judge)
        self._ask()

    @property
    def parallel(self) -> ParallelConfig:
        """What the controls say.

        Raises:
            ConfigError: the numbers do not fit together.
        """
        return ParallelConfig(self.tp.value, self.ep.value, self.attention.value)

    @property
    def problem(self) -> str:
        """Why the present combination is impossible; empty where it is not."""
        try:
            self.parallel.check(self.config)
        except ConfigError as error:
            return str(error)
        return ""

    def figures(self) -> list[Figure]:
        """The layout, and the sums below it once the question is answered."""
        if self.problem:
            return [notice(f"Impossible: {self.problem}")]
        setting = (self.config, self.parallel, self.layer.value)
        return [layout(*setting), *([sums(*setting)] if self.answered else [])]

    def sheets(self) -> list[Image.Image]:
        """The same, each setting drawn once."""
        controls = (self.tp, self.ep, self.attention, self.layer)
        key = tuple(control.value for control in controls)
        if self.problem:
            return super().sheets()
        if key not in self._drawn:
            self._drawn[key] = drawn(layout(self.config, self.parallel, self.layer.value))
        shown = [self._drawn[key]]
        if self.answered:
            shown.append(drawn(sums(self.config, self.parallel, self.layer.value)))
        return shown

    def still(self) -> bytes:
        """The layout with its sums: nobody answers on paper."""
        before, self.answered = self.answered, True
        try:
            return self.png()
        finally:
            self.answered = before

    def summary(self) -> str:
        """The setting and the ranks of each sum, or why it is impossible."""
        setting = (
            f"tp={self.tp.value}, ep={self.ep.value}, attention={self.attention.value!r}, "
            f"layer {self.layer.value}"
        )
        if self.problem:
            return f"{setting}: {self.problem}"
        rows = layer_sums(self.config, self.parallel, self.layer.value)
        spans = "; ".join(f"{row.name}: {_words(row.groups)}" for row in rows)
        return f"{setting}. Ranks that each sum spans: {spans}"

    def _ask(self, *_: Any) -> None:
        """Another setting: another question, nothing shown yet."""
        self.answered = False
        if self.problem:
            self.message.value = f"<b>Impossible:</b> {escape(self.problem)}"
            self.question.disabled = self.answer.disabled = True
        else:
            rows = layer_sums(self.config, self.parallel, self.layer.value)
            self.question.disabled = self.answer.disabled = False
            names = [f"Which ranks must sum the output of the {row.name}?" for row in rows]
            self.question.options = list(zip(names, rows, strict=True))
            self.question.value = rows[min(1, len(rows) - 1)]  # the routed experts
            self._offer()
        self.refresh()

    def _offer(self, *_: Any) -> None:
        """The answers to the question chosen."""
        self._asking = True  # new options select their first one: no answer yet
        self.answer.options = _answers(self.parallel)
        self.answer.value = None
        self._asking = False
        self.message.value = "Predict: choose an answer, then the sums are drawn."

    def _judge(self, *_: Any) -> None:
        row: Sum | str = self.question.value
        if self._asking or self.answer.value is None or not isinstance(row, Sum):
            return
        right = self.answer.value == row.groups
        verdict = "Right" if right else "Not so"
        self.message.value = f"<b>{verdict}.</b> {escape(_words(row.groups))}: {escape(row.why)}."
        self.answered = True
        self.refresh()


def _answers(parallel: ParallelConfig) -> list[tuple[str, Groups]]:
    """Answers that differ in this layout, and the groups of ranks they mean."""
    every, ways = range(parallel.tp), parallel.moe_tp
    blocks = [tuple(every[start : start + ways]) for start in every[::ways]]
    across = [tuple(every[start::ways]) for start in range(ways)]
    offered = [
        ("none: no sum is needed", []),
        ("the ranks that hold slices of the same experts", blocks),
        ("the ranks that hold the same slice of other experts", across),
        ("all ranks", [tuple(every)]),
    ]
    by_groups: dict[Groups, str] = {}
    for words, groups in offered:
        # One rank alone sums nothing. Of two ways to say the same the later is plainer.
        by_groups[tuple(group for group in groups if len(group) > 1)] = words
    by_groups[()] = offered[0][0]
    return [(words, groups) for groups, words in by_groups.items()]


def _words(groups: Groups) -> str:
    return "all ranks" if groups else "no sum"


def _layers(config: Step3p5Config) -> list[tuple[str, int]]:
    """One layer of each kind: the rest are like them."""
    kinds: dict[str, int] = {}
    for layer in config.layers:
        attention = layer.attention_type.replace("_", " ")
        kinds.setdefault(f"{attention}, {'experts' if layer.is_moe else 'dense'}", layer.index)
    return [(f"{index}: {kind}", index) for kind, index in kinds.items()]
