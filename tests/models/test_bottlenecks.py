"""What every bottleneck promises, and what DOT-CBM's departures from the paper rest on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch

from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.dot_product import DotProduct
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import ConceptSet, PatchFeatures, Problem
from dotcbm.transport.cost import cosine_similarity
from dotcbm.transport.sinkhorn import sinkhorn

B, GRID, D, M, K = 3, (4, 5), 16, 6, 4
N = GRID[0] * GRID[1]

BOTTLENECKS: dict[str, Callable[[Problem], Bottleneck]] = {
    "probe": LinearProbe,
    "cbm": CBM,
    "cbm raw": lambda p: CBM(p, scaling="none"),
    "cbm half": lambda p: CBM(p, scaling="half", l2=0.1),
    "cbm logits": lambda p: CBM(p, head_on="logit"),
    "mean": lambda p: DotProduct(p, pooling="mean", dim=8),
    "max": lambda p: DotProduct(p, pooling="max", dim=8),
    "softmax value": lambda p: DotProduct(p, pooling="softmax", readout="value", dim=8),
    "max from the frequency": lambda p: DotProduct(p, pooling="max", dim=8, readout_scale=40.0, readout_bias="frequency"),
    "parts": lambda p: DotCBM(p, num_parts=3, num_clusterings=2, part_width=8),
    "parts balanced": lambda p: DotCBM(p, num_parts=3, num_clusterings=2, relax_patch=None, power=1.0, head_on="probability"),
    "dot": lambda p: PublishedDotCBM(p, dim=8),
    "dot cosine": lambda p: PublishedDotCBM(p, dim=8, readout="cosine", null_concept=0.3),
    "dot figure 2": lambda p: PublishedDotCBM(p, dim=8, null_concept=0.0, concept_prior="figure2"),
    "dot border": lambda p: PublishedDotCBM(p, dim=8, patch_prior="border"),
    "dot paper": lambda p: PublishedDotCBM(p, dim=8, readout="paper", null_concept=0.0, patch_prior="cosine"),
}


def make_problem(*, text: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(0)
    concepts = ConceptSet(
        names=tuple(f"concept {j}" for j in range(M)),
        class_names=tuple(f"class {k}" for k in range(K)),
        class_concept_KM=torch.rand(K, M, generator=generator),
    )
    text_MD = torch.randn(M, 12, generator=generator) if text else None
    return Problem(
        patch_width=D,
        global_width=D,
        grid=GRID,
        concepts=concepts,
        text_MD=text_MD,
        concept_frequency_M=concepts.class_concept_KM.mean(0),
    )


def make_features(seed: int = 0) -> PatchFeatures:
    patch = torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))
    return PatchFeatures(patch_BND=patch, global_BD=patch.mean(1), grid=GRID)


@pytest.fixture(params=list(BOTTLENECKS))
def bottleneck(request: pytest.FixtureRequest) -> Bottleneck:
    torch.manual_seed(0)
    return BOTTLENECKS[request.param](make_problem())


def test_shapes_and_finite_gradients(bottleneck: Bottleneck) -> None:
    bottleneck.train()
    out = bottleneck(make_features())
    assert out.concept_logit_BM.shape == (B, M)
    assert out.class_logit_BK.shape == (B, K)
    assert out.grid == GRID
    loss = out.class_logit_BK.square().mean() + sum(out.losses.values())
    loss.backward()
    for name, parameter in bottleneck.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_evidence_sums_to_the_logit(bottleneck: Bottleneck) -> None:
    bottleneck.eval()
    out, nothing = bottleneck(make_features()), bottleneck(make_features(1))
    if out.evidence_BNM is None or nothing.evidence_BNM is None:
        pytest.skip("this readout is no sum over patches")
    # logit - evidence is the concept's bias: the same for every picture.
    bias = out.concept_logit_BM - out.evidence_BNM.sum(1)
    assert torch.allclose(bias, bias[:1].expand_as(bias), atol=1e-5)
    assert torch.allclose(bias, nothing.concept_logit_BM - nothing.evidence_BNM.sum(1), atol=1e-5)


def test_it_can_be_built_again_from_its_settings(bottleneck: Bottleneck) -> None:
    twin = type(bottleneck)(bottleneck.problem, **bottleneck.settings)
    twin.load_state_dict(bottleneck.state_dict())
    bottleneck.eval()
    twin.eval()
    assert torch.equal(twin(make_features()).class_logit_BK, bottleneck(make_features()).class_logit_BK)


def test_pictures_do_not_depend_on_their_neighbours(bottleneck: Bottleneck) -> None:
    bottleneck.eval()
    features = make_features()
    alone = PatchFeatures(features.patch_BND[1:2], features.global_BD[1:2], GRID)
    assert torch.allclose(bottleneck(alone).class_logit_BK, bottleneck(features).class_logit_BK[1:2], atol=1e-5)


def test_half_precision_features_are_read(bottleneck: Bottleneck) -> None:
    bottleneck.eval()
    full = bottleneck(make_features()).class_logit_BK
    half = bottleneck(make_features().to(dtype=torch.float16)).class_logit_BK
    assert half.dtype == torch.float32
    assert torch.allclose(half, full, atol=2e-2)


def test_the_printed_readout_is_degenerate_whatever_the_picture_shows() -> None:
    torch.manual_seed(0)
    model = BOTTLENECKS["dot paper"](make_problem()).eval()
    out = model(make_features())
    wild = model(PatchFeatures(100 * torch.randn(B, N, D), torch.randn(B, D), GRID))
    assert out.gamma_BM is not None
    top = torch.tensor(1.0).sigmoid()
    bottom = (1 - 2 * out.gamma_BM[0] / N).sigmoid()
    for probability in (out.concept_BM, wild.concept_BM):
        assert (probability <= top + 1e-6).all()
        assert (probability >= bottom - 1e-6).all()


def test_the_printed_readout_at_the_paper_s_size_moves_by_a_hundred_thousandth() -> None:
    mass, patches = 1 / 112, 18 * 18
    low, high = (torch.sigmoid(torch.tensor(1 - bound, dtype=torch.float64)).item() for bound in (2 * mass / patches, 0.0))
    assert round(low, 5) == 0.73105
    assert round(high, 5) == 0.73106


def test_plan_has_the_marginals_it_was_given() -> None:
    torch.manual_seed(0)
    model = PublishedDotCBM(make_problem(), dim=8, null_concept=0.0, eps=0.2, iterations=300).eval()
    out = model(make_features())
    assert out.plan_BNM is not None
    assert out.theta_BN is not None
    assert out.gamma_BM is not None
    assert torch.allclose(out.plan_BNM.sum(2), out.theta_BN, atol=1e-5)
    assert torch.allclose(out.plan_BNM.sum(1), out.gamma_BM, atol=1e-4)
    assert torch.allclose(out.theta_BN.sum(1), torch.ones(B), atol=1e-5)


def test_null_concept_takes_its_share_of_the_mass() -> None:
    out = PublishedDotCBM(make_problem(), dim=8, null_concept=0.4, iterations=300).eval()(make_features())
    assert out.plan_BNM is not None
    assert torch.allclose(out.plan_BNM.sum((1, 2)), torch.full((B,), 0.6), atol=1e-3)


def test_permuting_concepts_permutes_the_plan() -> None:
    torch.manual_seed(0)
    problem = make_problem(text=True)
    model = PublishedDotCBM(problem, dim=8, readout="cosine").eval()
    order = torch.randperm(M)
    assert problem.text_MD is not None
    shuffled = PublishedDotCBM(replace(problem, text_MD=problem.text_MD[order]), dim=8, readout="cosine").eval()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("text_MD")}
    shuffled.load_state_dict(state, strict=False)
    plan, twin = model(make_features()).plan_BNM, shuffled(make_features()).plan_BNM
    assert plan is not None
    assert twin is not None
    assert torch.allclose(plan[..., order], twin, atol=1e-6)


def test_external_saliency_is_where_the_mass_is() -> None:
    features = make_features()
    mask = torch.zeros(B, N)
    mask[:, 7] = 1
    model = PublishedDotCBM(make_problem(), dim=8, patch_prior="external", patch_temperature=0.2).eval()
    out = model(replace(features, saliency_BN=mask))
    assert out.theta_BN is not None
    assert (out.theta_BN.argmax(1) == 7).all()
    with pytest.raises(ValueError, match="external"):
        model(features)


def test_uniform_weights_and_values_are_the_vanilla_cbm() -> None:
    """The claim of `dotcbm.models.readout`: mean pooling with the value readout is the vanilla CBM."""
    problem, features = make_problem(), make_features()
    head = DotProduct(problem, pooling="mean", readout="value", dim=8).eval()
    cbm = CBM(problem, scaling="none").eval()
    with torch.no_grad():
        cbm.concept.weight.copy_(head.readout.value.weight)
        cbm.concept.bias.copy_(head.readout.beta_M)
    assert torch.allclose(cbm(features).concept_logit_BM, head(features).concept_logit_BM, atol=1e-5)


@pytest.mark.parametrize("scaling", ["half", "full"])
def test_the_activation_map_of_scaled_features_is_exact(scaling: Literal["half", "full"]) -> None:
    torch.manual_seed(0)
    cbm = CBM(make_problem(), scaling=scaling)
    for seed in range(5):
        cbm(make_features(seed))  # moves the running statistics away from 0 and 1
    out = cbm.eval()(make_features())
    assert out.evidence_BNM is not None
    assert cbm.norm is not None
    assert torch.allclose(out.evidence_BNM.sum(1) + cbm.concept.bias, out.concept_logit_BM, atol=1e-5)


def test_half_scaling_divides_by_the_root_of_the_deviation() -> None:
    cbm = CBM(make_problem(), scaling="half").eval()
    assert cbm.norm is not None
    deviation_D = torch.linspace(0.5, 3, D)
    cbm.norm.running_var = deviation_D.square()
    cbm.norm.running_mean = torch.full((D,), 0.25)
    features = make_features()
    scaled = (features.patch_BND.mean(1) - 0.25) / (deviation_D * deviation_D.mean()).sqrt()
    assert torch.allclose(cbm(features).concept_logit_BM, cbm.concept(scaled), atol=1e-4)


def test_the_penalty_of_the_concept_weights_is_part_of_the_loss() -> None:
    cbm = CBM(make_problem(), l2=0.3)
    weight_MD = cbm.concept.weight
    assert torch.allclose(cbm.train()(make_features()).losses["l2"], 0.15 * weight_MD.square().sum() / weight_MD.shape[0])
    assert cbm.eval()(make_features()).losses == {}
    for settings in ({"l2": -1.0}, {"scaling": "twice"}):
        with pytest.raises(ValueError, match=r"penalty|choose"):
            CBM(make_problem(), **settings)  # pyright: ignore[reportArgumentType]


def test_every_bottleneck_trains_on_one_picture(bottleneck: Bottleneck) -> None:
    """The last batch of an epoch may hold a single picture."""
    features = make_features()
    one = PatchFeatures(patch_BND=features.patch_BND[:1], global_BD=features.global_BD[:1], grid=GRID)
    out = bottleneck.train()(one)
    assert out.concept_logit_BM.shape[0] == out.class_logit_BK.shape[0] == 1
    assert out.class_logit_BK.isfinite().all()


def test_a_head_on_logits_reads_logits() -> None:
    problem, features = make_problem(), make_features()
    cbm = CBM(problem, head_on="logit").eval()
    out = cbm(features)
    assert torch.allclose(out.class_logit_BK, cbm.head(out.concept_logit_BM))
    assert torch.equal(cbm.head_input(out.concept_logit_BM), out.concept_logit_BM)


def test_linear_probe_reads_the_global_token() -> None:
    problem, features = make_problem(), make_features()
    probe = LinearProbe(problem).eval()
    out = probe(features)
    assert torch.allclose(out.class_logit_BK, probe.head(features.global_BD))
    assert torch.equal(probe.head_input(out.concept_logit_BM, out.context_BX), features.global_BD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"null_concept": 1.0}, "null_concept"),
        ({"null_concept": -0.1}, "null_concept"),
        ({"eps": 0.0}, "eps"),
        ({"iterations": 0}, "iterations"),
        ({"adapter": "identity", "dim": 7}, "identity"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PublishedDotCBM(make_problem(), **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [partial(DotProduct, dim=8), partial(PublishedDotCBM, dim=8)])
def test_readouts_start_at_the_frequency_of_the_concepts_where_they_are_told_to(make: Callable[..., Bottleneck]) -> None:
    problem = make_problem()
    frequency_M = problem.concept_frequency_M
    assert frequency_M is not None
    told = make(problem, readout="cosine", readout_scale=40.0, readout_bias="frequency")
    beta_M, alpha_M = told.get_parameter("readout.beta_M"), told.get_parameter("readout.raw_alpha_M")
    torch.testing.assert_close(beta_M.sigmoid(), frequency_M.clamp(0.01, 0.99))
    torch.testing.assert_close(torch.nn.functional.softplus(alpha_M), torch.full((M,), 40.0))
    assert not make(problem, readout="cosine").get_parameter("readout.beta_M").any()
    unknown = make(replace(problem, concept_frequency_M=None), readout="cosine", readout_bias="frequency")
    assert not unknown.get_parameter("readout.beta_M").any()


@pytest.mark.parametrize(
    ("settings", "said"), [({"readout_scale": 0.0}, "readout_scale must be positive"), ({"readout_bias": "mean"}, "readout_bias is 'mean'")]
)
def test_starts_of_a_readout_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DotProduct(make_problem(), **settings)


@pytest.mark.parametrize("pooling", ["max", "softmax"])
def test_pooling_weights_are_the_plan_of_a_transport_that_leaves_the_patches_free(pooling: Literal["max", "softmax"]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        bottleneck = DotProduct(make_problem(), pooling=pooling, dim=8).eval()
    features = make_features()
    output = bottleneck(features)
    assert output.plan_BNM is not None
    torch.testing.assert_close(output.plan_BNM.sum(1), torch.full((B, M), 1 / M))
    cosine = cosine_similarity(bottleneck.patch_adapter(features.patch_BND), bottleneck.concept())
    if pooling == "max":
        assert torch.equal(output.plan_BNM.argmax(1), cosine.argmax(1))  # where it looked, also where that speaks against the concept
    if pooling == "softmax":
        free = sinkhorn(1 - cosine, torch.full((N,), 1 / N), torch.full((M,), 1 / M), eps=0.05, relax_patch=1e-6, max_iter=50)
        torch.testing.assert_close(output.plan_BNM, free.plan_BNM, atol=1e-5, rtol=1e-3)
    assert bottleneck.train()(features).plan_BNM is None


def test_the_mean_over_patches_looks_nowhere_and_its_map_is_the_evidence() -> None:
    output = DotProduct(make_problem(), pooling="mean", dim=8).eval()(make_features())
    assert output.plan_BNM is None  # equal weights would point at the first patch
    assert output.gamma_BM is None
    assert output.evidence_BNM is not None
    assert (output.evidence_BNM.std(1) > 0).all()


@pytest.mark.parametrize("name", ["cbm", "cbm logits", "dot", "max", "probe"])
def test_concepts_in_half_precision_are_classified_again(name: str) -> None:
    bottleneck = BOTTLENECKS[name](make_problem()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = bottleneck(make_features())
    again = bottleneck.classify(output.concept_logit_BM.to(torch.bfloat16), output.context_BX)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, output.class_logit_BK.float(), atol=0.05, rtol=0.05)
