"""Patch and concept marginals against hand-computed answers and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dotcbm.structures import ConceptSet, PatchFeatures
from dotcbm.transport.priors import concept_prior, core_prior, map_to_grid, neighbour_mean, patch_prior, perplexity

KINDS = ["dot", "cosine", "norm", "uniform", "external", "border"]
NAN = float("nan")


def features(seed: int = 0, B: int = 2, grid: tuple[int, int] = (3, 4), D: int = 5) -> PatchFeatures:
    rng = torch.Generator().manual_seed(seed)
    return PatchFeatures(torch.randn(B, grid[0] * grid[1], D, generator=rng), torch.randn(B, D, generator=rng), grid)


def concepts(rows: list[list[float]]) -> ConceptSet:
    L = torch.tensor(rows)
    return ConceptSet(tuple(f"c{j}" for j in range(L.shape[1])), tuple(f"k{k}" for k in range(L.shape[0])), L)


def prior(kind, x: PatchFeatures, *, temperature: float = 1.0) -> Tensor:
    external = x.patch_BND.abs().sum(-1) if kind == "external" else None
    return patch_prior(kind, x, temperature=temperature, external_BN=external)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.1, 5.0), h=st.integers(1, 5), w=st.integers(1, 5))
def test_theta_is_a_distribution(kind, seed, temperature, h, w):
    theta = prior(kind, features(seed, grid=(h, w)), temperature=temperature)
    assert theta.shape == (2, h * w)
    torch.testing.assert_close(theta.sum(1), torch.ones(2))
    assert theta.min() >= 0


def test_dot_is_the_raw_product_of_the_paper():
    x = features()
    saliency = torch.einsum("bd,bnd->bn", x.global_BD, x.patch_BND)
    torch.testing.assert_close(prior("dot", x, temperature=2.0), (saliency / 2).softmax(1))


@pytest.mark.parametrize("kind", ["cosine", "norm", "border", "external"])
def test_other_saliencies_are_standardised_in_each_picture(kind):
    theta = prior(kind, features(1, grid=(5, 5)), temperature=0.7)
    score = 0.7 * theta.log()  # the saliency up to a constant
    torch.testing.assert_close(score.std(1, correction=0), torch.ones(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["cosine", "norm", "border"])
def test_standardised_priors_ignore_the_scale_of_the_features(kind):
    x = features(2)
    scaled = PatchFeatures(1000 * x.patch_BND, 0.01 * x.global_BD, x.grid)
    torch.testing.assert_close(prior(kind, scaled), prior(kind, x), atol=1e-6, rtol=1e-3)


def test_saliencies_rank_patches_as_defined():
    x = features(3)
    cosine = torch.nn.functional.cosine_similarity(x.patch_BND, x.global_BD[:, None], dim=-1)
    assert prior("cosine", x).argsort(1).equal(cosine.argsort(1))
    assert prior("norm", x).argsort(1).equal(x.patch_BND.norm(dim=-1).argsort(1))
    torch.testing.assert_close(prior("uniform", x), torch.full((2, 12), 1 / 12))


def test_border_prior_equals_a_loop_and_finds_the_object_in_the_middle():
    x = features(4, grid=(4, 5))
    unit = torch.nn.functional.normalize(x.patch_BND.double(), dim=-1)
    border = [i * 5 + j for i in range(4) for j in range(5) if i in (0, 3) or j in (0, 4)]
    saliency = torch.zeros(2, 20, dtype=torch.float64)
    for b in range(2):
        for n in range(20):
            others = [float(unit[b, n] @ unit[b, m]) for m in border if m != n]
            saliency[b, n] = 1 - sum(others) / len(others)
    expected = ((saliency - saliency.mean(1, keepdim=True)) / saliency.std(1, correction=0, keepdim=True)).softmax(1)
    torch.testing.assert_close(prior("border", x).double(), expected, atol=1e-6, rtol=1e-4)

    patch = torch.zeros(1, 25, 2)
    patch[..., 0] = 1.0
    patch[0, 12] = torch.tensor([0.0, 3.0])
    assert prior("border", PatchFeatures(patch, patch.mean(1), (5, 5)))[0].argmax() == 12


@pytest.mark.parametrize("kind", ["cosine", "norm", "border", "external"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1e4 + 0.1])
def test_a_constant_map_gives_the_uniform_prior_and_finite_gradients(kind, value):
    patch = torch.full((2, 49, 3), value, requires_grad=True)
    x = PatchFeatures(patch, torch.ones(2, 3), (7, 7))
    theta = prior(kind, x, temperature=0.01)
    torch.testing.assert_close(theta, torch.full((2, 49), 1 / 49))
    theta.square().sum().backward()
    assert patch.grad is not None
    assert patch.grad.isfinite().all()


def test_half_precision_features_give_float32():
    x = features(5).to(dtype=torch.float16)
    for kind in KINDS:
        theta = prior(kind, x)
        assert theta.dtype == torch.float32
        torch.testing.assert_close(theta, prior(kind, x.to(dtype=torch.float32)), atol=2e-3, rtol=0)


def test_patch_prior_errors():
    x = features()
    narrow = PatchFeatures(x.patch_BND, x.global_BD[:, :3], x.grid)
    for kind in ("dot", "cosine"):
        with pytest.raises(ValueError, match="patches of width 5 with a global token of width 3"):
            prior(kind, narrow)
    assert prior("norm", narrow).shape == (2, 12)
    with pytest.raises(ValueError, match="external_BN is missing"):
        patch_prior("external", x, temperature=1.0)
    with pytest.raises(ValueError, match="external_BN was given with the patch prior 'norm'"):
        patch_prior("norm", x, temperature=1.0, external_BN=torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"external map has shape \(2, 11\); these features need \(2, 12\)"):
        patch_prior("external", x, temperature=1.0, external_BN=torch.ones(2, 11))
    with pytest.raises(ValueError, match="temperature is 0"):
        prior("norm", x, temperature=0.0)
    with pytest.raises(ValueError, match="patch prior is 'center'; choose"):
        prior("center", x)


def test_eq18_and_figure2_by_hand():
    # Two classes, three concepts. r_0 = 1 + .5 + .5, r_1 = 1 + 1 + 0, r_2 = 1 + 0 + 1.
    shown = concepts([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    torch.testing.assert_close(concept_prior("eq18", shown), torch.full((3,), 1 / 3))
    # Three classes: concept 0 in all, 1 in one. r_0 = 1 + 1/3, r_1 = 1 + 1.
    lopsided = concepts([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    e = [math.exp(4 / 3), math.exp(2)]
    torch.testing.assert_close(concept_prior("eq18", lopsided), torch.tensor([e[1], e[0]]) / sum(e))  # 1 - softmax, M = 2
    # Standardised r is -1 and 1.
    expected = torch.tensor([1 / 0.5, -1 / 0.5]).softmax(0)
    torch.testing.assert_close(concept_prior("figure2", lopsided, temperature=0.5), expected)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), M=st.integers(1, 12), K=st.integers(1, 8), unknown=st.floats(0, 0.9))
@pytest.mark.parametrize("kind", ["eq18", "figure2", "uniform"])
def test_gamma_is_a_distribution_whatever_is_unknown(kind, seed, M, K, unknown):
    rng = torch.Generator().manual_seed(seed)
    L = (torch.rand(K, M, generator=rng) < 0.4).float()
    L[torch.rand(K, M, generator=rng) < unknown] = NAN
    gamma = concept_prior(kind, concepts(L.tolist()))
    assert gamma.shape == (M,)
    assert gamma.isfinite().all()
    assert gamma.min() >= 0
    torch.testing.assert_close(gamma.sum(), torch.ones(()))


def test_eq18_is_uniform_within_a_percent_on_many_concepts():
    L = (torch.rand(50, 106, generator=torch.Generator().manual_seed(0)) < 0.25).float()
    assert 105 < perplexity(concept_prior("eq18", concepts(L.tolist()))) <= 106.001


def test_unknown_entries_are_left_out_pair_by_pair():
    complete = concepts([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    # A class nobody knows anything about changes nothing; a concept nobody knows anything about counts as average.
    more = concepts([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [NAN, NAN, NAN]])
    for kind in ("eq18", "figure2"):
        torch.testing.assert_close(concept_prior(kind, more), concept_prior(kind, complete))
    lopsided = concepts([[1.0, 1.0, NAN], [1.0, 0.0, NAN], [1.0, 0.0, NAN]])
    score = concept_prior("figure2", lopsided).log()
    torch.testing.assert_close(score[2], score[:2].mean())
    # Pairwise: sum_k L_0k L_1k / sum_k L_0k over the two classes that know both is 1/2; the other direction is 1.
    # r_0 = 1 + 1/2, r_1 = 1 + 1.
    partly = concepts([[1.0, 1.0], [1.0, 0.0], [1.0, NAN]])
    e = [math.exp(1.5), math.exp(2)]
    torch.testing.assert_close(concept_prior("eq18", partly), torch.tensor([e[1], e[0]]) / sum(e))


def test_concept_prior_errors():
    two = concepts([[1.0, 0.0]])
    with pytest.raises(ValueError, match="concept prior is 'eq17'; choose eq18, figure2 or uniform"):
        concept_prior("eq17", two)
    with pytest.raises(ValueError, match="temperature is 0"):
        concept_prior("uniform", two, temperature=0.0)


def test_perplexity_counts_the_entries_in_use():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(perplexity(p), torch.tensor([4.0, 2.0, 1.0]))


def test_maps_are_averaged_over_each_patch():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, :2, :3] = True
    mask[1, 3, 5] = True
    got = map_to_grid(mask, (2, 3))
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.25]]))
    assert map_to_grid(torch.rand(2, 5, 7), (2, 3)).shape == (2, 6)
    torch.testing.assert_close(map_to_grid(torch.full((1, 5, 7), 0.3), (3, 2)), torch.full((1, 6), 0.3))
    torch.testing.assert_close(
        map_to_grid(torch.eye(2)[None], (4, 4)).view(4, 4), torch.eye(2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    with pytest.raises(ValueError, match=r"map has shape \(4, 6\); give \(B, H, W\)"):
        map_to_grid(mask[0], (2, 3))


def blob(grid: tuple[int, int] = (8, 8)) -> PatchFeatures:
    """A square of 4 x 4 long patches, and one longer patch away from it."""
    norm_hw = torch.ones(grid)
    norm_hw[2:6, 2:6] = 3.0
    norm_hw[0, 7] = 5.0
    patch_1ND = norm_hw.flatten()[None, :, None] * torch.nn.functional.normalize(torch.ones(1, 1, 5), dim=-1)
    return PatchFeatures(patch_1ND, patch_1ND.mean(1), grid)


def test_the_core_is_even_inside_and_empty_outside():
    theta_hw = core_prior(blob(), core=0.8, softness=0.05).view(8, 8)
    torch.testing.assert_close(theta_hw.sum(), torch.tensor(1.0))
    # The inner 2 x 2 have nine long neighbours each; the lone long patch has none, and is no part of the core.
    torch.testing.assert_close(theta_hw[3:5, 3:5], torch.full((2, 2), 0.25), atol=1e-3, rtol=0)
    assert theta_hw[0, 7] < 1e-6


def test_without_averaging_the_longest_patch_is_the_core():
    theta_N = core_prior(blob(), core=0.8, softness=0.05, smoothing=1)[0]
    assert theta_N.argmax() == 7
    assert theta_N[7] > 0.99


def test_a_core_in_a_tensor_is_the_same():
    given, in_tensors = (core_prior(blob(), core=kind(0.6), softness=0.25) for kind in (float, torch.tensor))
    torch.testing.assert_close(given, in_tensors)


def test_nothing_stands_out_of_an_even_picture():
    patch = torch.ones(2, 9, 4)
    torch.testing.assert_close(core_prior(PatchFeatures(patch, patch.mean(1), (3, 3)), core=0.8, softness=0.1), torch.full((2, 9), 1 / 9))


@given(st.floats(-1, 0.95), st.floats(0.01, 1), st.sampled_from([1, 3, 5]), st.floats(0.1, 100), st.integers(0, 1000))
def test_the_core_sums_to_one_and_ignores_the_scale_of_the_features(core, softness, smoothing, scale, seed):
    patch = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(seed)).double()
    theta, scaled = (
        core_prior(PatchFeatures(x, x.mean(1), (4, 5)), core=core, softness=softness, smoothing=smoothing) for x in (patch, scale * patch)
    )
    torch.testing.assert_close(theta.sum(1), torch.ones(2, dtype=theta.dtype))
    torch.testing.assert_close(theta, scaled, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"core": 1.0}, "core is 1.0"), ({"softness": 0.0}, "softness is 0.0"), ({"smoothing": 2}, "square of 2 patches")],
)
def test_cores_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        core_prior(blob(), **{"core": 0.8, "softness": 0.1, **setting})


@given(st.sampled_from([1, 3, 5]), st.integers(0, 1000))
def test_the_mean_over_neighbours_is_that_of_those_that_exist(side, seed):
    map_hw = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)).double()
    found_hw = neighbour_mean(map_hw.view(1, -1), (4, 6), side=side).view(4, 6)
    half = side // 2
    for row in range(4):
        for column in range(6):
            near = map_hw[max(row - half, 0) : row + half + 1, max(column - half, 0) : column + half + 1]
            torch.testing.assert_close(found_hw[row, column], near.mean())
