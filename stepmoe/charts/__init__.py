"""Pictures of what a run did, drawn from its ledgers, and of what each rank holds.

Every function returns a matplotlib Figure: as the last line of a notebook cell it is shown.
"""

from stepmoe.charts.collectives import collectives
from stepmoe.charts.dataflow import dataflow
from stepmoe.charts.layout import layout
from stepmoe.charts.style import COLOURS, HATCHES, MARKERS, style
from stepmoe.charts.timeline import timeline, timelines

__all__ = [
    "COLOURS",
    "HATCHES",
    "MARKERS",
    "collectives",
    "dataflow",
    "layout",
    "style",
    "timeline",
    "timelines",
]
