"""What the rules of `dotcbm.report.findings.run` share."""

from __future__ import annotations

from dotcbm.report.record import AuditRecord, Figure

__all__ = ["LEAST", "counted", "find", "listed", "points"]


LEAST = 30
"""What a rule must have counted: a bootstrap of a few equal values has an interval of width 0 and proves nothing."""


def find(record: AuditRecord, key: str) -> Figure | None:
    """The figure of that key, None where it was not measured."""
    return next((figure for figure in record.figures if figure.key == key and figure.value.value is not None), None)


def listed(names: tuple[str, ...], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def points(share: float | None) -> str:
    """A share in points, as "12.3"."""
    return f"{100 * (share or 0.0):.1f}"


def counted(names: tuple[str, ...], one: str, many: str) -> str:
    """ "1 concept is" or "3 concepts are", with the verb given."""
    return f"1 concept {one}" if len(names) == 1 else f"{len(names)} concepts {many}"
