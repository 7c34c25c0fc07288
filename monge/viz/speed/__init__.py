"""The report of `monge bench`, from the records on disk alone."""

from monge.viz.speed.report import figure_paths, write_report
from monge.viz.speed.run import SpeedRun, headline, read_speed, tables

__all__ = ["SpeedRun", "figure_paths", "headline", "read_speed", "tables", "write_report"]
