"""Explorers for a notebook: change a setting, see what changes. Without a kernel: a still picture.

    from stepmoe import widgets
    widgets.CrossoverExplorer()

The controls are ipywidgets' own and work by keyboard: Tab goes from one to the next, arrow keys,
Page Up and Page Down move a slider or a choice, Space or Enter presses a button.
"""

from stepmoe.widgets.crossover import CrossoverExplorer
from stepmoe.widgets.layout import LayoutExplorer
from stepmoe.widgets.prediction import PredictionExplorer
from stepmoe.widgets.scaling import ScalingExplorer
from stepmoe.widgets.step_through import StepThrough

__all__ = [
    "CrossoverExplorer",
    "LayoutExplorer",
    "PredictionExplorer",
    "ScalingExplorer",
    "StepThrough",
]
