"""What an auditor should know, by fixed rules from the figures of a record."""

from __future__ import annotations

from dotcbm.report.findings.run import find_all, summary

__all__ = ["find_all", "summary"]
