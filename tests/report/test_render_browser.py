"""The page in a real browser: silent, offline, usable by keyboard, and deaf to names that look like markup.

Needs playwright and a Chromium; skipped without, unless DOTCBM_REQUIRE_BROWSER is set.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.audit_record import make_record
from PIL import Image

from dotcbm.report.record import AuditRecord
from dotcbm.report.record_file import record_to_json
from dotcbm.report.render import write_html

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass
class Visit:
    """A page with what it said and what it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        path = None
    if path is None:
        reason = f"no playwright, or none of {', '.join(_NAMES)} on the path"
        if os.environ.get("DOTCBM_REQUIRE_BROWSER"):
            pytest.fail(f"{reason}, and DOTCBM_REQUIRE_BROWSER says that browser tests must run")
        pytest.skip(reason)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def record() -> AuditRecord:
    return make_record(num_pictures=30, num_cards=2, num_grid=12, size=96)


@pytest.fixture(scope="module")
def file(record: AuditRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(record, tmp_path_factory.mktemp("page") / "audit.html")


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Visit]:
    visited = _open(browser, file)
    yield visited
    visited.page.context.close()
    assert visited.complaints == []
    assert visited.requests == []


def _open(browser: Any, path: Path, **settings: Any) -> Visit:
    context = browser.new_context(viewport={"width": 1400, "height": 900}, **settings)
    visited = Visit(context.new_page())

    def route(asked: Any) -> None:
        if asked.request.url != path.as_uri():
            visited.requests.append(asked.request.url)
        asked.continue_()

    context.route(lambda url: not url.startswith(("data:", "blob:")), route)
    visited.page.on("console", lambda message: visited.complaints.append(message.text))
    visited.page.on("pageerror", lambda error: visited.complaints.append(str(error)))
    visited.page.goto(path.as_uri())
    return visited


def _focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")


def test_nothing_is_said_and_nothing_is_asked_for(visit: Visit) -> None:
    visit.page.mouse.wheel(0, 20000)
    visit.page.wait_for_timeout(100)
    assert visit.page.locator("section").count() == 12
    blocked = visit.page.evaluate("fetch('https://example.org').then(() => 'reached', () => 'blocked')")
    assert blocked == "blocked"
    visit.complaints.clear()  # the policy reports the attempt


def test_the_skip_link_is_the_first_stop_and_leads_to_the_verdict(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    assert _focused(page) == "Skip to the verdict"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top >= 0")
    page.keyboard.press("Enter")
    page.wait_for_timeout(50)
    assert _focused(page) == "verdict"


def test_keys_go_through_the_sections_and_can_be_switched_off(visit: Visit) -> None:
    page = visit.page
    seen = []
    for key in ("4", "j", "j", "k", "1"):
        page.keyboard.press(key)
        seen.append(_focused(page))
    assert seen == ["concepts", "parts", "suspects", "parts", "verdict"]
    page.keyboard.press("?")
    assert page.locator("#keys").evaluate("e => e.open")
    page.locator("#keys-on").uncheck()
    page.locator("#theme").focus()
    page.keyboard.press("4")
    assert _focused(page) == "theme"


def test_every_stop_of_the_tab_key_shows_its_focus(visit: Visit) -> None:
    page = visit.page
    stops = 0
    for _ in range(30):
        page.keyboard.press("Tab")
        width = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
        assert width >= 2, _focused(page)
        stops += 1
    assert stops == 30


def test_a_table_is_sorted_by_keyboard_and_says_so(visit: Visit, record: AuditRecord) -> None:
    page = visit.page
    head = page.locator("#concept-table thead th").nth(7)
    head.locator("button").focus()

    def column() -> list[str]:
        return page.locator("#concept-table tbody tr").evaluate_all("rows => rows.map(r => r.cells[7].dataset.v)")

    known = sorted(c.auroc.value for c in record.concepts if c.auroc.value is not None)
    for press, order, sign in (("Enter", "descending", -1), ("Space", "ascending", 1)):
        page.keyboard.press(press)
        assert head.get_attribute("aria-sort") == order
        values = [float(value) for value in column() if value]
        assert values == pytest.approx(known[::sign], rel=1e-5)
        assert [value for value in column() if not value] == column()[len(known) :]
    assert page.locator("#concept-table th[aria-sort]").count() == 1
    page.locator("#concept-table thead th").first.locator("button").press("Enter")
    names = page.locator("#concept-table tbody th").all_text_contents()
    assert names == sorted(names)


def test_the_concepts_are_filtered(visit: Visit, record: AuditRecord) -> None:
    page = visit.page
    page.keyboard.press("/")
    page.keyboard.type("wing")
    wanted = [c.name for c in record.concepts if "wing" in " ".join((c.name, c.group or "", *c.parts))]
    assert page.locator("#concept-table tbody tr:not([hidden]) th").all_text_contents() == wanted
    assert page.locator("#concept-table-count").text_content() == f"{len(wanted)} of {len(record.concepts)} concepts"
    page.locator("[data-only]").check()
    shown = [c.name for c in record.concepts if c.shown and c.name in wanted]
    assert page.locator("#concept-table tbody tr:not([hidden]) th").all_text_contents() == shown


def _now(page: Any, card: str) -> list[str]:
    return page.locator(f"#card-{card} .now").all_text_contents()


@pytest.mark.parametrize("head_on", ["probability", "logit"])
def test_a_slider_changes_the_class_probabilities_as_the_head_would(
    browser: Any, record: AuditRecord, tmp_path: Path, head_on: Any
) -> None:
    held = replace(record, card=replace(record.card, head_on=head_on))
    visited = _open(browser, write_html(held, tmp_path / "a.html"))
    page, card = visited.page, held.cards[0]
    page.locator("#card-cards-0 summary").press("Enter")
    slider = page.locator("#card-cards-0 input[type=range]").first
    before = _now(page, "cards-0")
    slider.focus()
    page.keyboard.press("Home")
    lowest = min(-8.0, card.concepts[0].logit) if head_on == "logit" else 0.0
    change = lowest - (card.concepts[0].logit if head_on == "logit" else card.concepts[0].probability)
    logits = np.array(card.class_logits) + change * np.array(card.concepts[0].slope_K)
    every = [*logits, *([] if card.rest is None else [card.rest])]
    wanted = np.exp(logits) / np.exp(every).sum()
    assert [float(value) for value in _now(page, "cards-0")] == pytest.approx((100 * wanted).tolist(), abs=0.06)
    assert _now(page, "cards-0") != before
    assert "1 changed" in page.locator("#card-cards-0 .said").text_content()
    page.locator("#card-cards-0 .reset").press("Enter")
    assert _now(page, "cards-0") == before
    assert page.locator("#card-cards-0 .reset").is_disabled()
    visited.page.context.close()
    assert visited.complaints == []


def test_maps_are_chosen_by_keyboard_and_as_strong_as_the_concept_is_probable(visit: Visit, record: AuditRecord) -> None:
    page, card = visit.page, record.cards[0]
    page.locator("#card-cards-0 summary").press("Enter")
    buttons = page.locator("#card-cards-0 button.map")
    for i in (3, 1):
        buttons.nth(i).press("Enter")
        assert buttons.nth(i).get_attribute("aria-pressed") == "true"
        assert page.locator('#card-cards-0 button.map[aria-pressed="true"]').count() == 1
        heat = page.locator("#card-cards-0 .heat")
        assert float(heat.evaluate("e => e.style.opacity")) == pytest.approx(card.concepts[i].probability, abs=1e-3)
        assert heat.locator("img").get_attribute("src") == buttons.nth(i).locator("img").get_attribute("src")
        assert page.locator("#card-cards-0 .map-name").text_content() == record.concepts[card.concepts[i].concept].name
    page.locator("#card-cards-0 .gate").press("Enter")
    assert page.locator("#card-cards-0 .heat").evaluate("e => e.style.opacity") == "1"
    page.locator("#card-cards-0 .hide-map").press("Enter")
    assert not page.locator("#card-cards-0 .heat").is_visible()


def test_the_grid_is_sorted_and_filtered(visit: Visit, record: AuditRecord) -> None:
    page, columns = visit.page, record.pictures
    rows = [thumbnail.row for thumbnail in record.grid]
    concept = next(j for j, row in enumerate(record.concepts) if row.shown)
    page.locator("#grid-sort").select_option(str(concept))
    shown = page.locator("#grid-list li").evaluate_all("items => items.map(item => Number(item.dataset.row))")
    assert shown == sorted(rows, key=lambda row: -columns.concept_probability[row][concept])
    page.locator("#grid-order").select_option("up")
    page.locator("#grid-show").select_option("wrong")
    shown = page.locator("#grid-list li:not([hidden])").evaluate_all("items => items.map(item => Number(item.dataset.row))")
    wrong = [row for row in rows if columns.label[row] != columns.predicted[row]]
    assert wrong
    assert shown == sorted(wrong, key=lambda row: columns.concept_probability[row][concept])


def test_the_record_is_saved_byte_for_byte(visit: Visit, record: AuditRecord) -> None:
    with visit.page.expect_download() as waiting:
        visit.page.locator("#save").press("Enter")
    assert Path(waiting.value.path()).read_text(encoding="utf-8") == record_to_json(record)


def test_hostile_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    held = make_record(num_pictures=24, num_cards=4, num_grid=24, size=64, hostile=True)
    visited = _open(browser, write_html(held, tmp_path / "a.html"))
    page = visited.page
    for button in page.locator("table.sortable th button").all()[:6]:
        button.press("Enter")
    for summary in page.locator("details.weigh summary").all():
        if not summary.evaluate("e => e.parentElement.open"):
            summary.press("Enter")
    for slider in page.locator("input[type=range]").all()[:20]:
        slider.press("Home")
    for button in page.locator("button.map").all()[:20]:
        button.press("Enter")
    page.locator("#grid-sort").select_option("0")
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned === undefined")
    assert page.locator("script").count() == 2
    assert page.evaluate("JSON.parse(document.getElementById('record').textContent).class_names[0]") == held.class_names[0]
    page.context.close()
    assert visited.complaints == []
    assert visited.requests == []


def test_it_reads_without_its_script(browser: Any, file: Path, record: AuditRecord) -> None:
    visited = _open(browser, file, java_script_enabled=False)
    page = visited.page
    assert page.locator("#card-cards-0 .weights").is_visible()
    assert page.locator("#card-cards-0 .heat img").is_visible()
    assert not page.locator("input[type=range]").first.is_visible()
    assert not page.locator("#theme").is_visible()
    assert page.locator("#concept-table tbody tr").count() == len(record.concepts)
    page.context.close()


@pytest.mark.parametrize("width", [360, 768, 1400, 3840])
def test_it_fits_the_width(browser: Any, file: Path, width: int) -> None:
    visited = _open(browser, file)
    visited.page.set_viewport_size({"width": width, "height": 900})
    assert visited.page.evaluate("document.documentElement.scrollWidth") == width
    assert visited.page.locator("h1").is_visible()
    visited.page.context.close()


_CONTRAST = """() => {
  const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const c = parse(getComputedStyle(at).backgroundColor);
      layers.push(c.length === 4 ? c : [...c, 1]);
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reduceRight((under, c) => [0, 1, 2].map(i => c[i] * c[3] + under[i] * (1 - c[3])), [255, 255, 255]);
  };
  const poor = [];
  for (const element of document.querySelectorAll("main *, nav *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("script, style, .sr, [hidden]") || !element.getClientRects().length || element.disabled) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(element.closest("svg") ? style.fill : style.color)), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${element.tagName}.${element.className} ${element.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_aa(browser: Any, file: Path, scheme: Any) -> None:
    visited = _open(browser, file, color_scheme=scheme)
    visited.page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    assert visited.page.evaluate(_CONTRAST) == []
    visited.page.context.close()


def _pixels(page: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(float)


def test_light_dark_and_print_look_different_and_none_is_empty(browser: Any, file: Path) -> None:
    visited = _open(browser, file, color_scheme="light")
    page = visited.page
    light = _pixels(page)
    page.keyboard.press("t")
    dark = _pixels(page)
    page.emulate_media(media="print")
    printed = _pixels(page)  # dark was chosen by hand, and paper is light all the same
    for picture in (light, dark, printed):
        assert picture.std() > 8
        assert len(np.unique(picture.reshape(-1, 3)[::7], axis=0)) > 100
    assert light.mean() > 200
    assert dark.mean() < 70
    assert printed.mean() > 200
    assert not page.locator("nav.contents").is_visible()
    page.context.close()


def test_printing_opens_all_details_and_shows_no_controls(browser: Any, file: Path, record: AuditRecord) -> None:
    visited = _open(browser, file)
    page = visited.page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("#card-cards-1 .weights tbody tr").last.is_visible()
    for selector in ("button.gate", "input[type=range]", "select", "nav.contents", ".skip"):
        assert not page.locator(selector).first.is_visible(), selector
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.emulate_media(media="screen")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not page.locator("#card-cards-1 .weights").is_visible()
    page.context.close()


def test_the_data_in_the_page_is_the_record(visit: Visit, record: AuditRecord) -> None:
    held = json.loads(visit.page.locator("#record").text_content())
    assert held["pictures"] == json.loads(record_to_json(record))["pictures"]
