"""The parts that DOT-CBM finds, and what it reads from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.parts import Parts, cluster, find_parts, group_shares, score_parts
from dotcbm.structures import ConceptSet, PatchFeatures, Problem

GRID, D = (6, 6), 12
N = GRID[0] * GRID[1]


def make_problem(groups: tuple[str, ...] = ("wing", "wing", "tail", "tail"), num_classes: int = 12, detail_width: int = 0) -> Problem:
    concepts = ConceptSet(
        names=tuple(f"concept {j}" for j in range(len(groups))),
        class_names=tuple(f"class {k}" for k in range(num_classes)),
        class_concept_KM=torch.rand(num_classes, len(groups), generator=torch.Generator().manual_seed(0)),
        groups=groups,
    )
    return Problem(patch_width=D, global_width=D, grid=GRID, concepts=concepts, detail_width=detail_width)


def planted(n: int = 240, seed: int = 0) -> tuple[PatchFeatures, torch.Tensor, torch.Tensor]:
    """Two parts, each on two patches of a random place, before a short background. The last features say the class on both of them,
    the details say the concept of the part that they lie on. Concepts 0 and 1 are the wing's two values, 2 and 3 the tail's.
    """
    generator = torch.Generator().manual_seed(seed)
    label_n = torch.arange(n) % 12
    value_K2 = torch.tensor([[k % 2, (k // 2) % 2] for k in range(12)])
    patch_nND = 0.05 * torch.randn(n, N, D, generator=generator)
    detail_nNL = torch.randn(n, N, 4, generator=generator)
    place_n2 = torch.zeros(n, 2, dtype=torch.long)
    for i in range(n):
        row, column = (int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
        for part in range(2):
            start = row * GRID[1] + column + part * GRID[1]
            place_n2[i, part] = start
            for patch in (start, start + 1):
                patch_nND[i, patch] += 4 * torch.eye(D)[part] + 0.5 * torch.eye(D)[2 + label_n[i] % 8]
                detail_nNL[i, patch, part] += 6.0 * value_K2[label_n[i], part] - 3
    value_n2 = value_K2[label_n]
    concept_nM = torch.stack([value_n2[:, 0], 1 - value_n2[:, 0], value_n2[:, 1], 1 - value_n2[:, 1]], 1).float()
    return PatchFeatures(patch_nND, patch_nND.mean(1), GRID, detail_BNL=detail_nNL), concept_nM, torch.stack([label_n, *place_n2.T], 1)


def found(bottleneck: DotCBM, **changes) -> tuple[Parts, PatchFeatures, torch.Tensor]:
    patches, concepts, label_and_places = planted()
    arguments = {"concept_nM": concepts, "label_n": label_and_places[:, 0], "group_M": torch.tensor([0, 0, 1, 1]), **changes}
    parts = find_parts(
        patches,
        num_parts=bottleneck.num_parts,
        num_clusterings=bottleneck.num_clusterings,
        part_width=bottleneck.part_CE.shape[1],
        **arguments,
    )
    return parts, patches, label_and_places[:, 1:]


@pytest.mark.parametrize("relax_patch", [0.0, 0.1, None])
def test_each_group_looks_at_the_part_whose_details_predict_it(relax_patch):
    bottleneck = DotCBM(make_problem(), num_parts=2, num_clusterings=3, part_width=4, eps=0.1, patch_smoothing=1, relax_patch=relax_patch)
    parts, patches, place_n2 = found(bottleneck)
    bottleneck.set_parts(parts)
    seen_nNG, residual_n = bottleneck.find(patches.patch_BND, bottleneck.prior(patches))
    torch.testing.assert_close(seen_nNG.sum(1), torch.ones(len(seen_nNG), 2))
    peak_n2 = seen_nNG.argmax(1)
    on_part_n2 = (peak_n2 == place_n2) | (peak_n2 == place_n2 + 1)
    assert on_part_n2.float().mean(0).min() > 0.95
    assert relax_patch is None or residual_n.max() < 1e-3


def test_concepts_tossed_by_a_coin_are_predicted_by_no_part():
    bottleneck = DotCBM(make_problem(), num_parts=2, num_clusterings=2, part_width=4)
    coin_nM = (torch.rand(240, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    parts, _, _ = found(bottleneck, concept_nM=coin_nM)
    assert (parts.score_GC - 0.5).abs().max() < 0.1


def test_parts_do_not_depend_on_where_unknown_concepts_are_filled():
    bottleneck = DotCBM(make_problem(), num_parts=2, num_clusterings=1, part_width=4)
    _, concepts, _ = planted()
    holes = concepts.clone()
    holes[::7, 0] = torch.nan
    parts, _, _ = found(bottleneck, concept_nM=holes)
    assert parts.score_GC.isfinite().all()
    full, _, _ = found(bottleneck)
    assert torch.equal(group_shares(parts.score_GC, num_clusterings=1).argmax(1), group_shares(full.score_GC, num_clusterings=1).argmax(1))


def test_scores_are_the_auroc_of_ridge_regression_in_held_out_classes():
    generator = torch.Generator().manual_seed(0)
    n, num_folds = 200, 10
    label_n = torch.arange(n) % 20
    concept_K2 = (torch.rand(20, 2, generator=generator) > 0.5).float()
    concept_nM = concept_K2[label_n]
    detail_nCL = torch.randn(n, 1, 3, generator=generator) + concept_nM[:, None, :1]
    score = score_parts(detail_nCL, concept_nM=concept_nM, label_n=label_n, group_M=torch.tensor([0, 1]))
    from sklearn.linear_model import Ridge

    x = ((detail_nCL[:, 0] - detail_nCL[:, 0].mean(0)) / (detail_nCL[:, 0].std(0) + 1e-6)).numpy()
    order_K = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    fold_n = (order_K[label_n] % num_folds).numpy()
    predicted = torch.zeros(n, 2)
    for fold in range(num_folds):
        model = Ridge(alpha=100.0).fit(x[fold_n != fold], concept_nM[torch.from_numpy(fold_n != fold)].numpy())
        predicted[torch.from_numpy(fold_n == fold)] = torch.from_numpy(model.predict(x[fold_n == fold])).float()
    expected = [roc_auc_score(concept_nM[:, j], predicted[:, j]) for j in range(2)]
    torch.testing.assert_close(score[:, 0], torch.tensor(expected, dtype=score.dtype), atol=2e-3, rtol=0)
    assert score[0, 0] > 0.7


def test_clusters_are_found_and_do_not_depend_on_the_order_of_equal_vectors():
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=1)
    unit = torch.nn.functional.normalize(centres.repeat(50, 1) + 0.05 * torch.randn(200, 8, generator=generator), dim=1)
    given_centres = cluster(unit, 4, generator=torch.Generator().manual_seed(3))
    assert (given_centres @ centres.T).amax(1).min() > 0.99
    assert (given_centres @ centres.T).argmax(1).unique().numel() == 4


def test_more_parts_than_different_patches():
    unit = torch.eye(3).repeat(5, 1)
    assert cluster(unit, 6, generator=torch.Generator().manual_seed(0)).isfinite().all()


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_shares_sum_to_one_and_ignore_how_good_a_part_is_on_average(num_clusterings, num_groups, num_parts, seed):
    score_GC = torch.rand(num_groups, num_clusterings * num_parts, generator=torch.Generator().manual_seed(seed))
    share_GC = group_shares(score_GC, num_clusterings=num_clusterings)
    torch.testing.assert_close(share_GC.sum(1), torch.ones(num_groups))
    shifted_GC = score_GC + torch.rand(1, score_GC.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close(group_shares(shifted_GC, num_clusterings=num_clusterings), share_GC, atol=1e-4, rtol=1e-3)


@settings(max_examples=25)
@given(
    st.sampled_from([1.0, 2.0, 3.0]),
    st.sampled_from([0.0, 0.2, None]),
    st.sampled_from([1, 3]),
    st.sampled_from([0, 4]),
    st.sampled_from([0.9, 0.5, 0.0, None]),
    st.integers(0, 1000),
)
def test_evidence_sums_to_the_logit(power, relax_patch, patch_smoothing, detail_width, core, seed):
    generator = torch.Generator().manual_seed(seed)
    bottleneck = DotCBM(
        make_problem(detail_width=detail_width),
        num_parts=3,
        num_clusterings=2,
        part_width=5,
        power=power,
        relax_patch=relax_patch,
        patch_smoothing=patch_smoothing,
        core=core,
    ).double()
    bottleneck.eval()
    with torch.no_grad():
        bottleneck.part_CE.copy_(torch.randn(6, 5, generator=generator))
        bottleneck.share_GC.copy_(torch.rand(2, 6, generator=generator).double().softmax(1))
        bottleneck.concept.weight.copy_(torch.randn(4, D + detail_width, generator=generator))
        bottleneck.mean_GX.copy_(torch.randn(2, D + detail_width, generator=generator))
        bottleneck.scale_GX.copy_(0.5 + torch.rand(2, D + detail_width, generator=generator))
        bottleneck.learned_M.copy_(torch.rand(4, generator=generator) > 0.5)
        bottleneck.query_ME.copy_(torch.randn(4, 5, generator=generator))
        patch_BND = torch.randn(3, N, D, generator=generator).double()
        detail_BNL = torch.randn(3, N, detail_width, generator=generator).double() if detail_width else None
        output = bottleneck(PatchFeatures(patch_BND, patch_BND.mean(1), GRID, detail_BNL=detail_BNL))
    assert output.evidence_BNM is not None
    assert output.plan_BNM is not None
    assert output.gamma_BM is not None
    torch.testing.assert_close(output.evidence_BNM.sum(1) + bottleneck.concept.bias, output.concept_logit_BM)
    torch.testing.assert_close(output.plan_BNM.sum(1), output.gamma_BM)


def test_power_one_reads_the_mean_of_the_plan():
    bottleneck = DotCBM(make_problem(), power=1.0, num_parts=2, num_clusterings=1, part_width=4)
    patch_BND, seen_BNG = torch.randn(2, N, D), torch.rand(2, N, 2).softmax(1)
    feature_BGD = bottleneck.read(PatchFeatures(patch_BND, patch_BND.mean(1), GRID), seen_BNG)
    torch.testing.assert_close(feature_BGD, torch.einsum("bng,bnd->bgd", seen_BNG, patch_BND))


def test_a_channel_that_is_silent_in_the_part_is_not_read_from_where_the_plan_hardly_is():
    bottleneck = DotCBM(make_problem(), num_parts=2, num_clusterings=1, part_width=4)
    patch_BND = torch.zeros(1, N, D)
    patch_BND[0, 0, 0] = 1.0  # speaks in one patch only
    seen_BNG = torch.full((1, N, 2), 1e-6)
    seen_BNG[0, 5] = 1 - (N - 1) * 1e-6
    read_BGX = bottleneck.read(PatchFeatures(patch_BND, patch_BND.mean(1), GRID), seen_BNG)
    assert read_BGX.max() < 1e-4


def test_one_class_leaves_nothing_to_hold_out():
    score_GC = score_parts(torch.randn(6, 2, 3), concept_nM=torch.ones(6, 2), label_n=torch.zeros(6).long(), group_M=torch.tensor([0, 1]))
    assert torch.equal(score_GC, torch.full((2, 2), 0.5))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_parts": 0}, "num_parts is 0"),
        ({"power": 0.5}, "power is 0.5"),
        ({"l2": -1.0}, "l2 is -1.0"),
        ({"core": 1.0}, "core is 1.0"),
        ({"softness": 0.0}, "softness is 0.0"),
        ({"core_tolerance": -0.1}, "core_tolerance is -0.1"),
        ({"head_on": "sign"}, "head_on is 'sign'"),
        ({"learn_places": "some"}, "learn_places is 'some'"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        DotCBM(make_problem(), **setting)


def test_parts_of_other_settings_are_refused():
    bottleneck = DotCBM(make_problem(), num_parts=2, num_clusterings=1, part_width=4)
    parts, _, _ = found(bottleneck)
    with pytest.raises(ValueError, match=r"part_CE has shape \(2, 4\); this bottleneck needs \(6, 4\)"):
        DotCBM(make_problem(), num_parts=2, num_clusterings=3, part_width=4).set_parts(parts)


def test_too_few_foreground_patches():
    patches = PatchFeatures(torch.ones(3, N, D), torch.ones(3, D), GRID)
    with pytest.raises(ValueError, match="stand out, too few for 5 parts; lower num_parts"):
        find_parts(
            patches,
            concept_nM=torch.ones(3, 4),
            label_n=torch.arange(3),
            group_M=torch.tensor([0, 0, 1, 1]),
            num_parts=5,
            num_clusterings=1,
            part_width=4,
        )


def test_clusters_are_the_same_bits_in_every_run():
    """On a GPU too, where adding by index gives other last digits each time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unit = torch.nn.functional.normalize(torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    found = [cluster(unit.to(device), 5, generator=torch.Generator().manual_seed(3)).cpu() for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], cluster(unit, 5, generator=torch.Generator().manual_seed(3)), atol=1e-4, rtol=0)
