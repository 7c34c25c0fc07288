"""The report of an audit, from the records on disk alone."""

from monge.viz.audit.report import figure_paths, write_report
from monge.viz.audit.run import AuditRun, headline, read_audit

__all__ = ["AuditRun", "figure_paths", "headline", "read_audit", "write_report"]
