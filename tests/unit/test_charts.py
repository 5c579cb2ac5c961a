"""Charts show what the ledgers hold, all of it, and no text covers another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch.testing._internal.distributed.fake_pg import FakeStore

import stepmoe as sm
from stepmoe import charts
from stepmoe.charts.flow import forward_layer, layer_flow
from stepmoe.charts.runs import spread
from stepmoe.charts.style import bytes_in_one_unit
from stepmoe.comm.ledger import Entry, Ledger

COMBINATIONS = list(itertools.product(sm.VARIANTS, ("tp", "dp")))
LAYERS = {"dense, first": 0, "MoE, middle": 1, "MoE, last": 4}


@pytest.fixture(scope="module")
def recorded() -> Iterator[dict[tuple[str, str], Ledger]]:
    """What rank 0 of 4 records in every variant, without the other three.

    torch's fake process group leaves every collective out: the values are nonsense, the steps,
    their names, placements and sizes are the real ones.
    """
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        ledgers = {}
        for variant, attention in COMBINATIONS:
            model = sm.Step3p5ForCausalLM.from_config(
                sm.Step3p5Config.tiny(), variant, sm.ParallelConfig(4, 2, attention), device="cpu"
            )
            with sm.Ledger() as ledgers[variant, attention]:
                model(torch.arange(64).view(4, 16))
        yield ledgers
    finally:
        dist.destroy_process_group()


def texts(figure: Figure) -> dict[Text, Bbox]:
    """Every text that is drawn, and where, in pixels."""
    figure.draw_without_rendering()
    hidden = set(itertools.chain(*map(_undrawn, figure.axes)))
    shown = [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()
    ]
    return {text: text.get_window_extent() for text in shown if text not in hidden}


def _undrawn(axes: Axes) -> list[Text]:
    """Texts of an Axes that exist but are never drawn: of a hidden axis, or outside its limits."""
    undrawn = []
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        labels = [axis.label, *axis.get_ticklabels(which="both")]
        is_drawn = axes.axison and axis.get_visible()
        xy = 0 if axis is axes.xaxis else 1
        undrawn += [
            label
            for label in labels
            if not is_drawn
            or (label is not axis.label and not low <= label.get_position()[xy] <= high)
        ]
    return undrawn


def check_legible(figure: Figure) -> None:
    """No text over another or outside the page; 9.5 pt at least, so that half size can be read."""
    boxes = texts(figure)
    page = figure.bbox.padded(0.5)
    for text, box in boxes.items():
        assert page.contains(box.x0, box.y0), text
        assert page.contains(box.x1, box.y1), text
        assert text.get_fontsize() >= 9.5, text
    for (a, box_a), (b, box_b) in itertools.combinations(boxes.items(), 2):
        # Half a pixel: extents are rounded up to whole ones.
        overlap = Bbox.intersection(box_a.padded(-0.5), box_b.padded(-0.5))
        assert overlap is None or min(overlap.width, overlap.height) <= 0, (a, b)


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def bars(figure: Figure, axes: int = 0) -> list[tuple[float, float, str]]:
    """Start, length and colour of every bar."""
    patches = (patch for container in figure.axes[axes].containers for patch in container)
    return [(p.get_x(), p.get_width(), to_hex(p.get_facecolor()).upper()) for p in patches]


def check_not_cut(figure: Figure) -> None:
    """Every text lies inside a box or outside it, never across its edge."""
    frames = [patch.get_window_extent() for patch in figure.axes[0].patches]
    for text, box in texts(figure).items():
        for frame in frames:
            inner, outer = box.padded(-0.5), frame.padded(0.5)
            overlap = Bbox.intersection(inner, outer)
            inside = outer.containsx(inner.x0) and outer.containsx(inner.x1)
            inside = inside and outer.containsy(inner.y0) and outer.containsy(inner.y1)
            assert inside or overlap is None or min(overlap.width, overlap.height) <= 1, text


def run_of(ledger: Ledger, ranks: int = 4, first: float = 0.003) -> list[Ledger]:
    """The same steps on every rank, with made-up times: `first` for the first collective."""
    ledgers = []
    for rank in range(ranks):
        made, clock = Ledger(rank=rank), 0.002 * rank  # opened at different moments
        for step in ledger.steps:
            seconds = 0.003 if step.kind == "collective" else 0.0004
            if step is ledger.entries[0]:
                seconds = first
            kept = Entry(**{**vars(step), "start": clock, "seconds": seconds})
            made.steps.append(kept)
            clock += seconds
        ledgers.append(made)
    return ledgers


def small_run() -> list[Ledger]:
    """Two ranks; rank 1 opened its ledger 5 ms later and came 1 ms earlier to the all_reduce."""
    steps = (("attention", 0.001, 0.002), ("all_reduce", 0.003, 0.003), ("mlp", 0.007, 0.001))
    late = (("attention", -0.004, 0.001), ("all_reduce", -0.003, 0.004), ("mlp", 0.002, 0.002))
    return [
        Ledger(
            rank=rank,
            steps=[
                Entry(op, "collective" if op == "all_reduce" else "local", 0, start=s, seconds=t)
                for op, s, t in lane
            ],
        )
        for rank, lane in enumerate((steps, late))
    ]


def test_timeline_draws_every_step_where_and_as_long_as_it_was() -> None:
    colour = charts.COLOURS
    drawn = bars(charts.timeline(small_run()))
    # Both all_reduces end at the same moment, 6 ms on rank 0's clock and 1 ms on rank 1's; zero is
    # the earliest start, 1 ms on both axes. In ms:
    expected = [
        (0, 2, colour["attention"]),
        (2, 3, colour["all_reduce"]),
        (6, 1, colour["mlp"]),
        (0, 1, colour["attention"]),
        (1, 4, colour["all_reduce"]),
        (6, 2, colour["mlp"]),
    ]
    assert [c for *_, c in drawn] == [c for *_, c in expected]
    for (start, length, _), (want_start, want_length, _) in zip(drawn, expected, strict=True):
        assert start == pytest.approx(want_start, abs=1e-9)  # rounding of float64 seconds
        assert length == pytest.approx(want_length, abs=1e-9)


def test_timeline_names_ranks_layers_collectives_and_what_was_measured() -> None:
    shown = words(charts.timeline(small_run(), "A run", label="2 CPU ranks"))
    for wanted in ("A run", "rank 0", "rank 1", "layer 0", "all_reduce ", "AR = all_reduce"):
        assert wanted in shown
    assert "ms since the first step  (2 CPU ranks)" in shown


def test_timeline_of_short_runs_counts_in_microseconds() -> None:
    ledgers = small_run()
    for step in itertools.chain(*(ledger.steps for ledger in ledgers)):
        step.start, step.seconds = step.start / 1e3, step.seconds / 1e3
    figure = charts.timeline(ledgers)
    assert "µs since the first step" in words(figure)
    assert bars(figure)[1][:2] == pytest.approx((2, 3))


def test_timeline_of_some_layers_draws_only_them(
    recorded: dict[tuple[str, str], Ledger],
) -> None:
    run = run_of(recorded["deferred", "tp"])
    wanted = sum(step.layer in (1, 2) for ledger in run for step in ledger.steps)
    figure = charts.timeline(run, layers=iter([1, 2]))
    assert len(bars(figure)) == wanted
    assert min(start for start, *_ in bars(figure)) == pytest.approx(0)
    assert {"layer 1", "layer 2"} <= set(words(figure))
    assert "layer 0" not in words(figure)


@pytest.mark.parametrize("attention", ["tp", "dp"])
def test_timelines_draw_every_variant_on_one_axis(
    recorded: dict[tuple[str, str], Ledger], attention: str
) -> None:
    runs = {name: run_of(recorded[name, attention]) for name in sm.VARIANTS}
    figure = charts.timelines(runs, "The variants at a glance", label="made up")
    check_legible(figure)
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    for index, (name, run) in enumerate(runs.items()):
        assert len(bars(figure, index)) == sum(len(ledger.steps) for ledger in run)
        codes = [
            t.get_text()
            for t in figure.axes[index].texts
            if t.get_text() in ("AR", "RS", "AG", "ARN")
        ]
        assert len(codes) == len(run[0].entries)
        assert name in words(figure)
        check_legible(charts.timeline(run, name))
        # One slow collective leaves a tenth of the width to all others.
        check_legible(charts.timeline(run_of(recorded[name, attention], first=0.5), name))
        check_legible(charts.timeline(run, name, layers=[1]))


def test_a_size_does_not_depend_on_times(recorded: dict[tuple[str, str], Ledger]) -> None:
    """A notebook's text output holds the figure's size, and must not change from run to run."""
    run = run_of(recorded["fused", "tp"])
    slow = run_of(recorded["fused", "tp"])
    for ledger in slow:
        for step in ledger.steps[3:]:
            step.start += 7.0
    assert repr(charts.timeline(run)) == repr(charts.timeline(slow))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize(("variant", "attention"), COMBINATIONS)
def test_dataflow_shows_every_step_of_a_layer(
    recorded: dict[tuple[str, str], Ledger], variant: str, attention: str, layer: int
) -> None:
    ledger = recorded[variant, attention]
    figure = charts.dataflow(ledger, layer, f"{variant}, {attention}")
    check_legible(figure)
    check_not_cut(figure)
    shown = words(figure)
    entries = [node.entry for node in layer_flow(ledger, layer).nodes if node.entry]
    assert [e for e in entries if e.kind == "collective"], "a layer without a collective"
    for op in {entry.op for entry in entries if entry.kind == "collective"}:
        assert shown.count(op) == sum(entry.op == op for entry in entries)
    assert shown.count("norm") == sum(entry.op == "norm" for entry in entries)
    assert "attention" in shown
    assert ("routed experts" in shown, "shared expert" in shown) == ((layer > 0,) * 2)
    assert ("dense MLP" in shown) == (layer == 0)


@pytest.mark.parametrize(("variant", "attention"), COMBINATIONS)
def test_every_step_of_a_pass_is_in_one_layers_flow(
    recorded: dict[tuple[str, str], Ledger], variant: str, attention: str
) -> None:
    ledger = recorded[variant, attention]
    drawn = [n.entry for layer in range(5) for n in layer_flow(ledger, layer).nodes if n.entry]
    in_layers = [step for step in ledger.steps if step.layer is not None]
    assert sorted(map(id, drawn)) == sorted(map(id, in_layers))


@pytest.mark.parametrize(("variant", "attention"), COMBINATIONS)
def test_what_leaves_a_layer_enters_the_next(
    recorded: dict[tuple[str, str], Ledger], variant: str, attention: str
) -> None:
    ledger = recorded[variant, attention]
    for layer in range(4):
        assert layer_flow(ledger, layer).leaves == layer_flow(ledger, layer + 1).enters


@pytest.mark.parametrize(
    ("variant", "attention", "left"),
    [
        ("three_all_reduces", "tp", "Replicate"),
        ("three_all_reduces", "dp", "Shard"),
        ("deferred", "tp", "Replicate"),
        ("deferred", "dp", "Shard"),
        ("fused", "tp", "Partial"),
        ("fused", "dp", "Shard"),
        ("reduce_scatter", "tp", "Shard"),
        ("reduce_scatter", "dp", "Shard"),
    ],
)
def test_a_layer_leaves_what_its_variant_says(
    recorded: dict[tuple[str, str], Ledger], variant: str, attention: str, left: str
) -> None:
    leaves = layer_flow(recorded[variant, attention], 2).leaves
    assert leaves is not None
    assert (leaves.name, leaves.placement) == ("share_expert_output + experts_output", left)


def test_dataflow_follows_the_branches(recorded: dict[tuple[str, str], Ledger]) -> None:
    nodes = layer_flow(recorded["three_all_reduces", "tp"], 1).nodes
    ops = ["add", "norm", "attention", "all_reduce", "add", "norm"]
    ops += ["share_expert", "all_reduce", "experts", "all_reduce", "+"]
    assert [node.op for node in nodes] == ops
    shared, routed = nodes[6], nodes[8]
    assert shared.reads == routed.reads == (nodes[5].makes,)
    assert nodes[-1].reads == (nodes[7].makes, nodes[9].makes)
    deferred = [node.op for node in layer_flow(recorded["deferred", "dp"], 1).nodes]
    assert deferred[-4:] == ["experts", "+", "all_reduce", "keep_own_tokens"]


def test_dataflow_of_several_passes_is_that_of_one(
    recorded: dict[tuple[str, str], Ledger],
) -> None:
    for key, ledger in recorded.items():
        twice = Ledger(steps=ledger.steps * 2)
        for layer in range(5):
            assert layer_flow(twice, layer) == layer_flow(ledger, layer), key
        alone = [step for step in ledger.steps if forward_layer(step) == 2]
        once, again = Ledger(steps=alone), Ledger(steps=alone * 2)
        assert layer_flow(again, 2) == layer_flow(once, 2), key


def test_dataflow_leaves_out_what_capture_sends(
    recorded: dict[tuple[str, str], Ledger],
) -> None:
    ledger = recorded["deferred", "tp"]
    copy = Entry("all_reduce", "collective", 1, site="capture", tensor="attn_output")
    with_capture = Ledger(steps=[x for step in ledger.steps for x in (step, copy)])
    assert layer_flow(with_capture, 2) == layer_flow(ledger, 2)


@pytest.mark.parametrize("attention", ["tp", "dp"])
def test_collectives_label_counts_and_bytes(
    recorded: dict[tuple[str, str], Ledger], attention: str
) -> None:
    ledgers = {name: recorded[name, attention] for name in sm.VARIANTS}
    figure = charts.collectives(ledgers, "What a variant sends")
    check_legible(figure)
    counts, sent = figure.axes
    for row, ledger in enumerate(ledgers.values()):
        of_layer = ledger.of_layer(1)
        numbers = [
            t.get_text()
            for t in counts.texts
            if t.get_position()[1] == row and t.get_text().isdigit()
        ]
        assert numbers == [str(len(of_layer)), str(len(ledger.entries))]
        length = sum(
            p.get_width() for c in sent.containers for p in c if round(p.get_y() + 0.3) == row
        )
        assert length == pytest.approx(sum(entry.bytes_sent for entry in of_layer))
    # 64 tokens x 128 x 4 bytes are 32 KiB; an all_reduce over 4 ranks sends 2 x 3/4 of them: 48.
    if attention == "tp":
        assert {"144.0 KiB", "96.0 KiB"} <= set(words(figure))


def test_sizes_to_compare_have_one_unit() -> None:
    assert bytes_in_one_unit([2016 * 1024, 792 * 1024]) == ["2,016 KiB", "792 KiB"]
    assert bytes_in_one_unit([3 * 2**20, 1.5 * 2**20]) == ["3.0 MiB", "1.5 MiB"]
    assert bytes_in_one_unit([0, 2048]) == ["0 B", "2,048 B"]


def test_a_thing_has_one_colour_in_every_chart(
    recorded: dict[tuple[str, str], Ledger],
) -> None:
    ledgers = {name: recorded[name, "tp"] for name in sm.VARIANTS}
    counted = charts.collectives(ledgers)
    timed = charts.timelines({name: run_of(ledger) for name, ledger in ledgers.items()})
    for figure in (counted, timed):
        markers = {
            to_hex(line.get_color()).upper()
            for axes in figure.axes
            for line in axes.lines
            if line.get_marker() == "s"
        }
        assert markers == {charts.COLOURS[name] for name in sm.VARIANTS}
    ops = {entry.op for ledger in ledgers.values() for entry in ledger.entries}
    drawn = {c for index in (0, 1) for *_, c in bars(counted, index)}
    assert drawn == {charts.COLOURS[op] for op in ops}
    assert drawn <= {c for index in range(4) for *_, c in bars(timed, index)}


def test_colour_is_never_the_only_cue() -> None:
    """Kinds of step that can stand side by side differ in colour and in hatch or brightness."""
    collectives = ("all_reduce", "reduce_scatter", "all_gather", "all_reduce_add_rms_norm")
    assert len({charts.HATCHES[op] for op in collectives}) == 4
    assert len({charts.COLOURS[op] for op in collectives}) == 4
    local = ("attention", "experts", "share_expert", "add")
    assert len({charts.HATCHES.get(op) for op in local}) == 4
    assert charts.HATCHES.get("mlp") != charts.HATCHES["experts"]
    assert len({charts.COLOURS[name] for name in sm.VARIANTS}) == 4
    assert len({charts.MARKERS[name] for name in sm.VARIANTS}) == 4


SHAPES = {
    "tiny tp4 ep2": (sm.Step3p5Config.tiny(), sm.ParallelConfig(4, 2)),
    "tiny tp8 ep8": (sm.Step3p5Config.tiny(), sm.ParallelConfig(8, 8)),
    "tiny dp": (sm.Step3p5Config.tiny(), sm.ParallelConfig(4, 1, "dp")),
    "flash tp8 ep4": (sm.Step3p5Config.flash(), sm.ParallelConfig(8, 4)),
    "flash tp16 ep4": (sm.Step3p5Config.flash(), sm.ParallelConfig(16, 4)),
    "one rank": (sm.Step3p5Config.tiny(), sm.ParallelConfig()),
}


@pytest.mark.parametrize("layer", [0, 4])
@pytest.mark.parametrize(("config", "parallel"), SHAPES.values(), ids=SHAPES.keys())
def test_layout_is_legible(
    config: sm.Step3p5Config, parallel: sm.ParallelConfig, layer: int
) -> None:
    figure = charts.layout(config, parallel, layer)
    check_legible(figure)
    shown = words(figure)
    assert [w for w in shown if w.startswith("rank ")] == [f"rank {r}" for r in range(parallel.tp)]
    assert ("routed experts" in shown) == config.layer(layer).is_moe
    held = [
        p
        for p in figure.findobj(Rectangle)
        if to_hex(p.get_facecolor()).upper() in charts.COLOURS.values()
    ]
    assert len(held) == parallel.tp * (4 if config.layer(layer).is_moe else 3)


def test_layout_says_who_holds_what() -> None:
    shown = words(charts.layout(sm.Step3p5Config.tiny(), sm.ParallelConfig(8, 4), 1))
    # 24 query heads: 3 a rank; 4 key-value heads: each on two ranks; 16 experts: 4 on each pair of
    # ranks, which cut their 64 rows in two; shared expert: 8 of 64 rows a rank.
    assert "9\u201311" in shown
    assert "16 × 64 rows" in shown  # "16 of 64 rows" read as a part of 64
    assert shown.count("12\u201315") == 2  # experts of ranks 6 and 7
    assert shown.count("rows 0\u201331") == shown.count("rows 32\u201363") == 4
    assert "56\u201363" in shown
    assert [shown.count(str(head)) for head in range(4)] == [2, 2, 2, 2]


def test_layout_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(sm.ConfigError, match="tp=32"):
        charts.layout(sm.Step3p5Config.flash(), sm.ParallelConfig(32), 0)
    with pytest.raises(sm.ConfigError, match="layer 99"):
        charts.layout(sm.Step3p5Config.tiny(), sm.ParallelConfig(4), 99)


def test_empty_ledgers_say_what_to_do() -> None:
    for draw in (
        lambda: charts.timeline([Ledger(), Ledger()]),
        lambda: charts.timeline([]),
        lambda: charts.dataflow(Ledger(), 0),
        lambda: charts.collectives({"deferred": Ledger()}),
        lambda: charts.timelines({"deferred": [Ledger()]}),
    ):
        with pytest.raises(sm.ConfigError, match=r"with sm\.Ledger\(\) as ledger: model"):
            draw()
    for draw_none in (charts.timelines, charts.collectives):
        with pytest.raises(sm.ConfigError, match="no variant"):
            draw_none({})


def test_ledgers_that_do_not_fit_say_why(recorded: dict[tuple[str, str], Ledger]) -> None:
    ledger = recorded["deferred", "tp"]
    with pytest.raises(sm.ConfigError, match="list"):
        charts.timeline(ledger)  # type: ignore[arg-type]
    with pytest.raises(sm.ConfigError, match="different collectives"):
        charts.timeline([ledger, recorded["reduce_scatter", "tp"]])
    with pytest.raises(sm.ConfigError, match="not every rank"):
        charts.timeline([ledger, Ledger(rank=1, steps=ledger.steps[:1])])
    with pytest.raises(sm.ConfigError, match=r"of deferred hold no step of layers \[7\]"):
        charts.timelines({"deferred": [ledger]}, layers=[7])
    with pytest.raises(sm.ConfigError, match="fewer layers"):
        charts.timeline([Ledger(steps=ledger.steps * 9)])
    with pytest.raises(sm.ConfigError, match="layers it holds: 0, 1, 2, 3, 4"):
        charts.dataflow(ledger, 5)
    with pytest.raises(sm.ConfigError, match="2 forward passes"):
        charts.collectives({"deferred": Ledger(steps=ledger.steps * 2)})
    with pytest.raises(sm.ConfigError, match="no MoE layer"):
        charts.collectives({"deferred": Ledger(steps=ledger.steps[:3])})


def test_spread_moves_labels_apart_and_no_further() -> None:
    assert spread([1.0, 5.0], [1.0, 1.0], 10) == [1.0, 5.0]
    assert spread([4.0, 4.0], [1.0, 1.0], 10) == [3.5, 4.5]
    assert spread([0.0, 0.1], [1.0, 2.0], 10) == [0.5, 2.0]
    assert spread([9.9, 10.0], [1.0, 1.0], 10) == [8.5, 9.5]
    assert spread([2.0, 2.0, 6.0], [1.0, 1.0, 1.0], 10) == [1.5, 2.5, 6.0]
