"""Measure: latency of the variants, where the time goes, and what the profiler sees."""

from stepmoe.measure.latency import compare_latency
from stepmoe.measure.report import table
from stepmoe.measure.store import load, save
from stepmoe.measure.timeline import Profile, profile

__all__ = ["Profile", "compare_latency", "load", "profile", "save", "table"]
