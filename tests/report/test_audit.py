"""Audits of small models, and the road of a user to one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.cem import CEM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.report.audit import AuditSettings, audit
from dotcbm.report.audit.concepts import auroc_draws
from dotcbm.report.audit.groups import dealt_gap
from dotcbm.report.audit.model import without_paths
from dotcbm.report.audit.tools import KNOW_NOTHING, Gathered
from dotcbm.report.collect import run as collecting
from dotcbm.report.collect.store import Store, digest
from dotcbm.report.record import AuditRecord
from dotcbm.report.record_file import read_record, write_record
from dotcbm.report.render import html, markdown
from dotcbm.structures import ConceptSet, Problem
from dotcbm.training.head_fit import fit_head

# Few of everything: what is tested here is what the parts do together.
QUICK = AuditSettings(
    num_draws=30, num_strengths=5, num_occluded=4, num_swapped=32, num_errors=3, num_unsure=2, num_drawn=2, num_thumbnails=6, chunk=16
)
DRAWN = Synthetic(size=64, num_train=64, num_val=4, num_test=48, num_classes=4, variation=0.2)


@dataclass(frozen=True)
class Changed(ConceptSource):
    """Another source whose splits are changed on the way out."""

    inner: ConceptSource
    keep: tuple[int, ...] | None = None
    bare: bool = False
    never: int | None = None
    label: int | None = None
    names: tuple[str, ...] | None = None

    @property
    def concepts(self) -> ConceptSet:
        found = self.inner.concepts
        if self.bare:
            found = replace(found, parts=None, part_names=())
        return found if self.names is None else replace(found, names=(*self.names, *found.names[len(self.names) :]))

    @property
    def splits(self) -> tuple[str, ...]:
        return self.inner.splits

    def load(self, split: str) -> ConceptDataset:
        found = replace(self.inner.load(split), concepts=self.concepts)
        if self.bare:
            found = replace(found, points_NP3=None, box_N4=None, read_foreground=None, read_part_masks=None, group_N=None)
        if split == "train":
            return found
        if self.label is not None:
            found = found.subset((found.label_N == self.label).nonzero()[:, 0].tolist())
        if self.keep is not None:
            found = found.subset(self.keep)
        if self.never is not None:
            concept_NM = found.concept_NM.clone()
            concept_NM[:, self.never] = 0
            found = replace(found, concept_NM=concept_NM)
        return found


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def data_of(source: ConceptSource, cache: Path | None, **settings: Any) -> ConceptDataModule:
    directory = None if cache is None else str(cache)
    return ConceptDataModule(source, batch_size=32, cache_dir=directory, **{"evaluate_splits": ["test"], **settings})


def model_of(encoder: ImageEncoder, source: ConceptSource, kind: type[Bottleneck], **settings: Any) -> ConceptModel:
    problem = Problem(encoder.width, encoder.global_width, encoder.grid, source.concepts)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        bottleneck = kind(problem, **settings)
        with torch.no_grad():
            bottleneck.head.weight.normal_()
    return ConceptModel(encoder, bottleneck)


@pytest.fixture(scope="module")
def dot(encoder: ImageEncoder) -> ConceptModel:
    return model_of(encoder, DRAWN, PublishedDotCBM, dim=16, iterations=5)


@pytest.fixture(scope="module")
def record(dot: ConceptModel, cache: Path) -> AuditRecord:
    return audit(dot, data_of(DRAWN, cache, evaluate_splits=["test", "test_ood"]), settings=QUICK)


def keys(record: AuditRecord) -> set[str]:
    return {figure.key for figure in record.figures}


def absent(record: AuditRecord) -> dict[str, str]:
    return {row.what: row.reason for row in record.absent}


def test_every_section_is_filled(record):
    assert {
        "classes/accuracy", "concepts/auroc", "concepts/leakage_ctl", "concepts/occlusion_drop", "parts/pointing_mask_plan",
        "parts/part_mass_plan", "parts/part_rank_evidence", "parts/detection_map_plan", "parts/transport_residual",
        "suspects/swap_fall", "suspects/background_colours", "suspects/background_share", "interventions/area_random",
        "groups/worst_group_accuracy", "groups/gap_test_ood", "controls/nec5", "controls/random_concepts_dense", "controls/shuffled_labels",
    } <= keys(record)  # fmt: skip
    assert len(record.classes) == 4
    assert len(record.concepts) == len(DRAWN.concepts.names)
    assert sum(map(sum, record.confusion.count_KK)) == 48
    assert {(curve.policy, curve.split) for curve in record.interventions} == {
        (policy, split) for policy in ("random", "uncertainty", "coop", "greedy") for split in ("test", "test_ood")
    }
    assert {sweep.map for sweep in record.sweeps} == {"plan", "lift", "evidence", "prior", "saliency", "centre", "random"}
    assert record.suspects
    assert record.cards
    assert record.errors
    assert len(record.grid) == 6


def test_localisation_figures_stand_beside_their_control(record):
    placed = [f for f in record.figures if f.key.startswith(("parts/pointing_0", "parts/pointing_mask", "parts/part_", "parts/detection_"))]
    assert placed
    assert all(figure.control is not None and figure.control.value is not None for figure in placed)
    assert {figure.control_label for figure in placed} <= set(KNOW_NOTHING.values())


def test_no_map_without_concepts_beats_the_control_of_detection(record):
    blind = {sweep.map: sweep for sweep in record.sweeps if sweep.map in KNOW_NOTHING}
    assert len(blind) == len(KNOW_NOTHING)
    at = record.sweeps[0].thresholds.index(0.6)
    best = record.figure("parts/detection_map_plan").control.value
    assert best == pytest.approx(max(sweep.mean_average_precision[at] for sweep in blind.values()), abs=1e-6)
    most = record.figure("parts/detection_correct_plan").control.value
    assert most == pytest.approx(max(sweep.share_correct[at] for sweep in blind.values()), abs=1e-6)


def test_the_control_is_the_best_blind_map_and_never_one_without_figures():
    gathered = object.__new__(Gathered)
    assert gathered.control_of(lambda name: {"prior": math.nan, "saliency": 0.1}.get(name, 0.2)) == ("centre", KNOW_NOTHING["centre"])
    assert gathered.control_of(lambda name: math.nan)[0] in KNOW_NOTHING


def test_concept_rows_count_what_they_were_measured_on(record):
    covered = [row for row in record.concepts if row.num_covered]
    assert sum(row.num_covered for row in covered) == record.figure("concepts/occlusion_drop").value.n
    assert all((row.occlusion_drop is None) == (row.num_covered == 0) for row in record.concepts)
    assert all((row.background_share is None) == (row.num_mapped == 0) for row in record.concepts)
    assert any(row.num_mapped for row in record.concepts)


def test_plain_percentiles_stand_beside_bounds_that_know_the_truth(record):
    plain, ours = record.figure("interventions/area_percentiles"), record.figure("interventions/area_random")
    assert plain.value.n == ours.value.n
    assert plain.control == ours.control


def test_figures_can_be_computed_again_from_the_columns(record):
    pictures = record.pictures
    right = [a == b for a, b in zip(pictures.label, pictures.predicted)]
    assert record.figure("classes/accuracy").value.value == pytest.approx(sum(right) / len(right), abs=1e-6)
    pointed = sum(pictures.pointing_hits) / sum(pictures.pointing_pairs)
    assert record.figure("parts/pointing_mask_plan").value.value == pytest.approx(pointed, abs=1e-6)
    control = record.figure("parts/pointing_mask_plan").control
    assert control is not None
    assert control.value == pytest.approx(sum(pictures.prior_hits) / sum(pictures.pointing_pairs), abs=1e-6)
    gain = record.figure("parts/pointing_gain").value.value
    assert gain == pytest.approx((record.figure("parts/pointing_mask_plan").value.value or 0) - (control.value or 0), abs=2e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_the_gap_of_chance_has_the_spread_of_fair_coins(record, shared):
    """36 of 400 answers turn wrong: dealt pairs spread like 36 coins, dealt single answers like two draws from the pool."""
    right_N, num = torch.ones(400, dtype=torch.float64), 400
    fewer_N = right_N.clone()
    fewer_N[:36] = 0
    ours = SimpleNamespace(correct_N=right_N, pair_name=lambda n: f"{n}")
    theirs = SimpleNamespace(correct_N=fewer_N, pair_name=lambda n: f"{n}" if shared else f"other {n}")
    sized = [type("Sized", (SimpleNamespace,), {"__len__": lambda self: num})(**vars(one)) for one in (ours, theirs)]
    gathered: Any = SimpleNamespace(columns=sized[0], settings=replace(QUICK, num_draws=4000))
    found = dealt_gap(gathered, sized[1])  # pyright: ignore
    pool = 36 / 800 * (1 - 36 / 800)
    deviation = 36**0.5 / num if shared else (pool * 2 / num) ** 0.5
    assert found.n == num
    assert found.value == pytest.approx(0, abs=deviation / 10)
    assert (found.low, found.high) == pytest.approx((-1.96 * deviation, 1.96 * deviation), rel=0.12)
    assert record.figure("groups/gap_test_ood").control is not None


def test_cards_follow_the_sliders(record, dot):
    assert record.card.head_on == "probability"
    card = record.errors[0]
    assert card.why.startswith("wrong")
    weight_KM = dot.bottleneck.head.weight
    for shown in card.concepts:
        assert shown.slope_K == pytest.approx([weight_KM[k, shown.concept].item() for k in card.classes], abs=1e-4)
        assert len(shown.heat) == card.grid[0] * card.grid[1]
    assert card.rest is None  # four classes, all shown


def test_the_same_seed_gives_the_same_bytes(record, dot, cache, tmp_path):
    again = audit(dot, data_of(DRAWN, cache, evaluate_splits=["test", "test_ood"]), settings=QUICK)
    assert write_record(again, tmp_path / "b.json").read_bytes() == write_record(record, tmp_path / "a.json").read_bytes()
    assert html(again) == html(record)
    assert str(cache) not in (tmp_path / "a.json").read_text()


def test_a_record_survives_the_disk(record, tmp_path):
    assert read_record(write_record(record, tmp_path / "audit.json")) == record


def test_an_interrupted_audit_resumes(record, dot, cache, tmp_path, monkeypatch):
    data = data_of(DRAWN, cache, evaluate_splits=["test", "test_ood"])
    done: list[int] = []
    real = collecting._piece

    def stops(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(collecting, "_piece", stops)
    with pytest.raises(KeyboardInterrupt):
        audit(dot, data, settings=QUICK, resume_dir=tmp_path / "parts")
    kept = sorted(path.name for path in (tmp_path / "parts").rglob("*.pt"))
    assert kept == ["test-places-000000.pt", "test-places-000016.pt"]

    def counts(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        done.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(collecting, "_piece", counts)
    resumed = audit(dot, data, settings=QUICK, resume_dir=tmp_path / "parts")
    assert resumed == record
    assert len(done) == 48 // 16 + 64 // 16 + 48 // 16  # each piece once
    assert not (tmp_path / "parts").exists()


def test_pieces_are_whole_or_not_there(tmp_path):
    store = Store(tmp_path, key=digest(["one"]))
    assert store.folder is not None

    def fails() -> dict[str, Tensor]:
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        store.keep("a", fails)
    assert list(store.folder.iterdir()) == []
    store.keep("a", lambda: {"x": torch.ones(2)})
    assert store.keep("a", fails)["x"].tolist() == [1, 1]
    (store.folder / "a.pt").write_bytes(b"damaged")
    assert store.keep("a", lambda: {"x": torch.zeros(1)})["x"].tolist() == [0]
    assert Store(tmp_path, key=digest(["two"])).keep("a", lambda: {"x": torch.full((1,), 3.0)})["x"].tolist() == [3]


def test_without_parts_and_masks(encoder, cache):
    source = Changed(DRAWN, bare=True)
    found = audit(model_of(encoder, source, PublishedDotCBM, dim=16, iterations=5), data_of(source, cache), settings=QUICK)
    told = absent(found)
    assert "neither key points nor part masks" in told["pointing and part detection"]
    assert "no masks of the object" in told["the background swap"]
    assert "names none" in told["sub-populations"]
    assert not found.parts
    assert not found.sweeps
    assert {"classes/accuracy", "concepts/auroc", "interventions/area_random", "controls/nec5", "concepts/occlusion_drop"} <= keys(found)
    assert not any(finding.key.startswith("shortcut") for finding in found.findings)
    assert markdown(found)


def test_a_concept_that_is_never_present(encoder, cache):
    source = Changed(DRAWN, never=2)
    found = audit(model_of(encoder, source, PublishedDotCBM, dim=16, iterations=5), data_of(source, cache), settings=QUICK)
    row = found.concepts[2]
    assert row.num_positive == 0
    assert row.auroc.value is None
    assert row.average_precision is None
    named = next(finding for finding in found.findings if finding.key == "concepts/never_present")
    assert row.name in named.concepts
    assert html(found)


def test_a_single_class(encoder, cache):
    source = Changed(DRAWN, label=1)
    found = audit(model_of(encoder, source, CBM), data_of(source, cache), settings=QUICK)
    assert "single class" in absent(found)["the background swap"]
    assert "single class" in absent(found)["leakage"]
    assert found.classes[0].recall.value is None
    assert found.classes[1].recall.n == 12
    assert html(found)


def test_three_pictures(encoder, cache):
    source = Changed(DRAWN, keep=(0, 1, 2))
    found = audit(model_of(encoder, source, PublishedDotCBM, dim=16, iterations=5), data_of(source, cache), settings=QUICK)
    assert found.figure("classes/accuracy").value.n == 3
    assert "3 pictures" in absent(found)["leakage"]
    assert not any(finding.severity in ("critical", "good") for finding in found.findings)  # nothing can be proven
    assert html(found)


def test_swapped_pictures_are_encoded_once_for_all_models(encoder, dot, tmp_path):
    seen: list[int] = []
    settings = replace(QUICK, depth="figures", num_occluded=0)
    data = data_of(DRAWN, tmp_path)
    first = audit(dot, data, settings=settings)
    hook = encoder.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    try:
        audit(model_of(encoder, DRAWN, CBM), data, settings=settings)
        assert seen == []
        direct = audit(dot, data_of(DRAWN, None), settings=settings)
    finally:
        hook.remove()
    assert sum(seen) > 2 * settings.num_swapped
    for name in ("suspects/swap_fall", "suspects/swap_log_odds"):
        assert first.figure(name).value.value == pytest.approx(direct.figure(name).value.value, abs=0.04)  # cached in half precision


@pytest.mark.parametrize("cached", [True, False])
def test_swapped_pictures_keep_the_mask_that_a_prior_is_made_of(encoder, cache, cached):
    model = model_of(encoder, DRAWN, PublishedDotCBM, dim=16, iterations=5, patch_prior="external")
    data = data_of(DRAWN, cache if cached else None, foreground_in_training=True)
    found = audit(model, data, settings=replace(QUICK, depth="figures"))
    assert {"suspects/swap_fall", "concepts/occlusion_excess"} <= keys(found)


def test_names_that_html_would_obey(encoder, cache):
    source = Changed(DRAWN, names=("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a & b | c"))
    found = audit(model_of(encoder, source, CBM), data_of(source, cache), settings=QUICK)
    assert found.concepts[0].name == "<script>alert(1)</script>"
    assert "<script>alert(1)" not in html(found)
    assert "<img src=x" not in html(found)


@pytest.mark.parametrize(
    ("kind", "settings", "read_on"), [(LinearProbe, {}, "none"), (CEM, {}, "probability"), (CBM, {"head_on": "logit"}, "logit")]
)
def test_other_bottlenecks(encoder, cache, kind, settings, read_on):
    found = audit(model_of(encoder, DRAWN, kind, **settings), data_of(DRAWN, cache), settings=QUICK)
    assert found.card.head_on == read_on
    assert bool(found.interventions) == (read_on != "none")
    assert "suspects/swap_fall" in keys(found)
    if kind is LinearProbe:
        assert "nothing to correct" in absent(found)["all of it"]
        assert "interventions/black_box" in {finding.key for finding in found.findings}
        assert "no concepts" in absent(found)["where the maps point"]
    else:
        offered = "gradcam" if kind is CEM else "evidence"
        assert found.figure(f"parts/pointing_mask_{offered}").control is not None
        assert {sweep.map for sweep in found.sweeps} > {offered, "random"}
        assert any(any(concept.heat) for card in (*found.errors, *found.cards) for concept in card.concepts)
    assert html(found)


def test_without_photos_all_else_stays(record, dot, cache, tmp_path):
    settings = replace(QUICK, pictures=False)
    found = audit(dot, data_of(DRAWN, cache, evaluate_splits=["test", "test_ood"]), settings=settings)
    assert {card.image for card in (*found.errors, *found.cards)} == {""}
    assert found.grid == ()
    assert all(card.image for card in (*record.errors, *record.cards))
    for with_photo, without in zip((*record.errors, *record.cards), (*found.errors, *found.cards), strict=True):
        assert without == replace(with_photo, image="")
    assert (found.figures, found.findings, found.pictures) == (record.figures, record.findings, record.pictures)
    assert dict(found.card.audit)["pictures"] == "False"
    assert found.summary == record.summary
    said = {row.section: row.reason for row in found.absent if row not in record.absent}
    assert set(said) == {"errors", "pictures", "grid"}
    assert all(reason.startswith("photos are left out: ") for reason in said.values())
    page = html(read_record(write_record(found, tmp_path / "audit.json")))
    assert "data:image/jpeg" not in page
    assert page.count('class="heat"') == len(found.errors) + len(found.cards)
    assert page.count("The photo is left out.") == len(found.errors) + len(found.cards)
    assert "<b>Not shown:</b> the grid, because photos are left out" in page
    assert "- Not shown: the photos, because photos are left out" in markdown(found)
    none = audit(dot, data_of(DRAWN, cache), settings=replace(settings, depth="figures"))
    assert not any("photos" in row.reason for row in none.absent)


def test_figures_alone(encoder, cache):
    found = audit(model_of(encoder, DRAWN, CBM), data_of(DRAWN, cache), settings=replace(QUICK, depth="figures", limit=20))
    assert found.figure("classes/accuracy").value.n == 20
    assert not found.cards
    assert not found.grid
    assert len(found.pictures.name) == 20


def test_refusals(dot, encoder, cache):
    with pytest.raises(ValueError, match="has no split 'tset'; it has"):
        audit(dot, data_of(DRAWN, cache), split="tset")
    other = Synthetic(size=64, num_train=40, num_val=8, num_test=8, num_classes=3, variation=0.2)
    with pytest.raises(ValueError, match="model and data have other"):
        audit(dot, data_of(other, cache))
    with pytest.raises(ValueError, match="depth is 'deep'; choose"):
        AuditSettings(depth="deep")  # pyright: ignore
    with pytest.raises(ValueError, match="limit is 0"):
        AuditSettings(limit=0)
    with pytest.raises(ValueError, match="num_swapped is -1"):
        AuditSettings(num_swapped=-1)


def test_paths_are_cut():
    assert without_paths("CUB('../shared/data/CUB', twins='/a/b/twins', x='plain')") == "CUB('CUB', twins='twins', x='plain')"


def test_auroc_of_draws_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    drawn = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (40, 2), generator=drawn).double()  # many ties
    truth = torch.randint(0, 2, (40, 2), generator=drawn).double()
    truth[:7, 1] = torch.nan
    found = auroc_draws(score, truth, num_draws=5, seed=3)
    again = torch.Generator().manual_seed(3)
    for d in range(5):
        rows = torch.randint(40, (40,), generator=again)
        for j in range(2):
            known = rows[~truth[rows, j].isnan()]
            assert float(found[d, j]) == pytest.approx(metrics.roc_auc_score(truth[known, j], score[known, j]), abs=1e-12)


def colour_model(encoder: ImageEncoder, data: ConceptDataModule) -> ConceptModel:
    """A linear probe on pooled features, fitted to the training pictures."""
    data.use_encoder(encoder)
    cache = data.cache("train")
    assert cache is not None
    features = cache.read(range(len(cache)))
    model = model_of(encoder, data.source, LinearProbe)
    label_N = data.dataset("train").label_N
    fit = fit_head(features.global_BD.double(), label_N, num_classes=4, l2=0.01)
    with torch.no_grad():
        model.bottleneck.head.weight.copy_(fit.weight_KF)
        model.bottleneck.head.bias.copy_(fit.bias_K)
    return model


@pytest.mark.parametrize("shortcut", [0.95, 0.0])
def test_the_planted_shortcut_is_named_first_and_no_other(encoder, cache, shortcut):
    source = Synthetic(size=64, num_train=240, num_val=8, num_test=100, num_classes=4, variation=0.0, shortcut=shortcut, occlusion=0.0)
    data = data_of(source, cache)
    found = audit(colour_model(encoder, data), data, settings=replace(QUICK, num_draws=400, num_swapped=80, depth="figures"))
    first = found.findings[0]
    if shortcut:
        assert (first.key, first.severity, first.verdict) == ("shortcut/background", "critical", "confirmed")
        assert first.control is not None
        assert (first.measured.low or 0) > 0.02
        assert set(first.classes) <= set(source.concepts.class_names)
        assert "data/background" in {finding.key for finding in found.findings}
    else:
        assert not any(finding.key.startswith("shortcut") and finding.severity in ("critical", "warning") for finding in found.findings)


def test_the_command(tmp_path, monkeypatch, capsys):
    from dotcbm.cli import main

    monkeypatch.chdir(tmp_path)
    tiny = str(Path(__file__).parents[1] / "conf" / "tiny.yaml")
    assert main(["fit", "--config", tiny, "--trainer.max_epochs", "1"]) == 0
    command = ["audit", "--config", "runs/tiny/config.yaml", "--limit", "12"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "PublishedDotCBM classifies" in said
    out = tmp_path / "runs" / "tiny" / "audit"
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json", "audit.md"]
    stored = json.loads((out / "audit.json").read_text())
    assert stored["card"]["num_pictures"] == 12
    assert dict(map(tuple, stored["card"]["training"]))["lr"] == "0.003"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*command, "--ckpt_path", "runs/tiny/model", "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command, "--no-pictures", "--out", "bare"]) == 0
    capsys.readouterr()
    bare = json.loads(Path("bare/audit.json").read_text())
    assert bare["figures"] == stored["figures"]
    assert not any(card["image"] for card in (*bare["errors"], *bare["cards"], *bare["grid"]))
    assert any(card["image"] for card in (*stored["errors"], *stored["cards"]))
    assert main(["audit", "--config", "runs/tiny/config.yaml", "--split", "tset"]) == 1
    assert "no split 'tset'" in capsys.readouterr().err
    assert main(["audit", "--config", "nowhere.yaml"]) == 2
    assert main(["audit", "--config", "runs/tiny/config.yaml", "--limit", "0"]) == 2
    for more, said in (
        (["--device", "nonsense"], "'nonsense' cannot be used here"),
        (["--config", "runs/tiny"], "is a folder; give runs/tiny/config.yaml"),
        (["--checkpoint", "runs/nowhere", "--out", "refused"], "no such folder or file"),
        (["--out", "runs/tiny/config.yaml"], "is a file; name a folder"),
    ):
        assert main(["audit", "--config", "runs/tiny/config.yaml", *more]) in (1, 2)
        assert said in capsys.readouterr().err
    assert not Path("refused").exists()
