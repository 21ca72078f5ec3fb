"""Attributions against closed forms, captum's own classes and completeness; and the model is as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from captum.attr import LRP, InputXGradient
from torch import Tensor, nn

from dotcbm.explain.attribution import attribute
from dotcbm.explain.explanation import explain
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import ConceptOutput, PatchFeatures, Preprocessing, Problem

Build = Callable[..., ConceptModel]


class Chain(nn.Module):
    """Convolutions and ReLUs that captum's LRP can follow; with `skip` a connection that it cannot."""

    name, grid, width, global_width = "chain", (4, 4), 6, 6

    def __init__(self, *, skip: bool = False, token: bool = False) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        self.skip, self.token = skip, token
        self.first, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.pool, self.second, self.last = nn.MaxPool2d(4), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()

    def forward(self, image_B3HW: Tensor) -> PatchFeatures:
        low = self.pool(self.relu(self.first(image_B3HW)))
        high = self.last(self.second(low))
        patch_BND = (high + low if self.skip else high).flatten(2).transpose(1, 2)
        return PatchFeatures(patch_BND, image_B3HW.flatten(1)[:, :6] if self.token else patch_BND.mean(1), self.grid)

    def fingerprint(self) -> str:
        return "chain"


class Plain(CBM):
    """A CBM whose pooled features are not standardised: linear in the patches, without a bias of the scaling."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, scaling="none")


def chained(problem: Problem, kind: type[Bottleneck] = Plain, *, skip: bool = False, token: bool = False) -> ConceptModel:
    torch.manual_seed(3)
    return ConceptModel(Chain(skip=skip, token=token), kind(problem)).eval()  # pyright: ignore


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_integrated_gradients_of_a_linear_model_are_weight_times_input(problem: Problem, pictures: Tensor) -> None:
    model = chained(problem)
    features = model.encoder(pictures)
    found = attribute(model, features, method="integrated_gradients", baseline="zero", steps=3)
    weight_MD = model.bottleneck.concept.weight.detach()  # pyright: ignore
    expected = (features.patch_BND.detach() @ weight_MD.T / 16).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(found.map_BXHW, expected, atol=1e-5, rtol=1e-4)
    bias = model.bottleneck.concept.bias.detach()  # pyright: ignore
    torch.testing.assert_close(found.baseline_BX, bias.expand(2, -1), atol=1e-5, rtol=1e-4)
    assert float(found.rest_BX.abs().max()) < 1e-5


@pytest.mark.parametrize("of", ["concept", "class"])
@pytest.mark.parametrize("kind", [CBM, PublishedDotCBM])
def test_integrated_gradients_are_complete(build: Build, kind: type[Bottleneck], of: str, picture: Tensor) -> None:
    model = build(kind).eval()
    image = model.prepare([picture])
    found = attribute(model, image, method="integrated_gradients", of=of, steps=100)  # pyright: ignore
    empty = model(torch.zeros_like(image))
    baseline = empty.concept_logit_BM if of == "concept" else empty.class_logit_BK
    torch.testing.assert_close(found.baseline_BX, baseline.detach())
    assert float(found.rest_BX.abs().max()) < 0.02 * float((found.value_BX - found.baseline_BX).abs().max()) + 1e-4
    on_picture = attribute(build(CBM), image, method="integrated_gradients", on="picture", steps=64)
    assert on_picture.map_BXHW.shape == (1, 6, 4, 4)
    assert float(on_picture.rest_BX.abs().max()) < 1e-3


def test_gradcam_by_hand(problem: Problem, pictures: Tensor, doubled: type[Bottleneck]) -> None:
    model = chained(problem, doubled)
    patch_BND = model.encoder(pictures).patch_BND.detach().requires_grad_()
    output: ConceptOutput = model.bottleneck(PatchFeatures(patch_BND, patch_BND.mean(1), (4, 4)))
    found = {of: attribute(model, pictures, of=of) for of in ("concept", "class")}
    for of, logit in (("concept", output.concept_logit_BM), ("class", output.class_logit_BK)):
        for j in range(logit.shape[1]):
            (gradient,) = torch.autograd.grad(logit[:, j].sum(), patch_BND, retain_graph=True)
            expected = (gradient.mean(1, keepdim=True) * patch_BND).sum(2).clamp(min=0).detach().unflatten(1, (4, 4))
            torch.testing.assert_close(found[of].map_BXHW[:, j], expected, atol=1e-6, rtol=1e-4)
    assert float(found["class"].map_BXHW.max()) > 0


@pytest.mark.parametrize("kind", [CBM, PublishedDotCBM])
def test_lrp_on_the_patches_is_the_evidence_where_there_is_any(build: Build, kind: type[Bottleneck], picture: Tensor) -> None:
    model = build(kind).eval()
    image = model.prepare([picture])
    output = model(image)
    assert output.evidence_BNM is not None
    found = attribute(model, image, method="lrp")
    torch.testing.assert_close(found.map_BXHW.flatten(2).transpose(1, 2), output.evidence_BNM.detach())
    of_class = attribute(model, image, method="lrp", of="class", indices=[2])
    p = output.concept_BM
    slope_M = (model.bottleneck.head.weight[2] * p * (1 - p))[0]
    torch.testing.assert_close(of_class.map_BXHW[0, 0].flatten(), (output.evidence_BNM[0] @ slope_M).detach(), atol=1e-5, rtol=1e-4)


def test_lrp_on_the_patches_is_gradient_times_input_elsewhere(problem: Problem, pictures: Tensor, doubled: type[Bottleneck]) -> None:
    model = chained(problem, doubled)
    patch_BND = model.encoder(pictures).patch_BND.detach()
    weight_MD = model.bottleneck.concept.weight.detach()  # pyright: ignore
    expected = (patch_BND @ weight_MD.T / 16).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(attribute(model, pictures, method="lrp").map_BXHW, expected, atol=1e-6, rtol=1e-4)


def test_lrp_on_the_picture_is_captums_on_the_chain(problem: Problem, pictures: Tensor) -> None:
    """The whole network as one Sequential, which captum can follow by itself: the mean of the patches is a pooling module."""
    from captum.attr._utils.lrp_rules import GammaRule

    model = chained(problem)
    encoder, reader = model.encoder, nn.Linear(6 * 16, 6)
    with torch.no_grad():
        weight_MD = model.bottleneck.concept.weight  # pyright: ignore
        reader.weight.copy_((weight_MD[:, :, None] / 16).expand(-1, -1, 16).flatten(1))  # pyright: ignore
        reader.bias.zero_()
    parts = [encoder.first, encoder.relu, encoder.pool, encoder.second, encoder.last]  # pyright: ignore

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.reader = nn.Sequential(*parts), reader

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(self.parts(x).flatten(1))

    found = attribute(model, pictures, method="lrp", on="picture", indices=[1, 4])
    whole = Whole().double()
    for i, j in enumerate((1, 4)):
        encoder.first.rule, encoder.second.rule = GammaRule(0.25), GammaRule(0.25)  # pyright: ignore
        expected = LRP(whole).attribute(pictures.double().requires_grad_(), target=j).sum(1).unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4))
        torch.testing.assert_close(found.map_BXHW[:, i], expected.detach().float(), atol=1e-5, rtol=1e-3)
    # With gamma the relevance differs from gradient times input, else the rule would do nothing.
    plain = InputXGradient(whole).attribute(pictures.double().requires_grad_(), target=4).sum(1).unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4))
    assert float((plain - expected).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("kind", [Plain, PublishedDotCBM])
def test_lrp_refuses_what_captum_would_follow_wrongly(problem: Problem, pictures: Tensor, kind: type[Bottleneck]) -> None:
    with pytest.raises(ValueError, match=r"cannot follow this encoder .with the epsilon rule it differs.*integrated_gradients"):
        attribute(chained(problem, kind, skip=True), pictures, method="lrp", on="picture")
    model = chained(problem, kind)
    model.encoder.relu = nn.SiLU()  # pyright: ignore
    with pytest.raises(ValueError, match=r"cannot follow this encoder .*SiLU.*on=\"patches\""):
        attribute(model, pictures, method="lrp", on="picture")


def state(model: nn.Module) -> tuple[object, ...]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), hasattr(m, "rule")) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    gradients = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return hooks, modes, gradients, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", ["gradcam", "integrated_gradients", "lrp"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was_also_after_an_error(
    problem: Problem, pictures: Tensor, method: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chained(problem).train()
    model.bottleneck.head.eval()
    before = state(model)
    on = "patches" if method == "gradcam" else "picture"
    if fails:
        calls, whole = [], model.bottleneck.classify
        # Inside captum, with its hooks in place; captum's LRP only ever sees a copy of the encoder.
        last = {"gradcam": 2, "integrated_gradients": 3, "lrp": 2}[method]

        def broken(*given: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == last:
                raise KeyError("broken")
            return whole(*given)

        monkeypatch.setattr(model.bottleneck, "classify", broken)
        with pytest.raises(KeyError):
            attribute(model, pictures, method=method, of="class", on=on)  # pyright: ignore
        monkeypatch.undo()
    else:
        with torch.no_grad():
            attribute(model, pictures, method=method, of="class", on=on, steps=2)  # pyright: ignore
        assert not torch.is_inference_mode_enabled()
    after = state(model)
    assert before[:3] == after[:3]
    assert all(torch.equal(value, after[3][name]) for name, value in before[3].items())  # pyright: ignore


def test_it_works_under_inference_mode_and_from_cached_half_precision(build: Build, picture: Tensor) -> None:
    model = build(PublishedDotCBM).eval()
    image = model.prepare([picture])
    expected = attribute(model, image).map_BXHW
    with torch.inference_mode():
        features = model.encoder(model.prepare([picture]))
        torch.testing.assert_close(attribute(model, features).map_BXHW, expected)
    half = attribute(model, model.encoder(image).to(dtype=torch.float16)).map_BXHW
    torch.testing.assert_close(half, expected, atol=2e-2 * float(expected.max()), rtol=0.05)


def test_a_bottleneck_without_maps_is_explained_by_gradcam_and_others_on_demand(
    build: Build, doubled: type[Bottleneck], picture: Tensor
) -> None:
    model = build(doubled)
    found = explain(model, picture)
    assert found.view == "gradcam"
    torch.testing.assert_close(found.heatmaps_MHW, attribute(model, model.prepare([picture])).map_BXHW[0])
    for view in ("integrated_gradients", "lrp"):
        other = explain(build(PublishedDotCBM), picture, view=view)
        assert (other.view, other.heatmaps_MHW.shape) == (view, (6, 4, 4))
        assert float(other.heatmaps_MHW.min()) == 0


def test_a_black_box_has_maps_of_its_classes(build: Build, problem: Problem, picture: Tensor, pictures: Tensor) -> None:
    model = build(LinearProbe)
    image = model.prepare([picture])
    found = attribute(model, image, of="class")
    patch_ND = model.encoder(image).patch_BND[0]
    weight_KD = model.bottleneck.head.weight.detach()
    torch.testing.assert_close(found.map_BXHW[0].flatten(1), (weight_KD / 16 @ patch_ND.T).clamp(min=0), atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"LinearProbe knows no concepts; ask for its classes with of=\"class\""):
        attribute(model, image)
    with pytest.raises(ValueError, match=r"class logits of LinearProbe do not depend on the patch features.*on=\"picture\""):
        attribute(chained(problem, LinearProbe, token=True), pictures, of="class")
    seen = attribute(chained(problem, LinearProbe, token=True), pictures, of="class", method="integrated_gradients", on="picture")
    assert float(seen.rest_BX.abs().max()) < 1e-5
    assert float(seen.map_BXHW[..., 1:, :].abs().max()) == 0  # the token is read from the first row of pixels


def test_bad_questions(build: Build, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CBM)
    image = model.prepare([picture])
    features = model.encoder(image)
    for arguments, said in (
        ({"method": "smoothgrad"}, "no method 'smoothgrad'"),
        ({"indices": [6]}, "no concept 6; the 6 are numbered"),
        ({"indices": []}, "at least one index"),
        ({"on": "picture"}, "has no map of the pixels"),
        ({"method": "integrated_gradients", "steps": 0}, "at least one point"),
    ):
        with pytest.raises(ValueError, match=said):
            attribute(model, image, **arguments)
    with pytest.raises(ValueError, match="features hold no pixels"):
        attribute(model, features, method="lrp", on="picture")
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ModuleNotFoundError, match=r"dotcbm\[attribution\]"):
        attribute(model, image)
