"""Records side by side, with paired intervals, as tables and as a page."""

from __future__ import annotations

from dotcbm.report.compare.record import Comparison
from dotcbm.report.compare.render import write_comparison
from dotcbm.report.compare.run import compare

__all__ = ["Comparison", "compare", "write_comparison"]
