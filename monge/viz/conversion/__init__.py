"""Figures and the HTML report of conversions and their evaluations, from the records on disk alone.

config.json, records.jsonl, summary.json --> Run --> Result (runs that differ in their seed) --> report.html
"""

from monge.viz.conversion.findings import headline
from monge.viz.conversion.report import figure_paths, write_report
from monge.viz.conversion.results import Result, gather_results
from monge.viz.conversion.runs import Run, read_runs

__all__ = ["Result", "Run", "figure_paths", "gather_results", "headline", "read_runs", "write_report"]
