"""Concept maps trained place by place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fakes.baselines import GRID, B, D, M, N, check_promises, make_features, make_problem, roundtrip, train

from dotcbm.models.label_free import LabelFreeCBM
from dotcbm.models.linear_concepts import cubed_cosine
from dotcbm.models.salf_cbm import SALFCBM
from dotcbm.structures import PatchFeatures

TEXT = torch.randn(M, D, generator=torch.Generator().manual_seed(3))


def labels(num: int) -> torch.Tensor:
    return torch.rand(num, M, generator=torch.Generator().manual_seed(2)).round()


def terms_of(model: SALFCBM, features: PatchFeatures, concepts: torch.Tensor) -> dict[str, torch.Tensor]:
    return model.losses(model(features), concepts_BM=concepts, label_B=torch.zeros(len(concepts), dtype=torch.long))


def test_each_place_is_compared_with_the_label() -> None:
    torch.manual_seed(0)
    model = SALFCBM(make_problem(), scaling="none").train()
    features, concepts = make_features(pictures=8), labels(8)
    concepts[2, 1] = torch.nan
    found = terms_of(model, features, concepts)["concept"]
    maps = F.linear(features.patch_BND, model.concept.linear.weight)
    slow = torch.stack([cubed_cosine(maps[:, i], concepts) for i in range(N)]).mean()
    assert torch.allclose(found, 1 - slow, atol=1e-5)


def test_pooled_is_the_label_free_bottleneck() -> None:
    torch.manual_seed(0)
    salf, free = SALFCBM(make_problem(), local=0.0).train(), LabelFreeCBM(make_problem()).train()
    free.load_state_dict(salf.state_dict())
    features, concepts = make_features(pictures=8), labels(8)
    ours = terms_of(salf, features, concepts)
    theirs = free.losses(free(features), concepts_BM=concepts, label_B=torch.zeros(8, dtype=torch.long))
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
    assert torch.allclose(salf.eval()(features).class_logit_BK, free.eval()(features).class_logit_BK, atol=1e-5)


def test_the_share_of_the_places_mixes_both() -> None:
    features, concepts = make_features(pictures=8), labels(8)
    found = {}
    for local in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        found[local] = terms_of(SALFCBM(make_problem(), local=local).train(), features, concepts)["concept"]
    assert torch.allclose(found[0.25], 0.75 * found[0.0] + 0.25 * found[1.0], atol=1e-5)


def test_text_compares_each_place_with_its_patch() -> None:
    torch.manual_seed(0)
    problem = replace(make_problem(), text_MD=TEXT)
    model = SALFCBM(problem, target="text", scaling="none").train()
    features = make_features(pictures=8)
    cosine = F.normalize(features.patch_BND, dim=-1) @ F.normalize(TEXT, dim=-1).T
    maps = F.linear(features.patch_BND, model.concept.linear.weight)
    slow = torch.stack([cubed_cosine(maps[:, i], cosine[:, i]) for i in range(N)]).mean()
    terms = terms_of(model, features, torch.full((8, M), torch.nan))
    assert torch.allclose(terms["concept"], 1 - slow, atol=1e-5)
    assert terms["calibration"] == 0
    assert terms_of(model.eval(), features, labels(8))["concept"] == 0  # places are compared in training only
    check_promises(model)


def test_local_training_raises_the_similarity_at_every_place() -> None:
    torch.manual_seed(0)
    concepts = labels(32)
    # Concept j shows at every place in feature j, and the noise is another at each.
    patch = torch.randn(32, N, D)
    patch[..., :M] += 1.5 * concepts[:, None, :]
    features = PatchFeatures(patch, patch.mean(1), GRID)
    reached = {}
    for local in (1.0, 0.0):
        torch.manual_seed(0)
        model = SALFCBM(make_problem(), local=local).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for _ in range(80):
            optimizer.zero_grad()
            sum(terms_of(model, features, concepts).values()).backward()  # pyright: ignore
            optimizer.step()
        reached[local] = float(cubed_cosine(model.concept.maps(patch), concepts[:, None]).mean())
    assert reached[1.0] > reached[0.0] + 0.05


@pytest.mark.parametrize("scaling", ["none", "half", "full"])
def test_it_keeps_the_promises_of_a_bottleneck(scaling: Any) -> None:
    torch.manual_seed(0)
    check_promises(SALFCBM(make_problem(), scaling=scaling))


def test_evidence_is_the_map() -> None:
    torch.manual_seed(0)
    model = SALFCBM(make_problem()).eval()
    out = model(make_features())
    assert out.evidence_BNM is not None
    assert out.evidence_BNM.shape == (B, N, M)
    assert (out.evidence_BNM.flatten(0, 1).argmax(0) == model.concept.maps(make_features().patch_BND).flatten(0, 1).argmax(0)).all()


def test_training_reduces_the_loss_and_finds_concepts(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, SALFCBM)
    assert last < 0.9 * first
    assert figures["test/concept_auroc"] > 0.6  # a frozen random encoder; 0.5 is chance


def test_saved_and_read_back(tmp_path: Path) -> None:
    roundtrip(tmp_path, SALFCBM, target="label", local=0.3, scaling="half")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "here"}, "target is 'here'"),
        ({"local": 1.1}, "local is 1.1"),
        ({"target": "text"}, "width 16, and there are none"),
        ({"scaling": "twice"}, "scaling is 'twice'"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SALFCBM(make_problem(), **given)


def test_texts_of_another_space_are_refused() -> None:
    with pytest.raises(ValueError, match="width 16, and theirs is 5"):
        SALFCBM(replace(make_problem(), text_MD=torch.randn(M, 5)), target="text")
