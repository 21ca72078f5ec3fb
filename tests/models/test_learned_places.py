"""Concepts that vary within classes learn where to look; the others look where their group is found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.parts import within_class_share
from dotcbm.structures import ConceptSet, PatchFeatures, Problem

GRID, D, E, M, K = (5, 5), 24, 16, 4, 5
N = GRID[0] * GRID[1]


def make_bottleneck(learned: tuple[bool, ...] = (True, False, True, False), **settings) -> DotCBM:
    concepts = ConceptSet(
        names=tuple(f"concept {j}" for j in range(M)),
        class_names=tuple(f"class {k}" for k in range(K)),
        class_concept_KM=torch.full((K, M), 0.5),
        groups=("head", "head", "tail", "tail"),
    )
    settings = {"num_parts": 3, "num_clusterings": 1, "part_width": E, "patch_smoothing": 1, "core": 0.0, **settings}
    bottleneck = DotCBM(Problem(D, D, GRID, concepts), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bottleneck.part_CE.copy_(F.normalize(torch.randn(3, E, generator=generator), dim=1))
        bottleneck.share_GC.copy_(torch.rand(2, 3, generator=generator).softmax(1))
        bottleneck.learned_M.copy_(torch.tensor(learned))
        bottleneck.query_ME.copy_(torch.randn(M, E, generator=generator))
    return bottleneck.double()


def make_features(seed: int = 0, n: int = 3) -> PatchFeatures:
    patch_BND = torch.randn(n, N, D, generator=torch.Generator().manual_seed(seed)).double()
    return PatchFeatures(patch_BND, patch_BND.mean(1), GRID)


def test_the_share_is_what_the_classes_leave_unexplained():
    generator = torch.Generator().manual_seed(0)
    label_n = torch.randint(0, 6, (300,), generator=generator)
    concept_nM = (torch.rand(300, 5, generator=generator) < torch.rand(6, 5, generator=generator)[label_n]).float()
    concept_nM[:, 4] = (label_n % 2).float()
    dummies = F.one_hot(label_n).numpy()
    expected = [1 - LinearRegression().fit(dummies, column).score(dummies, column) for column in concept_nM.T.numpy()]
    torch.testing.assert_close(within_class_share(concept_nM, label_n), torch.tensor(expected).float(), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 1000), st.floats(0, 1), st.integers(1, 6))
def test_labels_of_classes_do_not_vary_within_them(seed, value, num_classes):
    generator = torch.Generator().manual_seed(seed)
    label_n = torch.arange(40) % num_classes
    concept_nM = torch.rand(num_classes, 3, generator=generator)[label_n]
    concept_nM[:, 2] = value
    assert within_class_share(concept_nM, label_n).max() < 1e-9


def test_unknown_labels_say_nothing():
    label_n = torch.arange(40) % 4
    concept_nM = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    concept_nM[:, 1] = torch.nan
    concept_nM[::3, 0] = torch.nan
    known_n = ~concept_nM[:, 0].isnan()
    share_M = within_class_share(concept_nM, label_n)
    assert share_M[1] == 0
    torch.testing.assert_close(share_M[0], within_class_share(concept_nM[known_n, :1], label_n[known_n])[0])


@pytest.mark.parametrize(
    ("learn_places", "expected"),
    [("varying", [False, True, False, False]), ("all", [True] * 4), ("none", [False] * 4)],
)
def test_which_concepts_learn(learn_places, expected):
    label_n = torch.arange(500) % K
    concept_nM = torch.stack([label_n % 2, torch.arange(500) % 2, label_n < 2, torch.ones(500)], 1).float()
    concept_nM[:2, 2] = 1 - concept_nM[:2, 2]  # two slips of the pen
    bottleneck = make_bottleneck(learn_places=learn_places)
    bottleneck.set_learned(concept_nM, label_n)
    assert bottleneck.learned_M.tolist() == expected
    assert bottleneck.query_ME.requires_grad is bottleneck.learns is any(expected)
    assert (bottleneck.condense is None) is any(expected)


def test_a_search_starts_between_the_prior_and_where_the_group_is_found():
    bottleneck, features = make_bottleneck(), make_features()
    theta_BN = bottleneck.prior(features)
    found_BNG, _ = bottleneck.find(features.patch_BND, theta_BN)
    seen_BNM, _ = bottleneck.look(features.patch_BND, theta_BN)
    unit_BNE = F.normalize((features.patch_BND - bottleneck.centre_D) @ bottleneck.basis_DE, dim=2)
    for j, group in enumerate((0, 0, 1, 1)):
        start_BN = found_BNG[:, :, group]
        if j in (1, 3):  # not learned, whatever its query
            torch.testing.assert_close(seen_BNM[:, :, j], start_BN)
        else:
            weight_BN = (theta_BN * start_BN).sqrt() * (unit_BNE @ bottleneck.query_ME[j]).exp()
            torch.testing.assert_close(seen_BNM[:, :, j], weight_BN / weight_BN.sum(1, keepdim=True))


def test_only_learned_queries_get_gradients():
    bottleneck = make_bottleneck()
    bottleneck.query_ME.requires_grad_(True)
    with torch.no_grad():
        bottleneck.concept.weight.normal_(generator=torch.Generator().manual_seed(1))
    bottleneck(make_features()).concept_logit_BM.square().sum().backward()
    moved_M = bottleneck.query_ME.grad.abs().amax(1) > 0
    assert moved_M.tolist() == [True, False, True, False]


def test_a_patch_without_prior_is_not_seen_by_a_learned_concept():
    bottleneck, features = make_bottleneck((True,) * 4), make_features()
    theta_BN = bottleneck.prior(features)
    theta_BN[:, 7] = 0
    seen_BNM, _ = bottleneck.look(features.patch_BND, theta_BN / theta_BN.sum(1, keepdim=True))
    assert seen_BNM[:, 7].max() < 1e-12


def test_labels_of_pictures_teach_where_to_look():
    """A concept that is shown on one patch of a random place, in classes that say nothing of it: the parts do not tell where it is."""
    generator = torch.Generator().manual_seed(0)
    n = 300
    label_n, concept_n = torch.arange(n) % K, (torch.rand(n, generator=generator) > 0.5).long()
    patch_nND = torch.randn(n, N, D, generator=generator)
    place_n = torch.randint(0, N, (n,), generator=generator)
    patch_nND[torch.arange(n), place_n] += 6 * torch.eye(D)[torch.where(concept_n == 1, 0, 1)]
    patch_nND = 3 * F.normalize(patch_nND, dim=2)  # nothing stands out by its norm
    concept_nM = torch.stack([concept_n, 1 - concept_n, label_n % 2, label_n < 2], 1).float()
    bottleneck = make_bottleneck(eps=0.5, l2=0.02).float()
    with torch.no_grad():
        bottleneck.query_ME.zero_()
        bottleneck.share_GC.fill_(1 / 3)
    bottleneck.set_learned(concept_nM, label_n)
    features = PatchFeatures(patch_nND, patch_nND.mean(1), GRID)
    bottleneck.set_scale(bottleneck.read(features, bottleneck.find(patch_nND, bottleneck.prior(features))[0]))
    optimizer = torch.optim.Adam([p for p in bottleneck.parameters() if p.requires_grad], lr=0.02)
    for _ in range(200):
        output = bottleneck(features)
        loss = sum(bottleneck.losses(output, concepts_BM=concept_nM, label_B=label_n).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bottleneck.eval()
    plan_nNM = bottleneck(features).plan_BNM
    shown_n = concept_n == 1
    hit = (plan_nNM[shown_n, :, 0].argmax(1) == place_n[shown_n]).float().mean()
    assert hit > 0.6  # one in 25 by chance
    start_nNG, _ = bottleneck.find(patch_nND, bottleneck.prior(features))
    assert (start_nNG[shown_n, :, 0].argmax(1) == place_n[shown_n]).float().mean() < 0.3


@pytest.mark.parametrize(
    ("head_on", "learned", "on_probability"),
    [
        ("auto", (True, True, True, False), True),
        ("auto", (True, True, False, False), False),
        ("auto", (False,) * 4, False),
        ("logit", (True,) * 4, False),
        ("probability", (False,) * 4, True),
    ],
)
def test_the_head_reads_probabilities_where_most_places_are_learned(head_on, learned, on_probability):
    bottleneck = make_bottleneck(learned, head_on=head_on)
    logit_BM = torch.randn(3, M, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(bottleneck.head_input(logit_BM), logit_BM.sigmoid() if on_probability else logit_BM)
