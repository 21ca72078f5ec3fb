"""CEM: mixtures of two embeddings, RandInt, and exact contributions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes.baselines import GRID, B, D, K, M, N, check_promises, make_features, make_problem, roundtrip, train

from dotcbm.models.cem import CEM
from dotcbm.training.head_fit import check_reads_truth

C = 3


def make(**settings) -> CEM:
    torch.manual_seed(0)
    return CEM(make_problem(), width=C, **settings)


@pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
def test_the_formula_concept_by_concept(activation) -> None:
    model, features = make(activation=activation, scaling="none").eval(), make_features()
    out = model(features)
    weight, bias = model.embedding.weight, model.embedding.bias
    for b in range(B):
        h_D = features.patch_BND[b].mean(0)
        mixed = []
        for j in range(M):
            rows = slice(j * 2 * C, (j + 1) * 2 * C)
            both = weight[rows] @ h_D + bias[rows]
            both = F.leaky_relu(both) if activation == "leaky_relu" else both
            logit = model.scorer.weight[0] @ both + model.scorer.bias[0]
            p = logit.sigmoid()
            assert torch.allclose(out.concept_logit_BM[b, j], logit, atol=1e-5)
            mixed.append(p * both[:C] + (1 - p) * both[C:])
        expected_K = model.head.weight @ torch.cat(mixed) + model.head.bias
        assert torch.allclose(out.class_logit_BK[b], expected_K, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"activation": "identity", "scaling": "half", "l2": 0.3}, {"dropout": 0.2, "scaling": "none"}])
def test_it_keeps_the_promises_of_a_bottleneck(settings) -> None:
    model = make(**settings)
    check_promises(model)
    evidence = model(make_features()).evidence_BNM
    assert (evidence is not None) == (settings.get("activation") == "identity")


def test_an_intervention_swaps_one_mixture_and_nothing_else() -> None:
    model = make().eval()
    out = model(make_features())
    changed_BM = out.concept_logit_BM.clone()
    changed_BM[:, 2] = torch.inf
    assert out.context_BX is not None
    before, after = (model.head_input(x, out.context_BX).unflatten(1, (M, C)) for x in (out.concept_logit_BM, changed_BM))
    assert torch.allclose(after[:, 2], out.context_BX[:, 2, 0])  # certain: the embedding of presence
    others = [j for j in range(M) if j != 2]
    assert torch.equal(after[:, others], before[:, others])
    weight_KC = model.head.weight[:, 2 * C : 3 * C]
    moved_BK = model.classify(changed_BM, out.context_BX) - out.class_logit_BK
    assert torch.allclose(moved_BK, (after - before)[:, 2] @ weight_KC.T, atol=1e-5)


def test_randint_replaces_known_labels_in_training_only() -> None:
    features = make_features()
    truth_BM = torch.ones(B, M)
    truth_BM[:, 1] = torch.nan
    model = make(intervention=1.0, scaling="none")
    out = model.train()(features, truth_BM=truth_BM)
    assert out.context_BX is not None
    certain_BM = torch.where(truth_BM.isnan(), out.concept_logit_BM, torch.inf)
    assert torch.allclose(out.class_logit_BK, model.classify(certain_BM, out.context_BX), atol=1e-5)
    assert torch.allclose(model.eval()(features, truth_BM=truth_BM).class_logit_BK, model(features).class_logit_BK)
    never = make(intervention=0.0, scaling="none").train()
    assert torch.allclose(never(features, truth_BM=truth_BM).class_logit_BK, never(features).class_logit_BK)


def test_randint_has_its_rate() -> None:
    model = CEM(make_problem(), width=1, intervention=0.25, scaling="none").train()
    with torch.no_grad():  # presence is 1, absence 0, and the probability one half: a mixture tells what was used
        model.embedding.weight.zero_()
        model.embedding.bias.copy_(torch.tensor([1.0, 0.0]).repeat(M))
        model.scorer.weight.zero_()
        model.scorer.bias.zero_()
        model.head.weight.fill_(1.0)
        model.head.bias.zero_()
    torch.manual_seed(3)
    features = make_features(pictures=2000)
    total_BK = model(features, truth_BM=torch.ones(2000, M)).class_logit_BK
    replaced = (total_BK[:, 0] - 0.5 * M) / 0.5  # of M concepts, for each picture
    assert abs(float(replaced.detach().mean()) / M - 0.25) < 0.02
    assert len(replaced.round().unique()) > 3  # drawn for each picture, not once a batch


def test_training_reduces_the_loss(tmp_path: Path) -> None:
    first, last, figures = train(tmp_path, CEM, regime="joint", width=4)
    assert last < 0.7 * first
    assert figures["test/concept_auroc"] > 0.6


def test_saved_and_read_back(tmp_path: Path) -> None:
    roundtrip(tmp_path, CEM, width=4, activation="identity", scaling="half", l2=0.1)


def test_the_penalty_is_on_the_weights_of_the_logit() -> None:
    model = make(l2=0.4).train()
    weight_MD = torch.stack([model.scorer.weight[0] @ model.embedding.weight[2 * C * j : 2 * C * (j + 1)] for j in range(M)])
    assert weight_MD.shape == (M, D)
    assert torch.allclose(model(make_features()).losses["l2"], 0.2 * weight_MD.square().sum() / M)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"intervention": 1.5}, r"intervention is 1\.5"),
        ({"activation": "tanh"}, "activation is 'tanh'; choose one of"),
        ({"scaling": "twice"}, "scaling is 'twice'"),
        ({"l2": -1.0}, "penalty"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        CEM(make_problem(), **settings)


def test_without_embeddings_there_is_no_class() -> None:
    model = make().eval()
    with pytest.raises(ValueError, match="context_BX"):
        model.classify(torch.zeros(B, M))
    with pytest.raises(ValueError, match="independent"):
        check_reads_truth(model)
    with pytest.raises(ValueError, match="independent"):
        check_reads_truth(CEM(make_problem(), width=1))


def test_shapes() -> None:
    out = make()(make_features())
    assert out.context_BX is not None
    assert out.context_BX.shape == (B, M, 2, C)
    assert out.class_logit_BK.shape == (B, K)
    assert out.grid == GRID
    assert GRID[0] * GRID[1] == N
