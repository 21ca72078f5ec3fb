"""An explanation adds up, survives questions, and says what it cannot answer."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dotcbm.explain
from dotcbm.explain.explanation import Explanation, explain
from dotcbm.explain.heatmaps import heatmaps
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM

Build = Callable[..., ConceptModel]


@pytest.fixture(params=[CBM, PublishedDotCBM])
def model(request: pytest.FixtureRequest, build: Build) -> ConceptModel:
    return build(request.param)


def test_contributions_and_bias_add_up_to_every_class_logit(model: ConceptModel, picture: Tensor) -> None:
    output = model.predict(picture)
    explanation = explain(model, picture)
    torch.testing.assert_close(explanation.class_logit_K, output.class_logit_BK[0])
    for k in range(4):
        asked = explanation.for_class(k)
        total = asked.contribution_M.sum() + asked.bias_K[k]
        torch.testing.assert_close(total, output.class_logit_BK[0, k], atol=1e-5, rtol=1e-5)


def test_it_explains_the_predicted_class_unless_asked(model: ConceptModel, picture: Tensor) -> None:
    explanation = explain(model, picture)
    assert explanation.target == explanation.predicted == int(model.predict(picture).class_logit_BK.argmax())
    asked = explain(model, picture, target_class="Cobbert")
    assert (asked.target_class, asked.predicted_class) == ("Cobbert", explanation.predicted_class)
    assert explain(model, picture, target_class=2).target_class == "Cobbert"
    torch.testing.assert_close(asked.contribution_M, model.bottleneck.head.weight[2].detach() * explanation.concept_M)


def test_maps_are_those_of_the_output_in_the_view_asked_for(build: Build, picture: Tensor) -> None:
    model = build(PublishedDotCBM)
    output = model.predict(picture)
    for view in ("concept", "patch", "evidence"):
        explanation = explain(model, picture, view=view)
        assert explanation.view == view
        torch.testing.assert_close(explanation.heatmaps_MHW, heatmaps(output, view=view)[0])
    assert explain(model, picture).view == "concept"
    assert explain(build(CBM), picture).view == "evidence"


def test_top_concepts_and_counter_evidence_are_sorted_and_signed(model: ConceptModel, picture: Tensor) -> None:
    explanation = explain(model, picture)
    top, against = explanation.top_concepts(6), explanation.against(6)
    assert len(top) + len(against) == 6
    assert [e.contribution for e in top] == sorted((v for v in explanation.contribution_M.tolist() if v > 0), reverse=True)
    assert [e.contribution for e in against] == sorted(v for v in explanation.contribution_M.tolist() if v < 0)
    by_probability = explanation.top_concepts(3, by="probability")
    assert [e.probability for e in by_probability] == explanation.concept_M.sort(descending=True).values[:3].tolist()
    for evidence in (*top, *against):
        assert evidence.contribution == pytest.approx(evidence.weight * evidence.probability)
        torch.testing.assert_close(evidence.heatmap_HW, explanation.heatmaps_MHW[evidence.index] * evidence.probability)
    assert len(explanation.top_concepts(1)) == 1


def test_intervening_recomputes_the_classes_through_the_head_and_remembers(model: ConceptModel, picture: Tensor) -> None:
    explanation = explain(model, picture)
    changed = explanation.intervene({"red wing": 0.0, "crest": 1.0})
    expected = explanation.concept_M.clone()
    expected[0], expected[5] = 0, 1
    with torch.no_grad():
        torch.testing.assert_close(changed.class_logit_K, model.bottleneck.head(expected))
    torch.testing.assert_close(changed.concept_M, expected)
    assert changed.before is explanation
    assert explanation.concept_M[0] > 0  # the old one is as it was
    assert changed.concept("red wing").heatmap_HW.abs().max() == 0  # gated
    torch.testing.assert_close(explanation.intervene({}).class_logit_K, explanation.class_logit_K)
    # A strong enough intervention turns the decision: set every concept to what another class wants.
    other = (explanation.predicted + 1) % 4
    difference = explanation.weight_KM[other] - explanation.weight_KM[explanation.predicted]
    turned = explanation.intervene({name: float(d > 0) for name, d in zip(explanation.concept_names, difference.tolist())})
    margin = turned.class_logit_K[other] - turned.class_logit_K[explanation.predicted]
    assert margin > explanation.class_logit_K[other] - explanation.class_logit_K[explanation.predicted]
    asked = turned.for_class("Dapple")
    assert asked.before is not None
    assert asked.before.target_class == "Dapple"


def test_the_dictionary_is_json_and_complete(model: ConceptModel, picture: Tensor) -> None:
    explanation = explain(model, picture)
    record = json.loads(json.dumps(explanation.to_dict()))
    assert record["picture_size"] == [48, 64]
    assert sum(record["class_probabilities"].values()) == pytest.approx(1)
    assert sum(c["contribution"] for c in record["concepts"]) + record["target_bias"] == pytest.approx(record["target_logit"], abs=1e-4)
    assert [c["name"] for c in record["concepts"]] == list(explanation.concept_names)
    assert len(record["concepts"][0]["heatmap"]) == 4


def test_the_text_lists_what_adds_up(model: ConceptModel, picture: Tensor) -> None:
    explanation = explain(model, picture)
    text = str(explanation)
    assert text.startswith(explanation.predicted_class)
    rows = {line.rsplit(maxsplit=1)[0].split("  ")[0].strip(): float(line.rsplit(maxsplit=1)[1]) for line in text.splitlines()[2:]}
    logit = rows.pop("logit")
    assert sum(rows.values()) == pytest.approx(logit, abs=0.01)
    assert "(predicted: " in str(explanation.for_class((explanation.predicted + 1) % 4))
    assert "before the intervention" in str(explanation.intervene({"crest": 0.5}))
    assert "tensor" not in repr(explanation)


def test_the_models_mode_is_restored_and_the_package_can_be_called(model: ConceptModel, picture: Tensor) -> None:
    model.train()
    first = explain(model, picture)
    assert model.training
    model.eval()
    second = dotcbm.explain(model, picture)
    assert isinstance(second, Explanation)
    torch.testing.assert_close(first.concept_M, second.concept_M)  # no dropout in an explanation


def test_a_cropping_encoder_explains_the_crop(build: Build, picture: Tensor) -> None:
    explanation = explain(build(CBM, resize="crop"), picture)
    assert explanation.region == pytest.approx((0.125, 0, 0.875, 1))


def test_bad_questions_are_answered_with_what_there_is(build: Build, picture: Tensor) -> None:
    model = build(CBM)
    explanation = explain(model, picture)
    with pytest.raises(ValueError, match="red wing"):
        explanation.intervene({"red wings": 0.0})
    with pytest.raises(ValueError, match="must lie in"):
        explanation.intervene({"red wing": 1.5})
    with pytest.raises(ValueError, match="must lie in"):
        explanation.intervene({"red wing": float("nan")})
    with pytest.raises(ValueError, match=r"did you mean one of.*Bramble"):
        explain(model, picture, target_class="Brambel")
    with pytest.raises(ValueError, match="numbered from 0"):
        explain(model, picture, target_class=4)
    with pytest.raises(ValueError, match="no order"):
        explanation.top_concepts(by="name")  # pyright: ignore
    with pytest.raises(ValueError, match="view='evidence'"):
        explain(model, picture, view="concept")
    with pytest.raises(ValueError, match=r"LinearProbe are not read from concepts.*attribute\(model"):
        explain(build(LinearProbe), picture)


def test_a_head_that_does_not_read_the_concepts_is_refused(build: Build, picture: Tensor) -> None:
    """As wide as the concepts are many, with maps, and yet its classes come from elsewhere."""

    class Leaky(CBM):
        def forward(self, features):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            return replace(super().forward(features), class_logit_BK=self.head(features.global_BD))

    with pytest.raises(ValueError, match="classes of Leaky are not read from its concepts"):
        explain(build(Leaky), picture)
