"""A record drawn as one HTML file, as Markdown, or as PDF."""

from __future__ import annotations

from dotcbm.report.render.run import html, markdown, write_html, write_markdown, write_pdf

__all__ = ["html", "markdown", "write_html", "write_markdown", "write_pdf"]
