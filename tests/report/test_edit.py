"""Edits: what is removed is gone, the fit is an optimum, weights make independent, the log comes back, and nothing is half written."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from fakes.source import TinySource
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import ConceptDataset
from dotcbm.data.synthetic import SCENES, Synthetic
from dotcbm.data.waterbirds import GROUP_NAMES, Waterbirds
from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import from_pretrained, save_pretrained
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.report.compare.statistics import draw_counts
from dotcbm.report.edit.figures import Scored, change_rows
from dotcbm.report.edit.head import concept_inputs, refit_head
from dotcbm.report.edit.names import concept_named, known_group_names
from dotcbm.report.edit.render import html, write_edited
from dotcbm.report.edit.run import BEFORE, CONTROL, REFIT, REWEIGHTED, ZEROED, HeadSettings, edit_model
from dotcbm.report.edit.weights import reweight
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem
from dotcbm.training.head_fit import fit_head

WHO = {"by": "An Auditor", "reason": "left and right are no property of a square"}
FIXED = HeadSettings(l2=1e-2)


@dataclass(frozen=True)
class GroupedSource(TinySource):
    """With a sub-population for each picture."""

    def load(self, split: str) -> ConceptDataset:
        dataset = super().load(split)
        return replace(dataset, group_N=(torch.arange(len(dataset)) // 4) % 2)


@dataclass(frozen=True)
class PlacedSource(TinySource):
    """Printed with the folder that it lies in."""

    root: str = "/home/somebody/birds"


class Embedded(Bottleneck):
    """A head that reads two numbers of each concept, as concept embeddings do."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, settings={})
        m = problem.concepts.num_concepts
        self.concept = nn.Linear(problem.patch_width, m)
        self.state = nn.Linear(problem.patch_width, 4 * m)
        self.head = nn.Linear(2 * m, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        pooled = features.patch_BND.float().mean(1)
        logit_BM, state_BX = self.concept(pooled), self.state(pooled)
        return ConceptOutput(logit_BM, self.classify(logit_BM, state_BX), features.grid, context_BX=state_BX)

    def head_input(self, concept_logit_BM, context_BX=None):
        state = context_BX.unflatten(1, (concept_logit_BM.shape[1], 2, 2))
        p = concept_logit_BM.sigmoid()[..., None]
        return (p * state[:, :, 0] + (1 - p) * state[:, :, 1]).flatten(1)


class Tangled(CBM):
    """A head whose inputs belong to several concepts."""

    def head_input(self, concept_logit_BM, context_BX=None):
        return concept_logit_BM.sigmoid() + concept_logit_BM.sigmoid().mean(1, keepdim=True)


class Shifted(CBM):
    """Something is added to what the head says."""

    def classify(self, concept_logit_BM, context_BX=None):
        return super().classify(concept_logit_BM, context_BX) + concept_logit_BM[:, :1]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageEncoder("timm/test_resnet", pretrained=False, image_size=64, layer=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ConceptDataModule:
    source = GroupedSource(counts=(("train", 80), ("test", 48)))
    return ConceptDataModule(source, batch_size=32, val_fraction=0.2, cache_dir=str(tmp_path_factory.mktemp("cache")))


def make_model(encoder: ImageEncoder, kind: type[Bottleneck] = CBM, **settings) -> ConceptModel:
    source = GroupedSource()
    problem = Problem(encoder.width, encoder.global_width, encoder.grid, source.concepts)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ConceptModel(encoder, kind(problem, **settings)).eval()


@pytest.fixture
def model(encoder, data) -> ConceptModel:
    """A CBM that read its concepts from the training features, with its head at the optimum."""
    made = make_model(encoder)
    data.use_encoder(encoder)
    pooled, truth, label = [], [], []
    with torch.no_grad():
        for part in data.plain_loader("train"):
            pooled.append(part.features.patch_BND.float().mean(1))
            truth.append(part.concepts_BM.nan_to_num(0.5))
            label.append(part.label_B)
        x, y = torch.cat(pooled), torch.cat(truth)
        made.bottleneck.norm.running_mean.copy_(x.mean(0))
        made.bottleneck.norm.running_var.copy_(x.var(0))
        z = (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()
        target = 6 * (y - 0.5)
        weight = torch.linalg.solve(z.T @ z + 5 * torch.eye(z.shape[1]), z.T @ target)
        made.bottleneck.concept.weight.copy_(weight.T)
        made.bottleneck.concept.bias.copy_(target.mean(0))
        probability = (z @ weight + target.mean(0)).sigmoid()
        fit = fit_head(probability, torch.cat(label), num_classes=4, l2=1e-2)
        made.bottleneck.head.weight.copy_(fit.weight_KF)
        made.bottleneck.head.bias.copy_(fit.bias_K)
    return made


def outputs(model: ConceptModel, data: ConceptDataModule) -> ConceptOutput:
    with torch.no_grad():
        return model.forward_batch(next(iter(data.plain_loader("test"))))


def test_classes_are_blind_to_a_removed_concept_that_is_still_predicted(model, data):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edited = edit_model(model, data, remove=["Left"], head=FIXED, **WHO)
    found, was = outputs(edited.model, data), outputs(model, data)
    assert torch.equal(found.concept_logit_BM, was.concept_logit_BM)
    assert not torch.equal(found.class_logit_BK, was.class_logit_BK)
    assert edited.model.removed_concepts == ("left",)
    for value in (-50.0, 0.0, 50.0):
        changed = found.concept_logit_BM.clone()
        changed[:, 2] = value
        assert torch.equal(edited.model.bottleneck.classify(changed), edited.model.bottleneck.classify(found.concept_logit_BM))
    assert edited.model.bottleneck.contributions(found.concept_logit_BM)[:, :, 2].count_nonzero() == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.edits == ()
    assert [v.name for v in edited.versions] == [BEFORE, CONTROL, ZEROED, REFIT]


def test_the_refit_is_the_optimum_without_the_concept(model, data):
    edited = edit_model(model, data, remove=["left"], head=FIXED, **WHO)
    with torch.no_grad():
        parts = [(model.forward_batch(batch).concept_BM, batch.label_B) for batch in data.plain_loader("train")]
    inputs, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    kept = [0, 1, 3, 4]
    fit = fit_head(inputs[:, kept], labels, num_classes=4, l2=1e-2)
    assert torch.allclose(
        edited.model.bottleneck.head.weight[:, kept].double(), fit.weight_KF, atol=0.02, rtol=0.01
    )  # two searches, each ends within its gap
    assert edited.model.bottleneck.head.weight[:, 2].count_nonzero() == 0
    # The model's own head was at the optimum, so fitting it anew without an edit changes nothing.
    assert torch.allclose(edited.versions[1].weight_KF, edited.versions[0].weight_KF, atol=1e-3)
    assert not any("Fitted anew" in note for note in edited.notes)


def test_a_head_that_was_trained_otherwise_is_said_to_differ_already(model, data):
    with torch.no_grad():
        model.bottleneck.head.weight.mul_(3.0)
    edited = edit_model(model, data, remove=["left"], head=FIXED, **WHO)
    assert any("the model's was trained otherwise" in note for note in edited.notes)


def test_scaled_weights_are_held_and_the_rest_is_fitted_around_them(model, data):
    edited = edit_model(model, data, scale={"red": 0.25}, head=FIXED, **WHO)
    head, former = edited.model.bottleneck.head.weight, model.bottleneck.head.weight
    assert torch.allclose(head[:, 0], 0.25 * former[:, 0])
    assert not torch.allclose(head[:, 1], former[:, 1], atol=1e-3)
    again = edit_model(edited.model, data, remove=["left"], head=FIXED, **WHO)
    assert torch.allclose(again.model.bottleneck.head.weight[:, 0], 0.25 * former[:, 0])
    assert edited.edit.scaled == (("red", 0.25),)


def test_fitting_beats_silent_zeroing_where_another_concept_can_stand_in():
    """Both concepts say the same; the head reads the first alone. Zeroed it is blind; fitted anew it reads the other."""
    torch.manual_seed(0)
    label = torch.arange(400) % 2
    x = torch.stack([label.float(), label.float()], 1) + 0.1 * torch.randn(400, 2)
    weight, bias = torch.tensor([[-8.0, 0.0], [8.0, 0.0]]), torch.tensor([4.0, -4.0])
    fit = refit_head(x, label, weight_KF=weight, bias_K=bias, removed=[0], l2=1e-3)
    zeroed = (x @ torch.tensor([[0.0, 0.0], [0.0, 0.0]]).T + bias).argmax(1)
    fitted = (x.double() @ fit.weight_KF.T + fit.bias_K).argmax(1)
    assert float((zeroed == label).double().mean()) == 0.5
    assert float((fitted == label).double().mean()) > 0.99
    assert fit.weight_KF[:, 0].count_nonzero() == 0


def test_weighted_refit_is_scikit_learns():
    torch.manual_seed(0)
    x, label = torch.randn(120, 3), torch.randint(3, (120,))
    weight = torch.rand(120).double() + 0.1
    z = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    found = refit_head(x, label, weight_KF=torch.zeros(3, 3) + 1e-9, bias_K=torch.zeros(3), l2=0.02, weight_n=weight)
    expected = LogisticRegression(C=1 / (0.02 * 120), tol=1e-10, max_iter=5000).fit(
        z, label, sample_weight=(weight / weight.mean()).numpy()
    )
    assert torch.allclose(found.weight_KF * x.double().std(0, unbiased=False), torch.tensor(expected.coef_), atol=2e-3)


def test_a_sparse_head_stays_within_its_pattern():
    torch.manual_seed(0)
    x, label = torch.randn(90, 6), torch.randint(3, (90,))
    weight = torch.zeros(3, 6)
    weight[0, 0] = weight[1, 1] = weight[2, 2] = weight[0, 3] = 1.0
    found = refit_head(x, label, weight_KF=weight, bias_K=torch.zeros(3), removed=[3], l2=0.01).weight_KF
    assert set(map(tuple, found.nonzero().tolist())) == {(0, 0), (1, 1), (2, 2)}


def test_embeddings_go_as_whole_blocks(encoder, data):
    made = make_model(encoder, Embedded)
    found = concept_inputs(made.bottleneck, outputs_of(made, data))
    assert [block.tolist() for block in found] == [[2 * j, 2 * j + 1] for j in range(5)]
    edited = edit_model(made, data, remove=["green"], head=FIXED, **WHO)
    assert edited.edit.removed_inputs == (2, 3)
    assert edited.model.bottleneck.head.weight[:, 2:4].count_nonzero() == 0
    assert edited.model.bottleneck.head.weight[:, 4:].count_nonzero() > 0


def outputs_of(model: ConceptModel, data: ConceptDataModule) -> ConceptOutput:
    data.use_encoder(model.encoder)
    return outputs(model, data)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (LinearProbe, "classes of LinearProbe are not read from concepts"),
        (Tangled, "changes with 'red' and with 'green'|changes with 'green' and with 'red'"),
        (Shifted, "no plain linear layer"),
    ],
)
def test_heads_that_cannot_be_edited(encoder, data, kind, match):
    with pytest.raises(ValueError, match=match):
        edit_model(make_model(encoder, kind), data, remove=["red"], head=FIXED, **WHO)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"remove": ["lefft"]}, "no concept 'lefft'; did you mean 'left'"),
        ({"remove": ["zebra"]}, "no concept 'zebra'; it has 5, 'red' for one"),
        ({}, "nothing to edit"),
        ({"remove": ["red"], "by": " "}, "who made it and why"),
        ({"remove": ["red"], "reason": ""}, "who made it and why"),
        ({"remove": ["red", "RED"]}, "'red' is named twice"),
        ({"remove": ["red"], "scale": {"red": 2.0}}, "'red' is named twice"),
        ({"scale": {"red": 0.0}}, "scaled by 0.0; a factor is positive"),
        ({"scale": {"red": float("nan")}}, "a factor is positive"),
        ({"scale": {"red": 0.5}, "reweight": True}, "none is removed"),
        ({"remove": ["red", "green", "left", "right", "unknown"]}, "leave one concept at least"),
    ],
)
def test_bad_requests(model, data, asked, match):
    with pytest.raises(ValueError, match=match):
        edit_model(model, data, head=FIXED, **{**WHO, **asked})


def test_l2_is_chosen_on_the_validation_split_or_must_be_given(model, data, tmp_path):
    edited = edit_model(model, data, remove=["left"], head=HeadSettings(), **WHO)
    assert dict(edited.edit.method)["l2"] != ""
    without = ConceptDataModule(data.source, val_fraction=0.0, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="there is none; give l2 a number"):
        edit_model(model, without, remove=["left"], head=HeadSettings(), **WHO)


def test_near_names():
    known = ["red wing", "long tail", "short tail"]
    assert concept_named(" Long Tail", known) == "long tail"
    with pytest.raises(ValueError, match="did you mean 'long tail', 'short tail'"):
        concept_named("tail", known)


def test_the_weights_are_the_formula():
    label = torch.tensor([0] * 6 + [1] * 4)
    seen = torch.tensor([1, 1, 1, 1, 0, 0, 1, 0, 0, 0])[:, None].bool()
    found = reweight(label, seen)
    n = 10
    expected = []
    for y, v in zip(label.tolist(), seen[:, 0].tolist(), strict=True):
        p_y = sum(label.tolist().count(k) for k in [y]) / n
        p_v = seen[:, 0].tolist().count(v) / n
        p_yv = sum(a == y and b == v for a, b in zip(label.tolist(), seen[:, 0].tolist(), strict=True)) / n
        expected.append(p_y * p_v / p_yv)
    assert found.weight_n.tolist() == pytest.approx(expected)
    assert found.before > 0.05
    assert found.left == pytest.approx(0, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_class_and_patterns_are_independent_with_the_weights_if_no_cell_is_empty(rows):
    full = [(k, a, b) for k in range(3) for a in (False, True) for b in (False, True)]
    label = torch.tensor([row[0] for row in rows + full])
    seen = torch.tensor([row[1:] for row in rows + full])
    found = reweight(label, seen, limit=1e6)
    assert found.left == pytest.approx(0, abs=1e-9)
    assert found.empty == 0
    assert float(found.weight_n.mean()) == pytest.approx(1)
    # Shares of classes are kept.
    shares = torch.bincount(label, weights=found.weight_n) / found.weight_n.sum()
    assert torch.allclose(shares, torch.bincount(label).double() / len(label), atol=1e-9)
    assert found.effective <= len(label) + 1e-6


def test_weights_that_cannot_do_it_say_so():
    label = torch.tensor([0, 0, 1, 1])
    tied = reweight(label, (label == 1)[:, None])
    assert (tied.empty, tied.before, tied.left) == (2, pytest.approx(1.0), pytest.approx(1.0))
    rare = reweight(torch.tensor([0] * 99 + [1] * 99 + [0, 1]), torch.tensor([1] * 99 + [0] * 99 + [0, 1])[:, None].bool(), limit=5)
    assert rare.limited == 2
    assert 0 < rare.left < rare.before
    with pytest.raises(ValueError, match=r"limit is 0\.5"):
        reweight(label, (label == 1)[:, None], limit=0.5)
    with pytest.raises(ValueError, match=r"labels have shape \(4,\)"):
        reweight(label, torch.zeros(3, 1).bool())


def test_reweighting_gives_a_fifth_version_and_says_what_it_reached(model, data):
    edited = edit_model(model, data, remove=["unknown"], reweight=True, head=FIXED, **WHO)
    assert edited.versions[-1].name == REWEIGHTED
    assert torch.allclose(edited.model.bottleneck.head.weight.double(), edited.versions[-1].weight_KF, atol=1e-6)
    assert edited.reweighting is not None
    assert edited.edit.reweighted
    assert any("bits in the training pictures" in note for note in edited.notes)


def test_rows_are_accuracies_with_paired_intervals():
    torch.manual_seed(0)
    label, group = torch.randint(3, (50,)), torch.arange(50) % 2
    first, second = torch.where(torch.rand(50) < 0.5, label, 0), torch.where(torch.rand(50) < 0.8, label, 1)
    scored = Scored("test", label, group, {"before": first, "after": second})
    rows = change_rows(scored, class_names=("a", "b", "c", "never"), group_names=("even", "odd"), num_draws=100, seed=2)
    assert [row.kind for row in rows] == ["all", "balanced", "worst group", "group", "group", *["class"] * 4]
    whole = rows[0]
    assert whole.values[1].value == pytest.approx(float((second == label).double().mean()))
    count = draw_counts(50, num_draws=100, seed=2).double()
    drawn = ((second == label).double() - (first == label).double()) @ count / 50
    assert whole.differences[1].low == pytest.approx(float(torch.quantile(drawn, 0.025)))
    assert whole.differences[0] is None
    odd = next(row for row in rows if row.name == "odd")
    assert odd.values[0].value == pytest.approx(float((first == label)[1::2].double().mean()))
    worst = next(row for row in rows if row.kind == "worst group")
    assert worst.values[1].value == pytest.approx(min(row.values[1].value for row in rows if row.kind == "group"))
    assert rows[-1].values[0].value is None
    assert rows[-1].p == (None, None)


def test_the_log_says_which_data_but_not_where_it_lay(model, tmp_path):
    placed = ConceptDataModule(PlacedSource(), batch_size=8, cache_dir=str(tmp_path / "cache"))
    edited = edit_model(model, placed, remove=["left"], head=FIXED, num_draws=10, **WHO)
    assert "PlacedSource(" in edited.edit.data
    assert "root='birds'" in edited.edit.data
    assert "somebody" not in html(edited)


def test_groups_have_the_names_that_their_source_gives():
    drawn = Synthetic(num_train=8, num_val=1, num_test=8)
    names = known_group_names(drawn)
    dataset = drawn.load("test")
    assert dataset.group_N is not None
    for label, group in zip(dataset.label_N.tolist(), dataset.group_N.tolist()):
        assert names[group] == f"{drawn.concepts.class_names[label]} on {SCENES[group % len(SCENES)]}"
    assert known_group_names(Waterbirds("somewhere", cub_root="elsewhere")) == GROUP_NAMES
    assert known_group_names(GroupedSource()) == ()


def test_the_log_goes_through_the_hub_and_grows(model, data, tmp_path):
    when = datetime(2026, 11, 24, 8, 30, tzinfo=UTC)
    first = edit_model(model, data, remove=["left"], head=FIXED, when=when, **WHO)
    back = from_pretrained(save_pretrained(first.model, tmp_path / "one"))
    assert back.edits == first.model.edits == (first.edit,)
    assert back.edits[0].when == "2026-11-24T08:30:00Z"
    assert "left and right are no property" in (tmp_path / "one" / "README.md").read_text()
    second = edit_model(back, data, remove=["right"], scale={"red": 2.0}, head=FIXED, by="Another", reason="tied to left")
    again = from_pretrained(save_pretrained(second.model, tmp_path / "two"))
    assert [edit.by for edit in again.edits] == ["An Auditor", "Another"]
    assert again.removed_concepts == ("left", "right")
    assert again.bottleneck.head.weight[:, [2, 3]].count_nonzero() == 0
    assert again.edits[1].removed_inputs == (3,)
    with pytest.raises(ValueError, match=r"'left' was removed before \(2026-11-24T08:30:00Z, An Auditor\)"):
        edit_model(again, data, scale={"left": 1.0}, head=FIXED, **WHO)
    figures = dict(first.edit.figures)
    assert figures["test/accuracy, before"] == pytest.approx(
        float((outputs(model, data).class_logit_BK.argmax(1) == next(iter(data.plain_loader("test"))).label_B).double().mean()), abs=0.2
    )


def test_models_without_edits_have_no_log_and_a_log_that_lies_is_refused(model, data, tmp_path):
    folder = save_pretrained(model, tmp_path / "plain")
    assert not (folder / "edits.json").exists()
    assert from_pretrained(folder).edits == ()
    edited = edit_model(model, data, remove=["left"], head=FIXED, **WHO).model
    saved = save_pretrained(edited, tmp_path / "edited")
    (folder / "edits.json").write_text((saved / "edits.json").read_text())
    with pytest.raises(ValueError, match=r"were removed from the class head .* but the head reads them"):
        from_pretrained(folder)
    with torch.no_grad():
        edited.bottleneck.head.weight[0, 2] = 1.0
    with pytest.raises(ValueError, match="its weights were changed afterwards"):
        save_pretrained(edited, tmp_path / "broken")
    values = json.loads((saved / "edits.json").read_text())
    for change, match in (
        ({"format": 9}, "has format 9; this dotcbm reads formats up to 1"),
        ({"format": None}, "no format number"),
        ({"edits": [{"by": "x"}]}, "edit 1 cannot be read"),
    ):
        (saved / "edits.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=match):
            from_pretrained(saved)
    (saved / "edits.json").write_text("{")
    with pytest.raises(ValueError, match=r"edits.json: is no JSON"):
        from_pretrained(saved)


def test_a_folder_of_an_edit_is_whole(model, data, tmp_path):
    edited = edit_model(model, data, remove=["left"], head=FIXED, by="<script>x</script>", reason="a | b")
    folder = write_edited(edited, tmp_path / "out", config="data: {}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "edit.html", "edit.json", "edit.md", "model"]
    stored = json.loads((folder / "edit.json").read_text())
    assert stored["versions"] == [BEFORE, CONTROL, ZEROED, REFIT]
    assert {row["kind"] for row in stored["rows"]} == {"all", "balanced", "worst group", "group", "class"}
    assert from_pretrained(folder / "model").removed_concepts == ("left",)
    page, text = (folder / "edit.html").read_text(), (folder / "edit.md").read_text()
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "<script" not in page
    assert r"a \| b" in text
    with pytest.raises(ValueError, match="never replaces anything"):
        write_edited(edited, folder)
    assert html(edited) == page


def test_nothing_is_left_after_a_full_disk(model, data, tmp_path, monkeypatch):
    edited = edit_model(model, data, remove=["left"], head=FIXED, **WHO)

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_edited(edited, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
