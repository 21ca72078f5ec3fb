"""What the documents point to is there: in a fresh clone, a file that was never committed is a dead link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(([^)\s#]+)")
_DOCUMENTS = [_ROOT / "README.md", *sorted(_ROOT.glob("reports/**/*.md")), *sorted(_ROOT.glob("datasets/**/*.md"))]


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []
