"""Pages and Markdown: everything that the record says is there, with unit, interval and n, and nothing that it names is markup."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fakes.audit_record import HOSTILE, bare, make_record
from PIL import Image, ImageFile

from dotcbm.report.record import AuditRecord, Figure, Finding, Interval, Reliability
from dotcbm.report.record_file import record_from_json, record_to_json
from dotcbm.report.render.charts import Series, domain_of, dot_range, line_chart, reliability_chart
from dotcbm.report.render.heat import heat_png, outline
from dotcbm.report.render.numbers import cases, interval_text, logit, number, signed, span, with_unit
from dotcbm.report.render.run import _probabilities, html, markdown, write_html, write_markdown, write_pdf
from dotcbm.report.render.views import SECTIONS, headline, key_figures, map_trust, sections

_VOID = {"meta", "link", "img", "input", "br"}


class _Page(HTMLParser):
    """Elements, texts, and whether all that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@cache
def record() -> AuditRecord:
    return make_record(num_pictures=24, num_cards=2, num_grid=8, size=64)


@cache
def hostile() -> AuditRecord:
    return make_record(num_pictures=24, num_cards=4, num_grid=24, size=64, hostile=True)


@cache
def page() -> _Page:
    return _Page(html(record()))


def test_numbers() -> None:
    assert [number(v) for v in (0.0, 3.0, 1234567, 0.00123456, -0.5, 12.345, 123.4)] == [
        "0", "3", "1\u202f234\u202f567", "0.00123", "−0.5", "12.3", "123",
    ]  # fmt: skip
    assert number(-0.0001, "points") == "0.0"
    assert number(0.9999, "percent") == "100.0"
    assert (signed(0.02, "points"), signed(-0.02, "points"), signed(None)) == ("+2.0", "−2.0", "—")
    assert (logit(-1.234), logit(0.0)) == ("−1.23", "0.00")
    assert with_unit(2.5849, "bits") == "2.58 bits"
    assert span(Interval(0.1, -0.02, 0.2), "points") == "−2.0 to 20.0"
    assert span(Interval(0.1, None, 0.2), "points") == ""
    assert cases(Interval(0.1, n=1234, over="boxes")) == "n = 1\u202f234 boxes"
    assert interval_text(None, "percent") == "not measured"


def test_ids_are_unique_and_every_reference_leads_somewhere() -> None:
    ids = [attributes["id"] for _, attributes in page().elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page().elements:
        for name in ("aria-labelledby", "for"):
            assert attributes.get(name) in {None, *ids}
        link = attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in ids


def test_everything_is_closed_and_sections_are_in_order() -> None:
    assert page().open == []
    assert [a["id"] for tag, a in page().elements if tag == "section"] == [key for key in SECTIONS if key != "experts"]
    headings = [int(tag[1]) for tag, _ in page().elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(headings))


def test_the_page_asks_for_nothing_outside() -> None:
    for tag, attributes in page().elements:
        for name in ("src", "href"):
            assert re.match(r"#|data:", attributes.get(name) or "#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in html(record()).split("<body>")[0]
    policy = next(a["content"] for _, a in page().elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_findings_stand_in_their_order_with_figure_interval_n_control_threshold_rule_and_verdict() -> None:
    text = page().text
    places = [text.index(finding.title) for finding in record().findings]
    assert places == sorted(places)
    assert "34.0 points 95 % interval 27.0 to 41.0 n = 40 pictures" in text
    assert "2.0 points 95 % interval −1.0 to 5.0 n = 40 pictures swap within the class" in text
    assert "5.0 points rule: lower end of the interval above 5 points" in text
    for words in ("confirmed by its control", "refuted by its control", "open: its control does not decide"):
        assert words in text
    assert ("a", {"href": "#suspects"}) in page().elements


def test_what_is_absent_is_said_in_its_section() -> None:
    text = _Page(html(bare(record()))).text
    assert (text.count("Not measured:"), text.count("Not shown:")) == (4, 3)
    at = text.index("Not measured: the section suspects, because the data has neither parts nor masks.")
    assert text.index("6 Spurious-correlation suspects", text.index("1 Verdict") + 200) < at


def test_every_figure_stands_in_one_section() -> None:
    held = [figure.key for section in sections(record()) for figure in section.figures]
    assert sorted(held) == sorted(figure.key for figure in record().figures)
    strange = replace(record().figures[0], key="nobody/knows")
    last = sections(replace(record(), figures=(strange,)))[-1]
    assert (last.key, last.figures) == ("card", (strange,))
    assert [figure.key.split("/")[0] for figure in key_figures(record())] == ["classes", "concepts", "parts", "interventions"]


def test_the_head_shows_the_figure_that_is_asked_for_of_each_section() -> None:
    fine = replace(record().figures[0], key="parts/pointing_0.01_plan")
    asked = [replace(fine, key=f"parts/pointing_{name}") for name in ("0.1_plan", "mask_plan")]
    assert [figure.key for figure in key_figures(replace(record(), figures=(fine, *asked)))] == ["parts/pointing_mask_plan"]
    assert [figure.key for figure in key_figures(replace(record(), figures=(fine,)))] == ["parts/pointing_0.01_plan"]


def test_long_lists_of_figures_are_folded_and_complete() -> None:
    many = tuple(replace(record().figures[0], key=f"parts/f{i}", label=f"figure number {i}", note="The same.") for i in range(14))
    text = _Page(html(replace(record(), figures=many))).text
    assert "6 more figures of this section" in text
    assert all(f"figure number {i} " in text for i in range(14))
    assert text.count("As above.") == 12


def _finding(severity: str, verdict: str) -> Finding:
    return replace(record().findings[0], severity=severity, verdict=verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "level", "text"),
    [
        ([], "note", "No finding was recorded. That is no proof of absence"),
        ([("critical", "confirmed")], "critical", "1 critical finding stands, confirmed by its control."),
        ([("critical", "open")], "critical", "1 critical finding stands, not yet confirmed by a control."),
        ([("critical", "confirmed"), ("critical", "open"), ("critical", "refuted")], "critical", "2 critical findings stand, 1 of them"),
        ([("critical", "refuted"), ("warning", "open")], "warning", "No critical finding stands. 1 warning does."),
        ([("critical", "refuted"), ("good", "confirmed")], "good", "No critical finding and no warning stands."),
        ([("note", "confirmed")], "note", "No warning stands, and no check was passed"),
        ([("note", "confirmed"), ("good", "refuted")], "note", "No warning stands, and no check was passed"),
    ],
)
def test_the_headline_counts_what_no_control_refutes(rows: list[tuple[str, str]], level: str, text: str) -> None:
    said = headline(replace(record(), findings=tuple(_finding(*row) for row in rows)))
    assert said.level == level
    assert said.text.startswith(text)


def test_all_concepts_are_in_the_table() -> None:
    table = html(record()).split('id="concept-table"')[1].split("</table>")[0]
    for concept in record().concepts:
        assert f'<th scope="row">{concept.name}</th>' in table


def test_maps_stand_beside_what_they_are_worth() -> None:
    assert map_trust(record()) is None  # it has no pointing
    figure = Figure("parts/pointing_0.1_plan", "Pointing", Interval(0.585), control=Interval(0.542), control_label="the prior")
    assert figure.control is not None
    measured = replace(record(), figures=(*record().figures, figure))
    text = _Page(html(measured)).text
    assert map_trust(measured) == figure
    assert text.count("How far to believe the maps: Pointing, 58.5 %; the prior reaches 54.2 %.") == 2
    assert map_trust(bare(record())) is None
    assert "How far to believe" not in _Page(html(bare(record()))).text


def test_a_finding_without_a_control_does_not_claim_one() -> None:
    lone = replace(record(), findings=(replace(_finding("note", "confirmed"), control=None),))
    text = _Page(html(lone)).text
    assert "no control: the figure itself decides" in text
    assert "confirmed by its control Evidence" not in text
    assert "no control: the figure itself decides" in markdown(lone)


def test_the_page_holds_the_record_and_each_picture_once() -> None:
    text = html(record())
    held = re.search(r'<script type="application/json" id="record">(.*?)</script>', text, re.DOTALL)
    assert held is not None
    images = {a["id"]: (a["src"] or "").split(",")[1] for tag, a in page().elements if tag == "img" and "id" in a}
    whole = re.sub(r'"image":"@((?:errors|cards|grid)-\d+)"', lambda found: f'"image":"{images[found[1]]}"', held[1])
    assert whole == record_to_json(record())
    assert record_from_json(whole).cards[0].image == record().cards[0].image
    shown = [card.image for card in (*record().errors, *record().cards)] + [thumbnail.image for thumbnail in record().grid]
    for image in set(shown):
        assert text.count(image) == shown.count(image)


def test_hostile_names_are_text() -> None:
    text = html(hostile())
    read = _Page(text)
    assert read.open == []
    assert [tag for tag, _ in read.elements].count("script") == 2
    assert "window.pwned=1</script>" not in text
    for name in HOSTILE:
        assert " ".join(name.split()) in read.text
    for tag, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on") or "<" in name or '"' in name], (tag, attributes)


def test_hostile_names_are_text_in_markdown() -> None:
    text = markdown(hostile())
    assert "<script" not in text
    assert "<img" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for head, rule in pairwise(rows):
        if rule.startswith("| ---"):
            assert len(re.split(r"(?<!\\)\|", head)) == len(rule.split("|"))


def test_markdown_has_the_sections_and_no_pictures() -> None:
    text = markdown(record())
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# Audit of DOT-CBM on drawn creatures"]
    for title in ("1. Verdict", "3. Classes and confusion", "4. Concepts", "5. Part detection", "7. Interventions", "12. Model card"):
        assert f"## {title}" in text
    assert "base64" not in text
    assert "34.0 points (95 % interval 27.0 to 41.0; n = 40 pictures)" in text
    assert "Not measured: worst-group accuracy under re-weighting" in text


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_html(record(), tmp_path / "a.html").read_bytes()
    assert write_html(record_from_json(record_to_json(record())), tmp_path / "b.html").read_bytes() == first
    assert write_markdown(record(), tmp_path / "a.md").read_text(encoding="utf-8") == markdown(record())


def test_a_map_survives_its_png() -> None:
    cells = [0, 17, 34, 255, 128, 9, 200, 60, 100, 250, 3, 77]
    picture = Image.open(io.BytesIO(base64.b64decode(heat_png(cells, width=3)))).convert("RGBA")
    assert picture.size == (3, 4)
    opacity = np.asarray(picture)[..., 3].ravel() / (255 * 0.86)
    assert np.allclose(opacity, np.array(cells) / 255, atol=1 / 30 + 0.01)
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(heat_png(cells, width=3, opaque=True)))).convert("RGBA"))[..., 3].min() == 255


@pytest.mark.parametrize("seed", range(5))
def test_the_outline_encloses_the_cells_above_the_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = 5, 7
    cells = rng.integers(0, 256, (height, width))
    hot = np.pad(cells >= 0.6 * cells.max(), 1)
    num_edges = int((hot[1:] != hot[:-1]).sum() + (hot[:, 1:] != hot[:, :-1]).sum())
    path = outline(cells.ravel().tolist(), width=width, share=0.6)
    assert sum(int(num) for num in re.findall(r"[hv](\d+)", path)) == num_edges
    for x, y, way, num in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path):
        for k in range(int(num)):
            cx, cy = int(x) + (k if way == "h" else 0), int(y) + (k if way == "v" else 0)
            assert hot[cy + 1, cx + 1] != (hot[cy, cx + 1] if way == "h" else hot[cy + 1, cx])


def test_a_map_of_zeros_has_no_outline() -> None:
    assert outline([0, 0, 0, 0], width=2, share=0.6) == ""


def test_probabilities_are_those_of_all_classes() -> None:
    for card in record().cards:
        every = [*card.class_logits, *([] if card.rest is None else [card.rest])]
        wanted = np.exp(card.class_logits) / np.exp(every).sum()
        assert np.allclose(_probabilities(card), wanted)
        assert math.isclose(max(wanted), record().pictures.confidence[card.row], rel_tol=1e-6)


def test_a_dot_stands_where_its_value_is() -> None:
    drawn = dot_range(Interval(0.25, 0.2, 0.3), "percent", control=Interval(0.75), threshold=0.5)
    dot = float(re.findall(r'circle class="measured" cx="([\d.]+)"', drawn)[0])
    diamond = float(re.findall(r'class="control" d="M([\d.]+)', drawn)[0])
    line = float(re.findall(r'class="threshold" d="M([\d.]+)', drawn)[0])
    assert math.isclose(line - dot, diamond - line)
    assert 'aria-label="measured 25.0 % (95 % interval 20.0 to 30.0); control 75.0 %; threshold 50.0 %"' in drawn
    assert dot_range(Interval(None)) == ""
    small = dot_range(Interval(0.002), "percent", control=Interval(0.008), tall=True)  # apart, and the axis says its scale
    dot, diamond = (float(re.findall(pattern, small)[0]) for pattern in (r'measured" cx="([\d.]+)"', r'control" d="M([\d.]+)'))
    assert diamond - dot > 100
    assert ">0.8</text>" in small


@pytest.mark.parametrize("values", [(0.34, 0.41, -0.02), (1e-5, 3e-5, 0.0), (-7.0, -3.0, -1.0), (123.0, 456.0, 1.0), (0.0, 0.0, 0.0)])
def test_domains_hold_their_intervals_and_zero(values: tuple[float, float, float]) -> None:
    low, high = domain_of([Interval(value) for value in values])
    assert low <= min(*values, 0.0) <= max(*values, 0.0) <= high
    assert low < high


def test_a_chart_leaves_gaps_where_nothing_is_known_and_escapes_names() -> None:
    drawn = line_chart([Series('<b>"x"', (0.1, None, 0.3))], x_values=(1, 2, 3), x_label="<i>", y_label="&", label='"><script>', mark_x=2)
    assert drawn.count("<circle") == 2
    assert "<b>" not in drawn
    assert "<i>" not in drawn
    assert "<script>" not in drawn


def test_extreme_records_can_be_drawn() -> None:
    one = replace(
        record(),
        sweeps=(replace(record().sweeps[0], thresholds=(0.6,), mean_average_precision=(None,), share_correct=(None,)),),
        interventions=(replace(record().interventions[0], accuracy=(0.5,), spread=(0.0,)),),
        reliability=Reliability((0, 3), (None, 0.7), (None, 1.0)),
    )
    assert _Page(html(one)).open == []
    assert "3 pictures" in reliability_chart(one.reliability)
    assert line_chart([Series("none", (None,))], x_values=(0,), x_label="x", y_label="y", label="l").startswith("<svg")


def test_many_classes_give_a_picture_of_the_matrix_and_a_table_of_confusions() -> None:
    k = 40
    counts = tuple(tuple(5 if i == j else (2 if j == (i + 1) % k else 0) for j in range(k)) for i in range(k))
    many = replace(
        record(),
        class_names=tuple(f"class {i}" for i in range(k)),
        confusion=replace(record().confusion, count_KK=counts),
    )
    read = _Page(html(many))
    assert any(attributes.get("class") == "matrix" for _, attributes in read.elements)
    assert "Most frequent confusions" in read.text


@pytest.mark.parametrize("head_on", ["other", "none"])
def test_no_slider_where_none_can_be_right(head_on: str) -> None:
    text = html(replace(record(), card=replace(record().card, head_on=head_on)))  # type: ignore[arg-type]
    assert '<input type="range"' not in text
    assert "No sliders:" in text


def test_a_large_audit_stays_under_15_megabytes() -> None:
    size = 224
    small = make_record(num_pictures=100, num_cards=6, num_grid=60, num_concepts=112, size=size)
    cards = tuple(replace(card, concepts=tuple(card.concepts[i % len(card.concepts)] for i in range(32))) for card in small.cards)
    columns = small.pictures
    times = 2000 / len(columns.name)

    def long(values: tuple) -> tuple:  # type: ignore[type-arg]
        return (values * math.ceil(times))[:2000]

    pictures = replace(columns, **{name: long(getattr(columns, name)) for name in vars(columns)})
    large = replace(small, pictures=pictures, cards=(cards * 10)[:60], grid=(small.grid * 10)[:600])
    assert len(json.dumps(html(large), ensure_ascii=False).encode()) < 15e6


def test_a_pdf_is_printed_and_torn_pictures_are_still_refused(tmp_path: Path) -> None:
    few = replace(bare(record()), findings=record().findings[:1], cards=record().cards[:1], grid=record().grid[:2], sweeps=record().sweeps)
    try:
        content = write_pdf(few, tmp_path / "a.pdf").read_bytes()
    except (ModuleNotFoundError, OSError) as error:
        if os.environ.get("DOTCBM_REQUIRE_BROWSER"):
            raise
        pytest.skip(f"no PDF here: {error}")
    assert content.startswith(b"%PDF-")
    assert content.count(b"/Subtype /Image") >= 3
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
