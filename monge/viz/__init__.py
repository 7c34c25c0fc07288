"""Figures and the HTML report of a comparison, from the records on disk alone.

config.json, records.jsonl, summary.json --> Comparison --> figures (PNG, SVG), findings --> report.html
"""

from monge.viz.columns import Column, columns_of
from monge.viz.findings import headline
from monge.viz.records import Comparison, read_comparison
from monge.viz.report import figure_paths, write_report

__all__ = [
    "Column",
    "Comparison",
    "columns_of",
    "figure_paths",
    "headline",
    "read_comparison",
    "write_report",
]
