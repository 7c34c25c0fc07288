"""Figures and the HTML report of a comparison, from the records on disk alone.

config.json, records.jsonl, summary.json --> Comparison --> figures (PNG, SVG), findings --> report.html
"""

from monge.viz.columns import COLUMNS, Column
from monge.viz.findings import headline
from monge.viz.records import Comparison, read_comparison
from monge.viz.report import figure_paths, write_report

__all__ = ["COLUMNS", "Column", "Comparison", "figure_paths", "headline", "read_comparison", "write_report"]
