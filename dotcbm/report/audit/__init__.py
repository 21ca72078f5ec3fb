"""Audit a model on a split: one record of everything an auditor asks, section by section."""

from __future__ import annotations

from dotcbm.report.audit.run import audit
from dotcbm.report.collect.settings import AuditSettings

__all__ = ["AuditSettings", "audit"]
