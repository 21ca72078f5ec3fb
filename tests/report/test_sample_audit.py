"""The audits that are committed in reports/audit: what a reader opens, in a real browser, and nothing that may not be shown.

The browser tests need playwright and a Chromium; skipped without, unless DOTCBM_REQUIRE_BROWSER is set.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dotcbm.report.record_file import read_record

_FOLDER = Path(__file__).parents[2] / "reports" / "audit"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PAGES = ("birds", "synthetic")
_MACHINE = re.compile(r"(?:/(?:work|tmp|root|home|Users|mnt|opt)/)|(?:[A-Z]:\\\\)|(?:\.\./)")
_LARGEST = 15e6  # bytes: what an audit may take


@dataclass
class Visit:
    """A page with what it said and what it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None or find_spec("playwright") is None:
        reason = f"no playwright, or none of {', '.join(_NAMES)} on the path"
        if os.environ.get("DOTCBM_REQUIRE_BROWSER"):
            pytest.fail(f"{reason}, and DOTCBM_REQUIRE_BROWSER says that browser tests must run")
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=_PAGES)
def visit(request: pytest.FixtureRequest, browser: Any) -> Iterator[Visit]:
    """A sample in a fresh context; it must have stayed silent and offline to the end."""
    path = _FOLDER / f"{request.param}.html"
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")
    visited = Visit(context.new_page())

    def route(asked: Any) -> None:
        if asked.request.url != path.as_uri():
            visited.requests.append(asked.request.url)
        asked.continue_()

    context.route(lambda url: not url.startswith(("data:", "blob:")), route)
    visited.page.on("console", lambda message: visited.complaints.append(message.text))
    visited.page.on("pageerror", lambda error: visited.complaints.append(str(error)))
    visited.page.goto(path.as_uri())
    yield visited
    context.close()
    assert visited.complaints == []
    assert visited.requests == []


def _focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")


def _pixels(page: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(float)


def test_the_whole_page_is_silent_and_asks_for_nothing(visit: Visit) -> None:
    page = visit.page
    height = page.evaluate("document.documentElement.scrollHeight")
    for y in range(0, height, 3000):
        page.evaluate(f"window.scrollTo(0, {y})")
    page.wait_for_timeout(50)
    assert page.locator("section").count() == 12
    assert page.locator("#verdict li.finding").count() >= 5
    broken = "[...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.id)"
    assert page.evaluate(broken) == []


def test_the_keyboard_leads_through_it(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    assert _focused(page) == "Skip to the verdict"
    page.keyboard.press("Enter")
    page.wait_for_timeout(50)
    seen = [_focused(page)]
    for key in ("2", "j", "k", "6"):
        page.keyboard.press(key)
        seen.append(_focused(page))
    assert seen == ["verdict", "errors", "classes", "errors", "suspects"]
    assert page.evaluate("document.getElementById('suspects').getBoundingClientRect().top") < 900
    for _ in range(20):
        page.keyboard.press("Tab")
        assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2, _focused(page)


def test_sliders_and_maps_of_the_first_error_work(visit: Visit) -> None:
    card = visit.page.locator("#card-errors-0")
    before = card.locator(".now").all_text_contents()
    slider = card.locator("input[type=range]").first
    strong = float(slider.input_value()) > 0.5
    slider.press("Home" if strong else "End")
    assert card.locator(".now").all_text_contents() != before
    card.locator(".reset").press("Enter")
    assert card.locator(".now").all_text_contents() == before
    card.locator("button.map").nth(2).press("Enter")
    wanted = card.locator("tr[data-i='2'] th").text_content()
    assert card.locator(".map-name").text_content() == wanted
    assert card.locator(".heat").is_visible()


def test_light_dark_and_print_can_be_read(visit: Visit) -> None:
    page = visit.page
    light = _pixels(page)
    page.keyboard.press("t")
    dark = _pixels(page)
    page.emulate_media(media="print")
    printed = _pixels(page)
    for picture in (light, dark, printed):
        assert len(np.unique(picture.reshape(-1, 3)[::7], axis=0)) > 100
    assert light.mean() > 200
    assert dark.mean() < 70
    assert printed.mean() > 200


@pytest.mark.parametrize("name", _PAGES)
def test_what_is_shown_may_be_shown(name: str) -> None:
    page = (_FOLDER / f"{name}.html").read_text(encoding="utf-8")
    held = re.search(r'<script type="application/json" id="record">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    record = json.loads(held[1])
    cards = [*record["errors"], *record["cards"]]
    assert record["errors"]
    assert all(concept["heat"] for card in cards for concept in card["concepts"])
    if name == "birds":  # the photos are their photographers'
        assert "data:image/jpeg" not in page
        assert not any(card["image"] for card in cards)
        assert record["grid"] == []
        assert dict(record["card"]["audit"])["pictures"] == "False"
        assert "photos are left out" in page
    else:
        assert record["card"]["data"].startswith("Synthetic(")
        assert page.count("data:image/jpeg") == len(cards) + len(record["grid"]) > 20


@pytest.mark.parametrize("path", sorted(_FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_file_names_a_machine_or_is_too_large(path: Path) -> None:
    assert path.stat().st_size < _LARGEST
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
    assert _MACHINE.findall(text) == []


def test_every_finding_of_the_birds_is_decided() -> None:
    record = read_record(_FOLDER / "birds.json")
    assert {card.image for card in (*record.errors, *record.cards)} == {""}
    assert len(record.pictures.name) == record.card.num_pictures == 703
    for finding in record.findings:
        assert finding.measured.value is not None
        assert finding.rule
        assert finding.verdict in ("confirmed", "refuted"), finding.key
        counted = finding.unit == "number" and finding.measured.low is None  # of labels: there is nothing to control
        assert finding.control is not None or counted, finding.key
