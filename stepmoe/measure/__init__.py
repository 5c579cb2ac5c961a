"""Measure: latency of the variants, accuracy of their answers, numerical error, and how sure it is.

`significance` says how sure a difference of accuracies is, `sample_size` how many questions it
takes to see one, `speedup` how sure it is that a variant is faster.
"""

from stepmoe.measure.accuracy import compare_accuracy, outcomes_of, paired
from stepmoe.measure.error import numerical_error
from stepmoe.measure.fused_ops import time_fused_ops
from stepmoe.measure.fused_ops_file import load_fused_ops
from stepmoe.measure.fused_ops_file import table as fused_ops_table
from stepmoe.measure.invariance import batch_invariance
from stepmoe.measure.latency import compare_latency
from stepmoe.measure.report import table
from stepmoe.measure.store import load, load_each, save
from stepmoe.measure.task import word_problems
from stepmoe.measure.throughput import compare_throughput
from stepmoe.measure.timeline import Profile, profile
from stepmoe.measure.workload import Workload

__all__ = [
    "Profile",
    "Workload",
    "batch_invariance",
    "compare_accuracy",
    "compare_latency",
    "compare_throughput",
    "fused_ops_table",
    "load",
    "load_each",
    "load_fused_ops",
    "numerical_error",
    "outcomes_of",
    "paired",
    "profile",
    "save",
    "table",
    "time_fused_ops",
    "word_problems",
]
