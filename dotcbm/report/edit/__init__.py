"""Concepts removed or re-weighted in a finished model, the head fitted anew, and what that changed."""

from __future__ import annotations

from dotcbm.report.edit.log import HeadSettings
from dotcbm.report.edit.render import write_edited
from dotcbm.report.edit.run import Edited, edit_model

__all__ = ["Edited", "HeadSettings", "edit_model", "write_edited"]
