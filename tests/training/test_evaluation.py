"""Figures of a split against figures computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dotcbm.structures import ConceptBatch, ConceptOutput, ConceptSet
from dotcbm.training.evaluation import Evaluation, concept_maps

CONCEPTS = ConceptSet(("a", "b"), ("x", "y"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), part_names=("p", "q"), parts=(("p",), ("q",)))


def batch_of(num: int = 4, *, start: int = 0) -> tuple[ConceptOutput, ConceptBatch]:
    """Concept a points at its part in every picture, concept b never; theta points at p."""
    index = torch.arange(start, start + num)
    plan = torch.full((num, 4, 2), 0.05)
    plan[:, 0, 0] = 0.3  # top left: p
    plan[:, 1, 1] = 0.3  # top right; q is bottom right
    theta = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(num, 4)
    label = index % 2
    output = ConceptOutput(
        concept_logit_BM=torch.stack([1.0 - 2 * label, label.float()], 1),
        class_logit_BK=torch.tensor([[2.0, 0.0]]).expand(num, 2),
        grid=(2, 2),
        plan_BNM=plan,
        theta_BN=theta,
        evidence_BNM=-plan,
        residual_B=torch.full((num,), 0.25),
    )
    masks = torch.zeros(num, 2, 4, 4, dtype=torch.bool)
    masks[:, 0, :2, :2] = True
    masks[:, 1, 2:, 2:] = True
    batch = ConceptBatch(
        concepts_BM=torch.ones(num, 2) * torch.stack([1 - label, torch.ones(num)], 1),
        label_B=label,
        index_B=index,
        names=tuple(map(str, index.tolist())),
        size_B2=torch.full((num, 2), 100),
        points_BP3=torch.tensor([[0.25, 0.25, 1.0], [0.75, 0.75, 1.0]]).expand(num, 2, 3),
        foreground_BHW=masks.any(1),
        part_masks_BPHW=masks,
        group_B=label,
    )
    return output, batch


def test_figures_by_hand():
    evaluation = Evaluation(CONCEPTS)
    evaluation.update(*batch_of(4))
    evaluation.update(*batch_of(4, start=4))
    figures = evaluation.compute()
    assert figures["num_pictures"] == 8
    assert figures["accuracy"] == 0.5
    assert figures["worst_group_accuracy"] == 0
    assert figures["concept_auroc"] == 1  # b does not vary and does not count
    assert figures["num_pointed"] == 12  # a in four pictures, b in eight
    assert figures["pointing_0.1_plan"] == pytest.approx(4 / 12)
    assert figures["pointing_mask_plan"] == pytest.approx(4 / 12)
    assert figures["pointing_mask_prior"] == pytest.approx(4 / 12)
    # Plan over theta: a 0.75, 1/6, 1/4, 1/2 and b 1/8, 1, 1/4, 1/2: the peaks stay.
    assert figures["pointing_mask_lift"] == pytest.approx(4 / 12)
    assert figures["pointing_0.1_centre"] == 0
    # The object covers patches 0 and 3.
    assert figures["foreground_mass_prior"] == pytest.approx(0.5)
    assert figures["foreground_mass_plan"] == pytest.approx((4 * 0.35 / 0.45 + 8 * 0.10 / 0.45) / 12)
    assert figures["transport_residual"] == 0.25
    assert "foreground_mass_evidence" not in figures  # nowhere positive


def test_boxes_parts_and_ranks_by_hand():
    evaluation = Evaluation(CONCEPTS)
    output, batch = batch_of(4)
    evaluation.update(output, replace(batch, box_B4=torch.tensor([[0.0, 0.0, 0.7, 0.7]]).expand(4, 4)))
    figures = evaluation.compute()
    # The true boxes are the quarters at the top left (p) and at the bottom right (q); a draws the first, b the quarter above q.
    assert figures["box_share_plan"] == pytest.approx(2 / 6)  # a counts in two pictures, b in four
    assert figures["detection_share_plan"] == pytest.approx(4 / 8)
    assert figures["detection_ap_plan"] == pytest.approx(1 / 2)
    assert figures["pcp_plan"] == pytest.approx(1 / 2)  # boxes of half the picture: a's peak is on its point, b's a box away
    assert figures["pcp_centre"] == 0  # the middle overlaps each quarter by a seventh
    assert figures["part_mass_plan"] == pytest.approx((2 * 0.3 / 0.45 + 4 * 0.05 / 0.45) / 6)
    assert figures["part_mass_random"] == pytest.approx(1 / 4)
    assert figures["part_rank_plan"] == pytest.approx(2 / 6)
    assert figures["part_rank_random"] == pytest.approx(1 / 4)
    assert figures["foreground_rank_prior"] == pytest.approx(1 / 2)  # patches 0 and 1 of the object's 0 and 3
    assert figures["foreground_rank_random"] == figures["foreground_mass_random"] == figures["background_share_random"] == 0.5
    assert figures["background_share_prior"] == pytest.approx(1 - figures["foreground_mass_prior"])
    assert figures["pointing_0.1_random"] == pytest.approx(1 / 4)
    assert figures["pointing_distance_random"] == pytest.approx((0 + 2 * 0.5 / 2**0.5 + 0.5) / 4)
    # Without masks the boxes around the key points are the truth: the same quarters here.
    evaluation = Evaluation(CONCEPTS)
    evaluation.update(output, replace(batch, part_masks_BPHW=None, box_B4=torch.tensor([[0.0, 0.0, 0.7, 0.7]]).expand(4, 4)))
    assert evaluation.compute()["box_share_plan"] == pytest.approx(2 / 6)


def test_random_maps_score_what_the_controls_predict():
    g = torch.Generator().manual_seed(0)
    num, grid = 4000, (4, 4)
    theta = torch.rand(num, 16, generator=g)
    masks = (torch.rand(num, 2, 4, 4, generator=g) > 0.6) & torch.tensor([1, 0]).bool()[:, None, None]
    masks[:, 1, 2, 1] = True
    output, batch = batch_of(num)
    plan = torch.rand(num, 16, 2, generator=g)
    evaluation = Evaluation(CONCEPTS)
    evaluation.update(
        replace(output, plan_BNM=plan, theta_BN=theta, evidence_BNM=None, grid=grid),
        replace(batch, part_masks_BPHW=masks, foreground_BHW=masks.any(1), points_BP3=torch.rand(num, 2, 3, generator=g).round(decimals=2)),
    )
    figures = evaluation.compute()
    for name in ("pointing_0.1", "pointing_0.05", "pointing_distance", "part_mass", "part_rank", "foreground_mass", "foreground_rank"):
        for kind in ("plan", "prior"):
            assert figures[f"{name}_{kind}"] == pytest.approx(figures[f"{name}_random"], abs=0.02), (name, kind)


def test_pictures_seen_twice_count_once():
    once, twice = Evaluation(CONCEPTS), Evaluation(CONCEPTS)
    once.update(*batch_of(5))
    twice.update(*batch_of(5))
    twice.update(*batch_of(2))
    assert twice.gather().compute() == once.gather().compute()
    assert twice.compute()["num_pictures"] == 7


def test_without_maps_or_annotations_there_are_no_figures_of_places():
    output, batch = batch_of()
    bare = replace(output, plan_BNM=None, theta_BN=None, evidence_BNM=None, residual_B=None)
    assert concept_maps(bare) == {}
    evaluation = Evaluation(CONCEPTS)
    evaluation.update(bare, batch)
    assert not any("pointing" in name or "mass" in name for name in evaluation.compute())
    evaluation = Evaluation(CONCEPTS)
    evaluation.update(output, replace(batch, points_BP3=None, foreground_BHW=None, part_masks_BPHW=None))
    assert not any("pointing" in name or "mass" in name for name in evaluation.compute())


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no picture to evaluate"):
        Evaluation(CONCEPTS).compute()
