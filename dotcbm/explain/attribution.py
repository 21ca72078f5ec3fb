"""Maps for bottlenecks that have none of their own: gradients turned into places, through captum (extra `attribution`).

    gradcam               max(0, sum_d mean_i(dy/df_id) f_id)   Selvaraju et al., ICCV 2017, at the patch features f
    integrated_gradients  sum_d (f_id - f'_id) mean_t dy/df_id(f' + t (f - f'))   Sundararajan et al., ICML 2017
    lrp                   layer-wise relevance propagation, Bach et al., PLOS ONE 2015; see below

y is a concept's or a class's logit, f' a baseline. Unlike a bottleneck's own evidence these are accounts made afterwards: only
integrated gradients adds up (to y minus the baseline's y, up to the error of the integral, `Attribution.rest_BX`).

What "lrp" is, depends on where it is applied:

- on the patch features: the basic rule, LRP-0. Where the bottleneck has evidence, the relevance of a patch for a concept is its
  evidence: the weights that pool the patches (a transport plan, a softmax) are held constant, as Ali et al. 2022 ("XAI for
  Transformers", ICML) hold attention constant; for a class it is sum_j dy/dlogit_j evidence_ij. Elsewhere it is captum's gradient
  times input, to which LRP-0 is equal in networks of linear and ReLU layers (Ancona et al., ICLR 2018, proposition 1).
- on the picture: captum's `LRP` through the encoder, from the patch features down, where the bottleneck is replaced by its gradient;
  with the gamma rule (0.25, Montavon et al. 2019, "LRP: an overview") in convolutions and the epsilon rule elsewhere. captum follows
  modules, not functions: skip connections, means and normalisations that are no modules of the few kinds it knows would be passed
  wrongly without a word. So the same proposition is the check: with the epsilon rule alone captum's relevance must equal gradient
  times input; where it does not, an error says so. Chains of convolutions, ReLUs and poolings pass it (VGG); networks with skip
  connections or other nonlinearities do not.

B pictures, N patches, D features, X concepts or classes asked for, h w the grid of the patches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from dotcbm.explain.naming import evaluating
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptOutput, PatchFeatures

__all__ = ["Attribution", "Method", "attribute"]

Method = Literal["gradcam", "integrated_gradients", "lrp"]
_GAMMA = 0.25  # Montavon et al. 2019, section 10.2.3
_LRP_ERROR = 1e-3  # of captum's LRP against gradient times input, relative; rounding leaves 1e-6, one skip connection several 0.1
_NO_LRP = (
    "captum's LRP cannot follow this encoder ({}); it knows chains of convolutions, linear layers, ReLUs and poolings that are modules. "
    'Choose method="integrated_gradients", or LRP on the patch features (on="patches")'
)
_ROWS = 64  # path points and pictures that go through a bottleneck at once; more gains nothing on a CPU


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attributions of some logits of a batch.

    Attributes:
        map_BXHW: (B, X, h, w) on the grid of the patches; signed, except for Grad-CAM. On the picture: sums over the pixels of a patch.
        value_BX: (B, X) the logits.
        baseline_BX: (B, X) the logits of the baseline for integrated gradients, else 0.
        rest_BX: (B, X) value - baseline - sum of the map: the error of the integral for integrated gradients, biases for LRP; Grad-CAM
            was never meant to add up.
    """

    map_BXHW: Tensor
    value_BX: Tensor
    baseline_BX: Tensor

    @property
    def rest_BX(self) -> Tensor:
        """See above."""
        return self.value_BX - self.baseline_BX - self.map_BXHW.sum((2, 3))


def attribute(
    model: ConceptModel,
    pictures: Tensor | PatchFeatures,
    *,
    method: Method = "gradcam",
    of: Literal["concept", "class"] = "concept",
    indices: Sequence[int] | None = None,
    on: Literal["patches", "picture"] = "patches",
    baseline: Literal["grey", "zero"] = "grey",
    steps: int = 32,
) -> Attribution:
    """Maps of concept or class logits on the grid of the patches.

    The model's mode, gradients and hooks are as before afterwards, also after an error.

    Args:
        model: Any bottleneck on any encoder.
        pictures: (B, 3, h, w) prepared pictures (`ConceptModel.prepare`), or features of the encoder (from a cache).
        method: See the head of this file.
        of: Whose logits: "concept", or "class" (also for black boxes).
        indices: Which concepts or classes; all of them by default. Each costs a backward pass, with integrated gradients `steps`.
        on: "patches" follows the gradient to the patch features; "picture" further to the pixels, which takes a pass through the
            encoder and back for each index (and step).
        baseline: For integrated gradients: the features of a picture of the mean colour, or zeros. For pictures both are the same,
            the mean colour.
        steps: Points of the integral (Gauss-Legendre).

    Raises:
        ValueError: An unknown method, an index that does not exist, features where pictures are needed, Grad-CAM on the picture, logits
            that do not depend on the patches, concepts of a black box, or a network that captum's LRP cannot follow.
        ModuleNotFoundError: captum is not installed.
    """
    if method not in get_args(Method):
        raise ValueError(f"there is no method {method!r}; choose one of {list(get_args(Method))}")
    count = model.concepts.num_concepts if of == "concept" else model.concepts.num_classes
    columns = list(range(count)) if indices is None else list(indices)
    if wrong := [j for j in columns if not 0 <= j < count]:
        raise ValueError(f"there is no {of} {wrong[0]}; the {count} are numbered from 0")
    if not columns:
        raise ValueError(f"no {of} was asked for; give at least one index, or None for all")
    if of == "concept" and not model.bottleneck.reads_concepts:
        raise ValueError(f'{type(model.bottleneck).__name__} knows no concepts; ask for its classes with of="class"')
    if on == "picture" and isinstance(pictures, PatchFeatures):
        raise ValueError('features hold no pixels; give prepared pictures, or choose on="patches"')
    if on == "picture" and method == "gradcam":
        raise ValueError('Grad-CAM weighs the patch features and has no map of the pixels; choose on="patches" or another method')
    if steps < 1:
        raise ValueError(f"steps is {steps}; the integral needs at least one point")
    _captum()
    # Tensors made under inference_mode cannot take part in a graph, not even as copies.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        if on == "picture":
            assert isinstance(pictures, Tensor)
            return _on_picture(model, pictures.detach().clone(), method=method, of=of, columns=columns, steps=steps)
        if isinstance(pictures, PatchFeatures):
            features = replace(pictures, patch_BND=pictures.patch_BND.detach().clone(), global_BD=pictures.global_BD.detach().clone())
        else:
            with torch.no_grad():
                features = model.encoder(pictures.detach().clone())
        features = features.to(next(model.bottleneck.parameters()).device, model.bottleneck.head.weight.dtype)
        return _on_patches(model, features, method=method, of=of, columns=columns, baseline=baseline, steps=steps)


class _Reader(nn.Module):
    """(B, D, h, w) patch features to (B, K or M) logits; `patches` is the layer that Grad-CAM looks at."""

    def __init__(self, bottleneck: Bottleneck, features: PatchFeatures, *, of: Literal["concept", "class"]) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.patches = nn.Identity()
        self.features = features
        self.of: Literal["concept", "class"] = of
        # Networks without a class token hand on the mean of the patches, which then must move with them.
        mean_BD = features.patch_BND.mean(1)
        self.pooled = mean_BD.shape == features.global_BD.shape and torch.allclose(mean_BD, features.global_BD, atol=1e-3, rtol=1e-2)

    def forward(self, map_BDHW: Tensor, row_B: Tensor) -> Tensor:
        """Logits of features that may be changed; `row_B` says which picture each belongs to."""
        output = self.read(self.patches(map_BDHW).flatten(2).transpose(1, 2), row_B)
        return output.concept_logit_BM if self.of == "concept" else output.class_logit_BK

    def read(self, patch_BND: Tensor, row_B: Tensor) -> ConceptOutput:
        saliency_BN = self.features.saliency_BN
        return self.bottleneck(
            PatchFeatures(
                patch_BND=patch_BND,
                global_BD=patch_BND.mean(1) if self.pooled else self.features.global_BD[row_B],
                grid=self.features.grid,
                saliency_BN=None if saliency_BN is None else saliency_BN[row_B],
            )
        )


def _on_patches(
    model: ConceptModel,
    features: PatchFeatures,
    *,
    method: Method,
    of: Literal["concept", "class"],
    columns: list[int],
    baseline: Literal["grey", "zero"],
    steps: int,
) -> Attribution:
    captum = _captum()
    reader = _Reader(model.bottleneck, features, of=of)
    map_BDHW = features.patch_BND.transpose(1, 2).unflatten(2, features.grid)
    row_B = torch.arange(len(map_BDHW), device=map_BDHW.device)
    value_BX = _checked_value(reader, map_BDHW, row_B)[:, columns]
    baseline_BX = torch.zeros_like(value_BX)
    maps = []
    if method == "gradcam":
        tool = captum.LayerGradCam(reader, reader.patches)
        for j in columns:
            maps.append(tool.attribute(map_BDHW, target=j, additional_forward_args=(row_B,), relu_attributions=True)[:, 0])
    elif method == "integrated_gradients":
        start_BDHW = torch.zeros_like(map_BDHW)
        if baseline == "grey":
            height, width = model.preprocessing.size
            example = next(model.encoder.parameters(), map_BDHW)
            with torch.no_grad():
                empty: PatchFeatures = model.encoder(torch.zeros(1, 3, height, width, device=example.device, dtype=example.dtype))
            start_BDHW = (empty.patch_BND.to(map_BDHW).transpose(1, 2).unflatten(2, features.grid)).expand_as(map_BDHW).contiguous()
        with torch.no_grad():
            baseline_BX = reader(start_BDHW, row_B)[:, columns]
        tool = captum.IntegratedGradients(reader)
        for j in columns:
            maps.append(
                tool.attribute(
                    map_BDHW, start_BDHW, target=j, additional_forward_args=(row_B,), n_steps=steps, internal_batch_size=_rows(row_B)
                ).sum(1)
            )
    else:
        maps = _relevance(reader, map_BDHW, row_B, columns=columns)
    return _attribution(maps, value_BX, baseline_BX)


def _relevance(reader: _Reader, map_BDHW: Tensor, row_B: Tensor, *, columns: list[int]) -> list[Tensor]:
    """LRP-0 on the patch features; see the head of this file."""
    with torch.no_grad():
        output = reader.read(map_BDHW.flatten(2).transpose(1, 2), row_B)
    evidence_BNM = output.evidence_BNM
    if evidence_BNM is None:
        tool, map_BDHW = _captum().InputXGradient(reader), map_BDHW.clone().requires_grad_()
        return [tool.attribute(map_BDHW, target=j, additional_forward_args=(row_B,)).sum(1) for j in columns]
    if reader.of == "concept":
        return [evidence_BNM[..., j].unflatten(1, output.grid) for j in columns]
    logit_BM = output.concept_logit_BM.detach().requires_grad_()
    class_BK = reader.bottleneck.classify(logit_BM, output.context_BX)
    slopes = [torch.autograd.grad(class_BK[:, k].sum(), logit_BM, retain_graph=True)[0] for k in columns]
    return [(evidence_BNM @ slope_BM[..., None])[..., 0].unflatten(1, output.grid) for slope_BM in slopes]


class _Pixels(nn.Module):
    """(B, 3, H, W) pictures to logits."""

    def __init__(self, model: ConceptModel, *, of: Literal["concept", "class"]) -> None:
        super().__init__()
        self.model = model
        self.of: Literal["concept", "class"] = of

    def forward(self, image_B3HW: Tensor) -> Tensor:
        output = self.model(image_B3HW)
        return output.concept_logit_BM if self.of == "concept" else output.class_logit_BK


def _on_picture(
    model: ConceptModel, image_B3HW: Tensor, *, method: Method, of: Literal["concept", "class"], columns: list[int], steps: int
) -> Attribution:
    captum = _captum()
    pixels = _Pixels(model, of=of)
    with torch.no_grad():
        value_BX = pixels(image_B3HW)[:, columns]
    baseline_BX = torch.zeros_like(value_BX)
    if method == "integrated_gradients":
        with torch.no_grad():
            baseline_BX = pixels(torch.zeros_like(image_B3HW))[:, columns]
        tool = captum.IntegratedGradients(pixels)
        # One picture at a time: feature maps of many leave the processor's cache.
        found = [tool.attribute(image_B3HW, target=j, n_steps=steps, internal_batch_size=len(image_B3HW)) for j in columns]
    else:
        found = _lrp(model, image_B3HW, of=of, columns=columns)
    grid = model.bottleneck.problem.grid
    cells = image_B3HW.shape[2] * image_B3HW.shape[3] / (grid[0] * grid[1])
    # The mean over a cell times its pixels is their sum; cells on a seam share its pixels.
    maps = [functional.adaptive_avg_pool2d(pixel_B3HW.sum(1, keepdim=True), grid)[:, 0] * cells for pixel_B3HW in found]
    return _attribution(maps, value_BX, baseline_BX)


class _Chain(nn.Module):
    """(1, 3, H, W) a picture to logits, linear in its patch features with the gradients that the bottleneck has there."""

    def __init__(self, encoder: nn.Module, gradient_XND: Tensor) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)  # captum writes rules and hooks into the modules
        self.readout = nn.Linear(gradient_XND[0].numel(), len(gradient_XND), bias=False)
        self.readout.weight = nn.Parameter(gradient_XND.flatten(1).clone())
        self.to(gradient_XND.dtype)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return self.readout(self.encoder(image_B3HW).patch_BND.flatten(1))

    def set_rules(self, *, gamma: float | None) -> None:
        """captum forgets them after each attribution."""
        from captum.attr._utils import lrp_rules  # captum.attr does not export all of them

        for layer in self.modules():
            if gamma is not None and isinstance(layer, nn.Conv2d):
                object.__setattr__(layer, "rule", lrp_rules.GammaRule(gamma=gamma))
            elif isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.Identity):
                object.__setattr__(layer, "rule", lrp_rules.EpsilonRule())


def _lrp(model: ConceptModel, image_B3HW: Tensor, *, of: Literal["concept", "class"], columns: list[int]) -> list[Tensor]:
    """Relevance of the pixels; refused where captum would follow the network wrongly."""
    captum = _captum()
    with torch.no_grad():
        features = model.encoder(image_B3HW)
    reader = _Reader(model.bottleneck, features, of=of)
    row_B = torch.arange(len(image_B3HW), device=image_B3HW.device)
    map_BDHW = features.patch_BND.transpose(1, 2).unflatten(2, features.grid).requires_grad_()
    _checked_value(reader, map_BDHW, row_B)
    logit_BX = reader(map_BDHW, row_B)[:, columns]
    slopes = [torch.autograd.grad(logit_BX[:, x].sum(), map_BDHW, retain_graph=True)[0] for x in range(len(columns))]
    gradient_BXND = torch.stack([slope.flatten(2).transpose(1, 2) for slope in slopes], 1)
    found = []
    for i, image_3HW in enumerate(image_B3HW):
        # Twice the precision for the check: the rule divides by sums that may be small.
        exact, image = _Chain(model.encoder, gradient_BXND[i].double()).eval(), image_3HW[None].double().requires_grad_()
        exact.set_rules(gamma=None)
        try:
            relevance = captum.LRP(exact).attribute(image, target=0)
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(_NO_LRP.format(str(error).splitlines()[0])) from error
        product = captum.InputXGradient(_Chain(model.encoder, gradient_BXND[i].double()).eval()).attribute(image, target=0)
        relevance, product = relevance.detach(), product.detach()
        error = float((relevance - product).norm() / product.norm().clamp(min=torch.finfo(torch.float64).tiny))
        if not error < _LRP_ERROR:  # NaN as well
            raise ValueError(_NO_LRP.format(f"with the epsilon rule it differs from gradient times input by {error:.0%}"))
        for x in range(len(columns)):
            exact.set_rules(gamma=_GAMMA)
            found.append(captum.LRP(exact).attribute(image, target=x).detach())
    return [torch.cat(found[x :: len(columns)]) for x in range(len(columns))]


def _checked_value(reader: _Reader, map_BDHW: Tensor, row_B: Tensor) -> Tensor:
    """The logits, if they depend on the patches."""
    probe = map_BDHW.detach().clone().requires_grad_()
    value = reader(probe, row_B)
    gradient = torch.autograd.grad(value.sum(), probe, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise ValueError(
            f"the {reader.of} logits of {type(reader.bottleneck).__name__} do not depend on the patch features here (they are read from a "
            'class token, perhaps), so they have no map on them; choose method="integrated_gradients" with on="picture"'
        )
    return value.detach()


def _attribution(maps: Sequence[Tensor], value_BX: Tensor, baseline_BX: Tensor) -> Attribution:
    return Attribution(torch.stack(list(maps), 1).detach().float().cpu(), value_BX.float().cpu(), baseline_BX.detach().float().cpu())


def _rows(row_B: Tensor) -> int:
    return max(_ROWS, len(row_B))  # captum needs room for one step of every picture


def _captum() -> Any:
    try:
        import captum.attr
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("attribution maps need captum; install dotcbm[attribution]") from error
    return captum.attr
