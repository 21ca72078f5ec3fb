"""Every method of a study trained, audited and set in tables, each figure with the record it is from."""

from __future__ import annotations

from dotcbm.report.study.experts_plan import is_expert_study
from dotcbm.report.study.plan import Claim, Record, Row, Study, World, read_records, read_study
from dotcbm.report.study.run import run_study

__all__ = ["Claim", "Record", "Row", "Study", "World", "is_expert_study", "read_records", "read_study", "run_study"]
