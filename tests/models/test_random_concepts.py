"""Random concepts: frozen directions from the seed, and a head on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes.baselines import B, D, M, check_promises, make_features, make_problem, roundtrip, train

from dotcbm.models.random_concepts import RandomConcepts
from dotcbm.structures import PatchFeatures


def make(seed: int = 0, **settings) -> RandomConcepts:
    torch.manual_seed(seed)
    return RandomConcepts(make_problem(), **settings)


def test_the_formula_with_the_statistics_of_what_was_seen() -> None:
    model = make().train()
    seen = [make_features(seed, pictures=8) for seed in range(3)]
    for features in seen:
        model(features)
    pooled = [features.patch_BND.mean(1) for features in seen]
    mean_D = torch.stack([x.mean(0) for x in pooled]).mean(0)  # over all batches alike
    variance_D = torch.stack([x.var(0) for x in pooled]).mean(0)
    assert model.norm is not None
    model.eval()
    out = model(make_features())
    for b in range(B):
        z_D = (make_features().patch_BND[b].mean(0) - mean_D) / (variance_D + model.norm.eps).sqrt()
        for j in range(M):
            assert torch.allclose(out.concept_logit_BM[b, j], model.direction_MD[j] @ z_D, atol=1e-4)
        logit_K = model.head.weight @ (model.direction_MD @ z_D).sigmoid() + model.head.bias
        assert torch.allclose(out.class_logit_BK[b], logit_K, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"head_on": "logit", "scaling": "none"}, {"scaling": "half"}])
def test_it_keeps_the_promises_of_a_bottleneck(settings) -> None:
    model = make(**settings)
    check_promises(model)
    assert model(make_features()).evidence_BNM is not None


def test_nothing_but_the_head_can_be_trained() -> None:
    model = make()
    assert {name for name, _ in model.named_parameters()} == {"head.weight", "head.bias"}
    assert "direction_MD" in model.state_dict()


def test_the_directions_come_from_the_seed() -> None:
    assert torch.equal(make(1).direction_MD, make(1).direction_MD)
    assert not torch.equal(make(1).direction_MD, make(2).direction_MD)


def test_directions_have_unit_length_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, D, generator=generator)
    out = make(scaling="none").eval()(PatchFeatures(x[:, None], x, (1, 1)))
    assert float(out.concept_logit_BM.detach().var()) == pytest.approx(1.0, abs=0.25)


def test_an_intervention_moves_the_classes_by_the_head_s_weight() -> None:
    model = make(head_on="logit").eval()
    out = model(make_features())
    changed_BM = out.concept_logit_BM.clone()
    changed_BM[:, 0] += 1
    assert torch.allclose(model.classify(changed_BM) - out.class_logit_BK, model.head.weight[:, 0].expand(B, -1), atol=1e-5)


def test_two_stages_fit_the_head_at_once(tmp_path: Path) -> None:
    _, _, figures = train(tmp_path, RandomConcepts)
    assert figures["test/accuracy"] > 0.4  # of four classes


def test_joint_training_reduces_the_loss_and_measures_the_features(tmp_path: Path) -> None:
    first, last, _ = train(tmp_path, RandomConcepts, regime="joint", epochs=8)
    assert last < 0.98 * first  # the concepts' share of it cannot fall


def test_saved_and_read_back(tmp_path: Path) -> None:
    roundtrip(tmp_path, RandomConcepts, head_on="logit")


def test_bad_settings() -> None:
    for settings, message in (({"head_on": "both"}, "head_on is 'both'"), ({"scaling": "twice"}, "scaling is 'twice'")):
        with pytest.raises(ValueError, match=message):
            RandomConcepts(make_problem(), **settings)  # pyright: ignore[reportArgumentType]
