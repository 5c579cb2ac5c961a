"""The explorers follow their controls, within the time a slider allows, and export a picture."""

from __future__ import annotations

import base64
import io
import itertools
import statistics
import time
from collections.abc import Iterator

import nbformat
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from ipywidgets import FloatLogSlider, IntSlider, SelectionRangeSlider, SelectionSlider
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from test_charts import check_legible
from torch.testing._internal.distributed.fake_pg import FakeStore

import stepmoe as sm
from stepmoe import charts
from stepmoe.charts.steps import layer_steps
from stepmoe.comm.cost import LINKS
from stepmoe.comm.cost_check import check_on_published
from stepmoe.comm.layer_cost import Machine, layer_time
from stepmoe.comm.ledger import Ledger
from stepmoe.roofline import CHIPS, layer_roofline
from stepmoe.widgets import CrossoverExplorer, LayoutExplorer, StepThrough
from stepmoe.widgets.explorer import Explorer

FLASH = sm.Step3p5Config.flash()
EVERY_RANK = ((0, 1, 2, 3),)


@pytest.fixture(scope="module")
def recorded() -> Iterator[dict[tuple[str, str], Ledger]]:
    """What rank 0 of 4 records; torch's fake process group leaves the communication out."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        ledgers = {}
        for variant, attention in itertools.product(sm.VARIANTS, ("tp", "dp")):
            parallel = sm.ParallelConfig(4, 2, attention)  # type: ignore[arg-type]
            config = sm.Step3p5Config.tiny()
            model = sm.Step3p5ForCausalLM.from_config(config, variant, parallel, device="cpu")
            with sm.Ledger() as ledgers[variant, attention]:
                model(torch.arange(64).view(4, 16))
        yield ledgers
    finally:
        dist.destroy_process_group()


@pytest.fixture
def by_variant(recorded: dict[tuple[str, str], Ledger]) -> dict[str, Ledger]:
    return {variant: recorded[variant, "tp"] for variant in sm.VARIANTS}


def measured() -> pd.DataFrame:
    """Made-up measurements in the form of compare_latency."""
    rows = [
        {"variant": variant, "tokens": tokens, "phase": phase, "median": seconds,
         "p10": 0.9 * seconds, "p90": 1.2 * seconds}
        for variant, seconds in (("deferred", 3e-3), ("fused", 4e-3))
        for phase, tokens in (("prefill", 64), ("prefill", 256), ("decode", 8))
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs["hardware"] = "4 CPU ranks on 2 cores"
    return frame


def curve(explorer: CrossoverExplorer, variant: str) -> list[tuple[float, float]]:
    x, y = explorer.plot.curves[variant].get_data()
    return list(zip(x, y, strict=True))


def test_sliders_move_the_curves() -> None:
    explorer = CrossoverExplorer()
    before = explorer.picture.value
    for control, value in (
        (explorer.tp, 4),
        (explorer.hidden, 8192),
        (explorer.attention, "dp"),
        (explorer.algorithm, "two_shot"),
        (explorer.bandwidth, 100.0),
        (explorer.latency, 10.0),
    ):
        control.value = value
        assert explorer.picture.value != before, control.description
        before = explorer.picture.value
    link = sm_link(latency=10e-6, bandwidth=100e9)
    machine = Machine(link, algorithm="two_shot")
    for variant in sm.VARIANTS:
        drawn = curve(explorer, variant)
        assert [x for x, _ in drawn] == [2**power for power in range(15)]
        for tokens, microseconds in drawn:
            expected = layer_time(variant, int(tokens), 8192, 4, 2, machine, "dp").seconds
            assert microseconds == pytest.approx(expected * 1e6)


def sm_link(latency: float, bandwidth: float) -> object:
    return type(LINKS["nvlink4"])("test", latency, bandwidth, "")


def test_presets_move_the_sliders_and_sliders_leave_the_preset() -> None:
    explorer = CrossoverExplorer()
    explorer.link.value = "pcie5"
    assert explorer.bandwidth.value == pytest.approx(63)
    assert explorer.latency.value == pytest.approx(5.7)
    assert explorer.machine.link.source == LINKS["pcie5"].source
    slower = curve(explorer, "deferred")
    explorer.bandwidth.value = 630
    assert explorer.link.value == "own"
    assert explorer.machine.link.source == "set by hand"
    assert curve(explorer, "deferred")[-1][1] < slower[-1][1]


def test_gates_are_where_the_fused_kernel_ends() -> None:
    explorer = CrossoverExplorer()
    lines = {name: line for name, (line, _) in explorer.plot.gates.items()}
    assert {name: line.get_xdata()[0] for name, line in lines.items()} == {
        "sglang": 2048,
        "vllm": 64,
    }
    explorer.hidden.value = 8192
    assert lines["vllm"].get_xdata()[0] == 32  # half a MiB of two-byte numbers
    explorer.tokens.value = (64, 1024)
    assert not any(line.get_visible() for line in lines.values())
    explorer.tokens.value = (1, 65536)
    assert all(line.get_visible() for line in lines.values())


def test_the_ribbon_and_the_summary_name_the_winners() -> None:
    explorer = CrossoverExplorer()
    assert explorer.summary() == (
        "Predicted fastest (hidden 4096, tp=8, attention='tp', link nvlink4): "
        "fused for 1 to 2048 tokens; reduce_scatter for 4096 to 16384 tokens"
    )
    widths = [patch.get_x() + patch.get_width() for patch in explorer.plot.ribbon.patches]
    assert widths == [pytest.approx((2048 * 4096) ** 0.5), 16384]
    explorer.gate.value = "vllm"
    assert "fused for 1 to 64 tokens" in explorer.summary()
    explorer.attention.value = "dp"
    assert "reduce_scatter for 1 to 16384 tokens" in explorer.summary()


def legend(explorer: CrossoverExplorer) -> list[str]:
    return [text.get_text() for key in explorer.plot.figure.legends for text in key.get_texts()]


def test_published_and_own_measurements_are_labelled() -> None:
    explorer = CrossoverExplorer(measured(), tp=8)
    assert any("published, ×2: vLLM #42324" in text for text in legend(explorer))
    explorer.tp.value = 2
    assert all("vLLM #22086" in text for text in legend(explorer) if "published" in text)
    explorer.published.value = False
    assert set(legend(explorer)) == {
        f"measured, {phase}, whole forward pass: 4 CPU ranks on 2 cores"
        for phase in ("prefill", "decode")
    }
    explorer.tokens.value = (512, 4096)  # nothing was measured there
    assert legend(explorer) == []


def test_a_range_of_one_number_is_still_a_curve() -> None:
    explorer = CrossoverExplorer()
    for end in (1, 65536):
        explorer.tokens.value = (end, end)
        assert len(curve(explorer, "fused")) == 2


def size(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


def test_layout_asks_then_shows() -> None:
    explorer = LayoutExplorer()
    assert explorer.answer.value is None
    unanswered = explorer.picture.value
    by_words = dict(explorer.answer.options)
    assert by_words["the ranks that hold slices of the same experts"] == ((0, 1), (2, 3))
    assert by_words["the ranks that hold the same slice of other experts"] == ((0, 2), (1, 3))
    explorer.answer.value = by_words["the ranks that hold slices of the same experts"]
    assert "Not so" in explorer.message.value
    assert "can be on any rank" in explorer.message.value
    assert size(explorer.picture.value)[1] > size(unanswered)[1]  # the sums stand below
    explorer.answer.value = EVERY_RANK
    assert "Right" in explorer.message.value
    explorer.tp.value = 8
    assert explorer.answer.value is None  # another layout, another question
    assert "Predict" in explorer.message.value
    by_words = dict(explorer.answer.options)  # ep=2: each expert is cut 4 ways
    assert by_words["the ranks that hold slices of the same experts"][0] == (0, 1, 2, 3)
    assert by_words["the ranks that hold the same slice of other experts"][1] == (1, 5)


@pytest.mark.parametrize(
    ("tp", "ep", "attention", "question", "right"),
    [
        (4, 2, "dp", "attention", ()),
        (4, 2, "tp", "attention", EVERY_RANK),
        (4, 2, "dp", "routed experts", EVERY_RANK),
        (4, 1, "tp", "routed experts", EVERY_RANK),
        (4, 4, "tp", "routed experts", EVERY_RANK),
        (4, 4, "tp", "shared expert", EVERY_RANK),
        (1, 1, "tp", "shared expert", ()),
    ],
)
def test_layout_knows_the_answer(
    tp: int, ep: int, attention: str, question: str, right: tuple[tuple[int, ...], ...]
) -> None:
    explorer = LayoutExplorer(parallel=sm.ParallelConfig(tp, ep, attention))  # type: ignore[arg-type]
    explorer.question.value = next(
        row for _, row in explorer.question.options if row.name == question
    )
    assert right in dict(explorer.answer.options).values()
    for words, groups in explorer.answer.options:
        explorer.answer.value = groups
        verdict = "Right" if groups == right else "Not so"
        assert explorer.message.value.startswith(f"<b>{verdict}"), words


def test_impossible_layouts_say_why() -> None:
    explorer = LayoutExplorer()
    for tp, ep, reason in ((8, 3, "ep=3 does not divide tp=8"), (3, 3, "64 query heads")):
        explorer.tp.value, explorer.ep.value = tp, ep
        assert reason in explorer.message.value
        assert reason in explorer.summary()
        assert explorer.answer.disabled
        assert size(explorer.picture.value)[1] < 150
    explorer.ep.value = 1
    explorer.tp.value = 2
    assert not explorer.answer.disabled
    assert "Predict" in explorer.message.value


def test_steps_are_the_ledgers(recorded: dict[tuple[str, str], Ledger]) -> None:
    """Every step of the ledger is a moment whose new tensor has the placement recorded."""
    for ledger in recorded.values():
        for layer in (0, 2, 4):
            moments = layer_steps(ledger, layer)
            made = [(m.node.entry, m.new[0]) for m in moments if m.node and m.node.entry]
            assert len(made) >= 4  # norm, attention, one sum in one kernel, MLP
            for entry, value in made:
                assert value.placement == entry.placement
            assert all(m.live for m in moments)
            for moment in moments:
                assert {value.name for value in moment.new} <= {v.name for v in moment.live}


def test_deferred_by_hand(by_variant: dict[str, Ledger]) -> None:
    held = [
        {value.name: value.placement[0] for value in moment.live}
        for moment in layer_steps(by_variant["deferred"], 1)
    ]
    both = "share_expert_output + experts_output"
    assert held == [
        {"mlp_output": "R", "residual": "R"},
        {"residual": "R"},  # add
        {"hidden_states": "R", "residual": "R"},  # norm
        {"attn_output": "P", "residual": "R"},
        {"attn_output": "R", "residual": "R"},  # all_reduce
        {"residual": "R"},
        {"hidden_states": "R", "residual": "R"},
        {"hidden_states": "R", "share_expert_output": "P", "residual": "R"},
        {"share_expert_output": "P", "experts_output": "P", "residual": "R"},
        {both: "P", "residual": "R"},
        {both: "R", "residual": "R"},
    ]


def test_stepping(by_variant: dict[str, Ledger]) -> None:
    explorer = StepThrough(by_variant)
    assert (explorer.variant.value, explorer.layer.value) == ("three_all_reduces", 1)
    before = explorer.picture.value
    explorer.on.click()
    assert explorer.step.value == 2
    assert explorer.picture.value != before
    explorer.back.click()
    assert explorer.picture.value == before
    for _ in range(3):
        explorer.back.click()
    assert explorer.step.value == 0
    explorer.step.value = explorer.step.max
    explorer.on.click()
    assert "share_expert_output + experts_output Replicate" in explorer.summary()
    explorer.variant.value = "fused"
    assert (explorer.step.value, explorer.step.max) == (1, 6)
    assert explorer.summary() == (
        "fused, layer 1, operation 1 of 6 (all_reduce_add_rms_norm): "
        "hidden_states Replicate, residual Replicate"
    )
    explorer.layer.value = 0
    assert "residual" in explorer.summary()


def test_stepping_needs_a_ledger(by_variant: dict[str, Ledger]) -> None:
    with pytest.raises(sm.ConfigError, match="no variant"):
        StepThrough({})
    with pytest.raises(sm.ConfigError, match="layer 9"):
        StepThrough(by_variant, layer=9)
    with pytest.raises(sm.ConfigError, match="no MoE layer"):
        StepThrough({"deferred": Ledger()})
    with pytest.raises(sm.ConfigError, match="moment 99"):
        charts.steps(by_variant["fused"], 1, 99)


def test_pictures_are_legible(by_variant: dict[str, Ledger]) -> None:
    for variant, ledger in by_variant.items():
        for index in range(len(layer_steps(ledger, 1))):
            check_legible(charts.steps(ledger, 1, index, f"{variant}, layer 1"))
    for tp, ep, attention in ((8, 4, "tp"), (4, 2, "dp"), (2, 1, "tp"), (1, 1, "tp")):
        parallel = sm.ParallelConfig(tp, ep, attention)  # type: ignore[arg-type]
        check_legible(charts.sums(FLASH, parallel, 4))
        for tokens, context, batch in ((16384, 8192, 2), (64, 8192, 64)):
            rows = layer_roofline(FLASH, 4, parallel, tokens, context, batch)
            label = f"{tokens} tokens, tp={tp}, ep={ep}"
            check_legible(charts.roofline(rows, CHIPS["h100"], label=label))
    check_legible(charts.cost_fit(check_on_published()))
    for tp in (2, 4, 8):
        check_legible(charts.crossover(tp=tp))
    check_legible(charts.crossover(tp=4, measured=measured()))


def test_every_prediction_is_called_one() -> None:
    for figure in (charts.crossover(), charts.cost_fit(check_on_published())):
        texts = [text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))]
        assert any("redicted" in text for text in texts)
    assert "Predicted" in CrossoverExplorer().summary()


def explorers(by_variant: dict[str, Ledger]) -> list[Explorer]:
    return [CrossoverExplorer(), LayoutExplorer(), StepThrough(by_variant)]


def test_the_export_shows_a_picture(by_variant: dict[str, Ledger]) -> None:
    """Without the state of live widgets, as in a committed notebook, the page shows the PNG."""
    cells = []
    for explorer in explorers(by_variant):
        data, metadata = explorer._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        assert data["text/plain"] == explorer.summary()
        assert size(base64.b64decode(data["image/png"]))[0] > 500
        output = new_output("display_data", data=data, metadata=metadata)
        cells.append(new_code_cell("explorer", execution_count=1, outputs=[output]))
    notebook = new_notebook(cells=cells)
    nbformat.validate(notebook)
    page, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    assert page.count("data:image/png;base64") == 3
    assert "widget-view" not in page
    assert "Predicted fastest" in page  # as the picture's alternative text


def test_a_still_layout_shows_the_sums() -> None:
    explorer = LayoutExplorer()
    shown, still = size(explorer.picture.value), size(explorer.still())
    assert still[1] > shown[1]
    assert not explorer.answered


def test_a_slider_step_is_quick(by_variant: dict[str, Ledger]) -> None:
    """150 ms are allowed for a step; 50 to 120 were taken on two idle cores.

    Processor time of this process is compared, which other processes lengthen far less than the
    clock's; twice the allowance, because they still do, through caches and shared cores.
    """
    crossover, layout, stepper = explorers(by_variant)
    for control, values in (
        (crossover.hidden, [8192, 2048, 1024, 512, 16384]),
        (crossover.bandwidth, [100.0, 50.0, 200.0, 300.0, 900.0]),
        (crossover.tp, [2, 4, 16, 8, 2]),
        (layout.tp, [8, 2, 4, 6, 8]),
        (stepper.step, [2, 3, 4, 5, 6]),
    ):
        taken = []
        for value in values:
            start = time.process_time()
            control.value = value
            taken.append(time.process_time() - start)
        assert statistics.median(taken) < 2 * 0.15, (control.description, taken)


def test_controls_are_those_that_work_by_keyboard(by_variant: dict[str, Ledger]) -> None:
    """ipywidgets' own controls: focus, arrow keys, Space and Enter are theirs, in the browser."""
    for explorer in explorers(by_variant):
        rows = [child for child in explorer.children if hasattr(child, "children")]
        kinds = {type(control).__module__ for row in rows for control in row.children}
        assert all(kind.startswith("ipywidgets.widgets") for kind in kinds)
    crossover, _, stepper = explorers(by_variant)
    sliders = (crossover.tokens, crossover.tp, crossover.latency, stepper.step)
    expected = (SelectionRangeSlider, SelectionSlider, FloatLogSlider, IntSlider)
    assert tuple(type(control) for control in sliders) == expected


def test_a_browser_that_puts_the_sliders_on_their_steps_moves_nothing() -> None:
    """JupyterLab snaps a value to the nearest step and sends it back as if it had been moved."""
    explorer = CrossoverExplorer()
    before = explorer.machine, explorer.picture.value
    explorer.bandwidth.value, explorer.latency.value = 10**2.66, 10**0.54  # from 450 and 3.4
    assert explorer.link.value == "nvlink4"
    assert (explorer.machine, explorer.picture.value) == before
    explorer.latency.value = 10**0.56  # one step on
    assert explorer.link.value == "own"
    assert explorer.machine.link.latency == pytest.approx(10**0.56 * 1e-6)
