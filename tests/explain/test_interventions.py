"""Contributions and interventions are exact for every kind of head, and say what they cannot do."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dotcbm.explain.explanation import Explanation, explain
from dotcbm.explain.interventions import read_head
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import Problem

Build = Callable[..., ConceptModel]


def on_logits(problem: Problem) -> CBM:
    return CBM(problem, head_on="logit")


@pytest.fixture(params=["probability", "logit", "doubled", "dot"])
def model(request: pytest.FixtureRequest, build: Build, doubled: type[Bottleneck]) -> ConceptModel:
    return build({"probability": CBM, "logit": on_logits, "doubled": doubled, "dot": PublishedDotCBM}[request.param])


@pytest.fixture
def explanation(model: ConceptModel, picture: Tensor) -> Explanation:
    return explain(model, picture)


def test_contributions_add_up_for_every_class_and_are_the_bottlenecks(
    model: ConceptModel, explanation: Explanation, picture: Tensor
) -> None:
    output = model.predict(picture)
    torch.testing.assert_close(explanation.contribution_KM.sum(1) + explanation.bias_K, output.class_logit_BK[0], atol=1e-5, rtol=1e-5)
    expected = model.bottleneck.contributions(output.concept_logit_BM, output.context_BX)[0].detach()
    torch.testing.assert_close(explanation.contribution_KM, expected)
    record = json.loads(json.dumps(explanation.to_dict()))
    assert sum(c["contribution"] for c in record["concepts"]) + record["target_bias"] == pytest.approx(record["target_logit"], abs=1e-4)
    assert "contribution" in str(explanation)


def test_a_head_on_logits_weighs_logits_and_one_on_two_numbers_has_no_weight(
    build: Build, doubled: type[Bottleneck], picture: Tensor
) -> None:
    read_logits = explain(build(on_logits), picture)
    evidence = read_logits.concept("crest")
    assert evidence.weight is not None
    assert evidence.contribution == pytest.approx(evidence.weight * float(read_logits.concept_logit_M[5]))
    two = explain(build(doubled), picture)
    assert two.weight_KM is None
    assert two.concept("crest").weight is None
    assert "weight" not in str(two)


def test_intervening_goes_through_the_bottleneck(model: ConceptModel, explanation: Explanation, picture: Tensor) -> None:
    changed = explanation.intervene({"crest": 0.3, "long tail": 0.9})
    output = model.predict(picture)
    logit_BM = output.concept_logit_BM.clone()
    logit_BM[0, 5], logit_BM[0, 3] = torch.logit(torch.tensor([0.3, 0.9]))
    expected = model.bottleneck.classify(logit_BM, output.context_BX)[0].detach()
    torch.testing.assert_close(changed.class_logit_K, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(changed.contribution_KM.sum(1) + changed.bias_K, expected, atol=1e-5, rtol=1e-5)
    assert float(changed.concept_M[5]) == pytest.approx(0.3)
    assert changed.before is explanation


def test_zero_and_one_are_taken_by_their_word_where_that_is_finite(model: ConceptModel, explanation: Explanation) -> None:
    changed = explanation.intervene({"crest": 0.0, "long tail": 1.0})
    on_logit = getattr(model.bottleneck, "head_on", "") == "logit"
    assert changed.concept_M[[5, 3]].tolist() == pytest.approx([0.01, 0.99] if on_logit else [0.0, 1.0])
    assert changed.class_logit_K.isfinite().all()
    if not on_logit:
        assert float(changed.contribution_KM[:, 5].abs().max()) == 0
    low, high = torch.full((6,), -2.0), torch.full((6,), 3.0)
    limited = explanation.intervene({"crest": 0.0, "long tail": 1.0, "red wing": 0.5}, logit_range=(low, high))
    torch.testing.assert_close(limited.concept_logit_M[[5, 3, 0]], torch.tensor([-2.0, 3.0, 0.0]))


def test_a_group_is_set_to_one_of_its_values(explanation: Explanation) -> None:
    changed = explanation.intervene_group("head", "crest")
    torch.testing.assert_close(changed.class_logit_K, explanation.intervene({"crest": 1.0, "blue head": 0.0}).class_logit_K)
    none = explanation.intervene_group("head", None)
    torch.testing.assert_close(none.class_logit_K, explanation.intervene({"crest": 0.0, "blue head": 0.0}).class_logit_K)
    with pytest.raises(ValueError, match=r"no group 'heads'.*head"):
        explanation.intervene_group("heads", "crest")
    with pytest.raises(ValueError, match=r"'red wing' is no value of the group 'head', which has \['blue head', 'crest'\]"):
        explanation.intervene_group("head", "red wing")
    with pytest.raises(ValueError, match="in no groups"):
        replace(explanation, groups=None).intervene_group("head", None)


def test_weights_are_multiplied_as_if_the_head_had_others(model: ConceptModel, explanation: Explanation, picture: Tensor) -> None:
    changed = (
        explanation.reweigh({"crest": 0.0, "red wing": 2.0}).reweigh({"red wing": 3.0}, target_class="Dapple").intervene({"crest": 0.4})
    )
    head = model.bottleneck.head
    per_concept = head.weight.shape[1] // 6
    with torch.no_grad():
        weight_KMF = head.weight.view(4, 6, per_concept)
        weight_KMF[:, 5] = 0
        weight_KMF[:, 0] *= 2
        weight_KMF[3, 0] *= 3
    expected = explain(model, picture).intervene({"crest": 0.4})
    torch.testing.assert_close(changed.class_logit_K, expected.class_logit_K, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changed.contribution_KM, expected.contribution_KM, atol=1e-4, rtol=1e-4)
    if expected.weight_KM is not None:
        torch.testing.assert_close(changed.weight_KM, expected.weight_KM)


def test_wrong_factors_are_refused(explanation: Explanation) -> None:
    with pytest.raises(ValueError, match="cannot be multiplied by nan"):
        explanation.reweigh({"crest": float("nan")})
    with pytest.raises(ValueError, match="did you mean"):
        explanation.reweigh({"crests": 1.0})
    with pytest.raises(ValueError, match="numbered from 0"):
        explanation.reweigh({"crest": 1.0}, target_class=9)


def test_a_model_that_learned_since_is_noticed(model: ConceptModel, explanation: Explanation) -> None:
    with torch.no_grad():
        model.bottleneck.head.weight.add_(1.0)
        assert model.bottleneck.head.bias is not None
        model.bottleneck.head.bias.add_(1.0)
    with pytest.raises(ValueError, match="was changed since; explain the picture again"):
        explanation.intervene({"crest": 0.5})


def test_an_explanation_survives_pickling_and_the_mode_is_restored(model: ConceptModel, explanation: Explanation) -> None:
    before = torch.get_rng_state()
    again: Explanation = pickle.loads(pickle.dumps(explanation))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(again.intervene({"crest": 0.5}).class_logit_K, explanation.intervene({"crest": 0.5}).class_logit_K)
    model.train()
    model.bottleneck.head.eval()
    read_head(model.bottleneck, explanation.concept_logit_M, explanation.context_X)
    assert model.bottleneck.training
    assert not model.bottleneck.head.training


def test_a_contrast_is_the_difference_of_two_sums(explanation: Explanation) -> None:
    found = explanation.versus()
    order = explanation.class_logit_K.argsort(descending=True).tolist()
    assert (explanation.target, found.other) == (order[0], order[1])
    assert float(found.difference_M.sum()) + found.bias == pytest.approx(found.margin, abs=1e-4)
    assert found.margin == pytest.approx(float(explanation.class_logit_K[order[0]] - explanation.class_logit_K[order[1]]))
    rows = [*found.for_first(6), *found.for_second(6)]
    assert sum(row.value for row in rows) == pytest.approx(float(found.difference_M.sum()), abs=1e-4)
    assert [row.value for row in found.for_first(6)] == sorted((row.value for row in found.for_first(6)), reverse=True)
    assert all(row.value > 0 for row in found.for_first(6))
    assert all(row.value < 0 for row in found.for_second(6))
    turned = explanation.for_class(found.other).versus(explanation.target)
    torch.testing.assert_close(turned.difference_M, -found.difference_M)
    assert [e.name for e in found.against_second(2)] == [e.name for e in explanation.for_class(found.other).against(2)]
    with pytest.raises(ValueError, match="is the class that is explained"):
        explanation.versus(explanation.target)
    with pytest.raises(ValueError, match="did you mean"):
        explanation.versus("Brambel")


@pytest.mark.parametrize(
    "name", ["cem.CEM", "coop_cbm.CoopCBM", "labo.LaBo", "post_hoc.PostHocCBM", "salf_cbm.SALFCBM", "sparse_cbm.SparseCBM"]
)
def test_the_baselines_are_explained_changed_and_pickled(build: Build, picture: Tensor, name: str) -> None:
    module, kind = name.split(".")

    def make(problem: Problem) -> Bottleneck:
        with_text = replace(problem, text_MD=torch.randn(6, 6, generator=torch.Generator().manual_seed(4)))
        return getattr(importlib.import_module(f"dotcbm.models.{module}"), kind)(with_text)

    model = build(make).eval()
    found = explain(model, picture)
    torch.testing.assert_close(found.contribution_KM.sum(1) + found.bias_K, found.class_logit_K, atol=1e-4, rtol=1e-4)
    changed = found.intervene({"crest": 0.0, "red wing": 1.0})
    assert changed.class_logit_K.isfinite().all()
    again: Explanation = pickle.loads(pickle.dumps(found))
    torch.testing.assert_close(again.intervene({"crest": 0.0, "red wing": 1.0}).class_logit_K, changed.class_logit_K)
