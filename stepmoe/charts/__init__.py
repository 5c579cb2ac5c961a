"""Pictures of what a run did, drawn from its ledgers, and of what each rank holds.

Every function returns a matplotlib Figure: as the last line of a notebook cell it is shown.
"""

from stepmoe.charts.accuracy import accuracy, flips, questions_needed
from stepmoe.charts.bug_lab import (
    Signature,
    accuracy_under_faults,
    guard_matrix,
    signatures,
)
from stepmoe.charts.collectives import collectives
from stepmoe.charts.cost import cost_fit, roofline
from stepmoe.charts.crossover import CrossoverPlot, crossover
from stepmoe.charts.dataflow import dataflow
from stepmoe.charts.depth import error_by_depth, error_growth
from stepmoe.charts.eight import assumptions_matter, gain_waterfall, predicted_steps
from stepmoe.charts.error import batch_invariance, logit_errors
from stepmoe.charts.fused_ops import fused_ops
from stepmoe.charts.latency import latency, speedup, where_the_time_goes
from stepmoe.charts.layer_floor import layer_floor
from stepmoe.charts.layout import layout
from stepmoe.charts.profiled import profile_timeline
from stepmoe.charts.scaling import expert_imbalance, scaled_steps, step_at, where_it_pays
from stepmoe.charts.steps import layer_steps, steps
from stepmoe.charts.style import COLOURS, HATCHES, MARKERS, style
from stepmoe.charts.sums import sums
from stepmoe.charts.timeline import timeline, timelines
from stepmoe.charts.training import training

__all__ = [
    "COLOURS",
    "HATCHES",
    "MARKERS",
    "CrossoverPlot",
    "Signature",
    "accuracy",
    "accuracy_under_faults",
    "assumptions_matter",
    "batch_invariance",
    "collectives",
    "cost_fit",
    "crossover",
    "dataflow",
    "error_by_depth",
    "error_growth",
    "expert_imbalance",
    "flips",
    "fused_ops",
    "gain_waterfall",
    "guard_matrix",
    "latency",
    "layer_floor",
    "layer_steps",
    "layout",
    "logit_errors",
    "predicted_steps",
    "profile_timeline",
    "questions_needed",
    "roofline",
    "scaled_steps",
    "signatures",
    "speedup",
    "step_at",
    "steps",
    "style",
    "sums",
    "timeline",
    "timelines",
    "training",
    "where_it_pays",
    "where_the_time_goes",
]
