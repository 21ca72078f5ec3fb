"""The section of experts: from a tiny ViT-MoE to record, page and findings; and planted experts that the audit must find."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from fakes.audit_record import HOSTILE, make_record
from torch import Tensor

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.metrics.localization import coverage
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.moe.layer import MoELayer, moe_layers
from dotcbm.report.audit import AuditSettings, audit
from dotcbm.report.collect import experts as collecting
from dotcbm.report.compare import compare
from dotcbm.report.findings import find_all
from dotcbm.report.record import AuditRecord
from dotcbm.report.record_experts import ExpertLayer, ExpertLink, ExpertMap, ExpertPicture, ExpertRow, ExpertTable
from dotcbm.report.record_file import read_record, record_from_dict, record_to_dict, record_to_json, schema, write_record
from dotcbm.report.record_interval import Interval
from dotcbm.report.render import html, markdown, write_html
from dotcbm.report.render.experts import expert_views, load_chart
from dotcbm.structures import ConceptBatch, Problem

QUICK = AuditSettings(
    num_draws=20,
    num_strengths=3,
    num_occluded=2,
    num_swapped=2,
    num_errors=1,
    num_unsure=1,
    num_drawn=1,
    num_thumbnails=2,
    num_permutations=99,
    chunk=16,
)
DRAWN = Synthetic(size=64, num_train=48, num_val=4, num_test=40, num_classes=4)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moe = {"num_experts": 4, "k": 1, "arguments": {"patch_size": 8, "depth": 2}, "blocks": "all"}
        return ImageEncoder("vit_moe/test", pretrained=False, moe=moe)


def model_of(encoder: ImageEncoder, kind: type[Bottleneck], **settings: Any) -> ConceptModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        bottleneck = kind(Problem(encoder.width, encoder.global_width, encoder.grid, DRAWN.concepts), **settings)
        with torch.no_grad():
            bottleneck.head.weight.normal_()
    return ConceptModel(encoder, bottleneck)


def audited(model: ConceptModel, directory: Path | None = None, **settings: Any) -> AuditRecord:
    data = ConceptDataModule(DRAWN, batch_size=16, cache_dir=None if directory is None else str(directory), evaluate_splits=["test"])
    return audit(model, data, settings=replace(QUICK, **settings))


@pytest.fixture(scope="module")
def dot(encoder: ImageEncoder) -> ConceptModel:
    return model_of(encoder, PublishedDotCBM, dim=8, iterations=3)


@pytest.fixture(scope="module")
def record(dot: ConceptModel, tmp_path_factory: pytest.TempPathFactory) -> AuditRecord:
    return audited(dot, tmp_path_factory.mktemp("cache"))


def test_each_layer_is_told_of(record, encoder):
    assert [layer.name for layer in record.experts] == ["block 0", "block 1"]
    for layer, held in zip(record.experts, moe_layers(encoder).values(), strict=True):
        assert (layer.active, layer.grid, len(layer.experts)) == (1, encoder.grid, held.num_experts)
        assert layer.num_patches == 40 * 64  # features are cached, and the class token does not count
        assert sum(row.load.value for row in layer.experts) == pytest.approx(1, abs=1e-5)
        assert layer.max_vio == pytest.approx(4 * max(row.load.value for row in layer.experts) - 1, abs=1e-4)
        assert layer.num_dead == sum(row.load.value == 0 for row in layer.experts)
        assert sum(row.probability for row in layer.experts) == pytest.approx(1, abs=1e-4)
        assert [(table.kind, table.source) for table in layer.tables] == [("part", "masks"), ("concept", "plan"), ("class", "labels")]
        assert layer.tables[0].names == (*DRAWN.concepts.part_names, "background")
        assert layer.tables[1].names == DRAWN.concepts.names
        assert [len(shown.expert_P) for shown in layer.maps] == [64, 64]
    keys = {figure.key for figure in record.figures if figure.key.startswith("experts/")}
    assert keys == {
        f"experts/{name}_{i}" for name in ("fullest", "max_vio", "min_vio", "dead", "entropy", "above_chance") for i in range(2)
    }


def test_examples_show_the_patches_that_the_layer_routes(record, dot, encoder):
    layer = next(layer for layer in record.experts if any(row.pictures for row in layer.experts))
    held = list(moe_layers(encoder).values())[record.experts.index(layer)]
    expert, shown = next((e, shown) for e, row in enumerate(layer.experts) for shown in row.pictures)
    data = ConceptDataModule(DRAWN, batch_size=1, cache_dir=None)
    data.use_encoder(encoder)
    image = next(b for i, b in enumerate(data.plain_loader("test")) if i == shown.row).image_B3HW
    with torch.no_grad():
        encoder(image)
    assert held.routing is not None
    mine_P = (held.routing.index_TK[held.count_prefix :] == expert).any(1)
    assert list(shown.cells) == mine_P.nonzero()[:, 0].tolist()
    assert shown.surest in shown.cells
    assert {shown.why for row in layer.experts for shown in row.pictures} <= {"surest", "drawn at random"}


def routed(encoder: ImageEncoder) -> torch.Tensor:
    """(40, P) the share of each patch that is outside; the encoder's layers then hold the routing of these pictures."""
    dataset = DRAWN.load("test")
    data = ConceptDataModule(DRAWN, batch_size=40, cache_dir=None)
    data.use_encoder(encoder)
    with torch.no_grad():
        encoder(next(iter(data.plain_loader("test"))).image_B3HW)
    return torch.cat([1 - coverage(dataset.read_foreground(n)[None], grid=(8, 8)) for n in range(40)])


def test_the_background_share_is_that_of_the_masks(record, encoder):
    """By hand: patches of an expert, weighted with the share of the patch that is outside."""
    outside_NP = routed(encoder)
    layer = list(moe_layers(encoder).values())[1]
    assert layer.routing is not None
    index_NP = layer.routing.index_TK.view(40, -1)[:, layer.count_prefix :]
    for e, row in enumerate(record.experts[1].experts):
        if row.background.value is not None:
            assert row.background.value == pytest.approx(float(outside_NP[index_NP == e].mean()), abs=1e-5)


def test_two_active_experts_share_each_patch():
    """Loads, balance, background and maps by hand: a patch counts for both of its experts, and a map shows the first."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        moe = {"num_experts": 4, "k": 2, "arguments": {"patch_size": 8, "depth": 2}, "blocks": "all"}
        encoder = ImageEncoder("vit_moe/test", pretrained=False, moe=moe)
    found = audited(model_of(encoder, PublishedDotCBM, dim=8, iterations=3)).experts
    outside_NP = routed(encoder)
    for layer, held in zip(found, moe_layers(encoder).values(), strict=True):
        assert held.routing is not None
        index_NPK = held.routing.index_TK.view(40, -1, 2)[:, held.count_prefix :]
        goes_NPE = torch.stack([(index_NPK == e).any(2) for e in range(4)], 2)
        load_E = goes_NPE.float().mean((0, 1))
        assert layer.active == 2
        assert [row.load.value for row in layer.experts] == pytest.approx(load_E.tolist(), abs=1e-4)
        assert sum(row.load.value for row in layer.experts) == pytest.approx(2, abs=1e-4)
        assert layer.max_vio == pytest.approx(float(4 * load_E.max() / 2 - 1), abs=1e-3)
        for e, row in enumerate(layer.experts):
            if row.background.value is not None:
                assert row.background.value == pytest.approx(float(outside_NP[goes_NPE[:, :, e]].mean()), abs=1e-3)
        score_NPE = held.routing.score_TE.view(40, -1, 4)[:, held.count_prefix :]
        for shown in layer.maps:
            assert list(shown.expert_P) == score_NPE[shown.row].argmax(1).tolist()


def test_key_points_are_in_the_patch_that_holds_them():
    """On edges and in the middle; hidden, unknown and outside points are in none."""
    x_y_visible = [[0, 0, 1], [0.999, 0, 1], [1, 1, 1], [0.5, 0.24, 1], [0.3, 0.3, 0], [math.nan, 0.2, 1], [1.2, 0.5, 1]]
    none = torch.zeros(1, dtype=torch.long)
    batch = ConceptBatch(torch.zeros(1, 1), none, none, ("a.png",), torch.full((1, 2), 64), points_BP3=torch.tensor([x_y_visible]))
    names = tuple("abcdefg")
    share_PR = collecting._parts(batch, names, grid=(4, 2), outside_BP=None, by_mask=False)[0]
    assert [share_PR[:, r].nonzero()[:, 0].tolist() for r in range(7)] == [[0], [1], [7], [1], [], [], []]
    outside_BP = torch.tensor([[1.0, 0.5, 0, 0, 1, 1, 1, 1]])
    with_background = collecting._parts(batch, (*names, collecting.BACKGROUND), grid=(4, 2), outside_BP=outside_BP, by_mask=False)
    assert torch.equal(with_background[0, :, :7], share_PR)
    assert torch.equal(with_background[:, :, 7], outside_BP)


def test_without_a_plan_concepts_are_those_of_the_picture(encoder):
    found = audited(model_of(encoder, CBM), depth="figures")
    assert [(table.kind, table.source) for table in found.experts[0].tables] == [
        ("part", "masks"), ("concept", "labels"), ("class", "labels"),
    ]  # fmt: skip
    assert not any(row.pictures for layer in found.experts for row in layer.experts)


def test_an_audit_without_photos_keeps_outlines_and_maps(dot):
    found = audited(dot, pictures=False)
    shown = [one for layer in found.experts for one in (*layer.maps, *(p for row in layer.experts for p in row.pictures))]
    assert shown
    assert {one.image for one in shown} == {""}
    assert "data:image/jpeg" not in html(found)


def test_an_encoder_without_experts_has_no_section():
    bare = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)
    assert not collecting.has_experts(model_of(bare, CBM))
    assert 'id="experts"' not in html(make_record(num_pictures=8, num_cards=1, num_grid=1, size=64))


class _Planted(MoELayer):
    """Routes by a table: (B, P) experts of the next pictures, patch by patch."""

    route: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        assert self.routing is not None
        index_BP = self.route(len(x))
        index_BN = torch.cat([torch.zeros(len(x), self.count_prefix, dtype=torch.long), index_BP], 1)
        score_TE = torch.nn.functional.one_hot(index_BN.flatten(), self.num_experts).float()
        self.routing = replace(self.routing, index_TK=index_BN.reshape(-1, 1), logit_TE=score_TE, score_TE=score_TE)
        return out


@pytest.mark.parametrize("looks", [True, False])
def test_planted_experts_of_parts_are_found_and_blind_ones_are_not(dot, looks, monkeypatch):
    """Block 1: expert 0 takes heads, 1 wings, 2 and 3 the rest by chance; or all take patches by chance."""
    dataset = DRAWN.load("test")
    names = DRAWN.concepts.part_names
    drawn = torch.Generator().manual_seed(0)
    queue: list[int] = []

    def route(num: int) -> Tensor:
        rows, queue[:] = queue[:num], queue[num:]
        index_BP = torch.randint(2 if looks else 0, 4, (num, 64), generator=drawn)
        for place, row in enumerate(rows if looks else []):
            masks = dataset.read_part_masks(row)
            for e, part in enumerate(("head", "wing")):
                covered_P = coverage(masks[names.index(part)][None], grid=(8, 8))[0] > 0.3
                index_BP[place, covered_P] = e
        return index_BP

    real = collecting.run

    def told(model: ConceptModel, batch: Any) -> Any:
        queue[:] = batch.index_B.tolist()
        return real(model, batch)

    monkeypatch.setattr(collecting, "run", told)
    layer = list(moe_layers(dot.encoder).values())[1]
    monkeypatch.setattr(layer, "__class__", _Planted)
    layer.route = route
    found = audited(dot, depth="figures").experts[1]
    parts = found.tables[0]
    marked = {(parts.names[link.row], link.expert) for link in parts.links}
    if not looks:
        assert not any(table.links for table in found.tables)
        return
    assert {("head", 0), ("wing", 1)} <= marked
    best = {link.expert: parts.names[link.row] for link in reversed(parts.links)}
    assert (best[0], best[1]) == ("head", "wing")
    assert ("background", 0) not in marked
    assert ("background", 1) not in marked


def _layer(loads: tuple[float, ...] = (0.6, 0.25, 0.15, 0.0), *, n: int = 100, outside: float = 0.9, links: bool = True) -> ExpertLayer:
    """A layer that nobody routed, with two experts that serve something and pictures of them."""
    picture = ExpertPicture(1, "surest", "", 64, 64, (0.0, 0.0, 1.0, 1.0), (0, 1, 5), 5)
    rows = tuple(
        ExpertRow(
            Interval(load, round(load - 0.02, 4) if load else 0.0, round(load + 0.02, 4) if load else 0.0, n),
            0.25,
            Interval(outside, round(outside - 0.05, 4), round(outside + 0.05, 4), n) if e == 1 else Interval(None),
            0.7 if e == 1 else None,
            (picture, replace(picture, why="drawn at random")) if e < 2 and links else (),
        )
        for e, load in enumerate(loads)
    )
    link = ExpertLink(0, 0, Interval(2.5, 2.0, 3.1), 0.4, 0.16, 0.002)
    num = len(loads)
    tables = (
        ExpertTable("part", "masks", ("head", "background"), ((2.5, *[0.5] * (num - 1)), (0.9, 1.3, *[None] * (num - 2))),
                    (link, replace(link, row=1, expert=1, lift=Interval(1.3, 1.2, 1.4))) if links else ()),
        ExpertTable("class", "labels", HOSTILE, tuple((1.0,) * num for _ in HOSTILE), ()),
    )  # fmt: skip
    expert_P = tuple(cell % num for cell in range(16))
    return ExpertLayer("block 1", 1, (4, 4), 16 * n, 1.4, -1.0, sum(not load for load in loads), 0.9, rows, tables,
                       (ExpertMap(0, "", 64, 64, (0.0, 0.0, 1.0, 1.0), expert_P),))  # fmt: skip


def with_layer(layer: ExpertLayer, **settings: Any) -> AuditRecord:
    return replace(make_record(num_pictures=40, num_cards=1, num_grid=1, size=64, **settings), experts=(layer,), figures=(), findings=())


def findings_of(layer: ExpertLayer) -> dict[str, Any]:
    return {finding.key: finding for finding in find_all(with_layer(layer)) if finding.key.startswith("experts/")}


def test_findings():
    found = findings_of(_layer())
    assert set(found) == {"experts/dead", "experts/one_for_most", "experts/background"}
    assert found["experts/dead"].title == "Experts are dead: 1 of 4 in block 1."
    assert (found["experts/one_for_most"].threshold, found["experts/one_for_most"].control.value) == (0.5, 0.25)
    assert found["experts/background"].verdict == "confirmed"
    assert findings_of(_layer(links=False))["experts/background"].verdict == "refuted"
    assert set(findings_of(_layer((0.3, 0.3, 0.2, 0.2), outside=0.8))) == {"experts/used"}
    assert "experts/one_for_most" not in findings_of(_layer((0.515, 0.2, 0.2, 0.085)))  # the interval reaches below a half
    assert "experts/one_for_most" not in findings_of(_layer((0.6, 0.4)))  # of two, half is the even share
    assert findings_of(_layer((0.3, 0.3, 0.2, 0.2), n=20, outside=0.99)) == {}


def test_records_go_to_disk_and_back(record, tmp_path):
    assert read_record(write_record(record, tmp_path / "audit.json")) == record
    jsonschema.validate(json.loads(record_to_json(record)), schema(), cls=jsonschema.Draft202012Validator)
    held = record_to_dict(with_layer(_layer()))
    assert record_from_dict(held).experts == (_layer(),)
    del held["experts"]
    assert record_from_dict(held | {"format": 4}).experts == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer["maps"][0].update(expert_P=[0]), r"maps\[0\]\.expert_P has 1 entries for 16 patches"),
        (lambda layer: layer["maps"][0]["expert_P"].__setitem__(0, 9), r"expert_P speaks of number 9, and there are 4 experts"),
        (lambda layer: layer["maps"][0].update(row=99), r"pictures speaks of number 99"),
        (lambda layer: layer["experts"][0]["pictures"][0].update(cells=[16]), r"cells speaks of number 16"),
        (lambda layer: layer["tables"][0]["lift_XE"].pop(), r"tables\[0\]\.lift_XE does not have 2 rows of 4 experts"),
        (lambda layer: layer["tables"][0]["links"][0].update(expert=4), r"links speaks of number 4"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    held = record_to_dict(with_layer(_layer()))
    change(held["experts"][0])
    with pytest.raises(ValueError, match=message):
        record_from_dict(held)


def test_the_page_holds_the_section_and_the_record(record):
    page = html(record)
    assert page.index('id="controls"') < page.index('<section id="experts"') < page.index('<section id="pictures"')
    for layer in record.experts:
        assert f"{layer.name.capitalize()}: 1 of 4 experts for each patch" in page
    held = re.search(r'<script type="application/json" id="record">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    images = dict(re.findall(r'<img class="photo" id="([\w-]+)" src="data:image/jpeg;base64,([^"]+)"', page))
    images |= dict(re.findall(r'<img id="(grid-\d+)" src="data:image/jpeg;base64,([^"]+)"', page))
    whole = re.sub(r'"image":"@((?:errors|cards|grid|experts)-\d+)"', lambda found: f'"image":"{images[found[1]]}"', held[1])
    assert whole == record_to_json(record)
    text = markdown(record)
    assert "## 10. Experts" in text
    assert "### Block 1: 1 of 4 experts for each patch" in text


def test_views_of_a_layer():
    view = expert_views(with_layer(_layer()))[0]
    assert [(served.kind, served.links[0][0]) for served in view.experts[1].served] == [("parts", "background")]
    assert view.experts[0].pictures[0].veil == "M2 0h2v1h-2zM0 1h1v1h-1zM2 1h2v1h-2zM0 2h4v1h-4zM0 3h4v1h-4z"
    assert [style for style, _ in view.maps[0].paths] == ["x0", "x1", "x2", "x3"]
    assert view.maps[0].legend[0] == ("x0", "expert 0: 25.0 %")
    assert view.tables[0].rows[0][1][0].link is not None
    many = _layer(tuple([0.1] * 10))
    assert expert_views(with_layer(many))[0].maps[0].legend[-1] == ("xr", "3 others: 18.8 %")
    assert load_chart(_layer()).count('class="load"') == 3
    assert load_chart(_layer()).count('class="dead"') == 1


def test_hostile_names_are_text():
    page = html(with_layer(_layer(), hostile=True))
    assert "<img src=x" not in page
    assert "<script>window" not in page
    assert "<svg onload" not in page


def test_audits_with_and_without_experts_are_compared(record):
    without = replace(record, experts=(), figures=tuple(f for f in record.figures if not f.key.startswith("experts/")))
    found = compare([record, without], ["moe", "dense"], num_draws=20)
    assert any(figure.key == "experts/max_vio_0" for figure in found.figures)


def test_the_same_seed_gives_the_same_experts(record, dot):
    assert audited(dot).experts == record.experts


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1400, "dark")])
def test_in_a_browser(width, scheme, tmp_path, record):
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    sync_api = pytest.importorskip("playwright.sync_api")
    if path is None:
        pytest.skip("no Chromium on the path")
    file = write_html(record, tmp_path / "audit.html")
    said: list[str] = []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('#experts details').forEach(details => { details.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("section").count() == 13
        assert page.locator("#experts .expert-map svg.over-photo").first.is_visible()
        broken = "[...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length"
        assert page.evaluate(broken) == 0
        heads = page.locator("#experts table.served").first.locator("thead button")
        heads.nth(2).press("Enter")
        loads = (
            page.locator("#experts table.served").first.locator("tbody tr").evaluate_all("rows => rows.map(row => +row.cells[2].dataset.v)")
        )
        assert loads == sorted(loads, reverse=True)
        with page.expect_download() as waiting:
            page.locator("#save").press("Enter")
        assert Path(waiting.value.path()).read_text(encoding="utf-8") == record_to_json(record)
        chromium.close()
    assert said == []
