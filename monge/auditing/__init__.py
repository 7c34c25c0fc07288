"""What the routing of any Mixture-of-Experts model does, and what it would take to serve it.

    model, batches of token ids --> record every route --> AuditReport --> table, records, report

The model may be transformers' own, one that `monge.hf.use_router` changed, or one with `monge.MoE` layers.
"""

from monge.auditing.findings import AuditReport, LayerAudit
from monge.auditing.running import audit

__all__ = ["AuditReport", "LayerAudit", "audit"]
