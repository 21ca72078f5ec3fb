"""DOT-CBM: concepts read from the patches that optimal transport sends to their part of the object.

After Xie et al., "Discovering Fine-Grained Visual-Concept Relations by Disentangled Optimal Transport Concept Bottleneck Models",
CVPR 2025 (arXiv 2505.07209). Patches are transported onto *parts*, and concepts read what arrived at the part that they speak of:

    theta_i   ~ sigmoid((saliency_i - core) / edge)          patch prior: norms of the features, averaged over 3 x 3 patches
    plan_ic   = transport of theta onto C parts at the cost 1 - cos(patch_i, part_c), entropy eps, and every part the same mass
    found_ig  = sum_c share_gc C plan_ic                     where a group of concepts ("bill shape") is found; sums to 1 over the patches
    seen_ij   = found_ig(j), or ~ sqrt(theta_i found_ig(j)) exp(patch_i . query_j), where concept j learns its query
    x_jd      = sum_i seen_ij a_id f_id / sum_i seen_ij a_id, a_id = |f_id|^(p-1) + a floor
    logit_j   = w_j . (x_j - mean_j) / scale_j + b_j

The parts are found before the training, without part labels (`dotcbm.models.parts`). Queries are learned for concepts that vary within
classes, the labels of single pictures: such a label is explained best by what the picture shows at the right place. The label of a
class is explained by anything that tells the class, anywhere; its concepts look where their group is found. x weighs a channel by
where it is active (a Lehmer mean); details, the encoder's early features, have their plain mean beside it. The logit is a sum over
patches and channels, so what a patch adds to it is exact.

Departures from the paper, each with its reason; the rows are those of configs/studies/winning.yaml and
winning_ablation.yaml, the figures there are in reports/winning.md. `PublishedDotCBM` is the printed form.

1. Parts between patches and concepts, in place of a column for each concept. Class-level labels say of each concept only in which
   pictures it is, and any place on the object serves to tell classes: no head trained on them
   pointed more than three points above the one map of feature norms. Rows
   "DOT-CBM, patches to concepts", "all parts alike".
2. The prior is the core of the smoothed norm. The longest feature lies at the object's rim as often as inside; the mean over neighbours
   does not. A softmax of it sent all concepts to one spot before the parts were asked; the core is even. How far it reaches is chosen
   on the training pictures (`dotcbm.models.object_core`): a cut that suits birds left a drawn creature's parts out. Rows "prior not
   smoothed", "core from 0" to "core from 0.9", "soft core".
3. The patches' side of the transport is free by default (`relax_patch` 0): theta is then a reference measure, a part may find its
   place where others find theirs, and the plan is known in closed form. None is the paper's balanced plan, a positive number the KL
   penalty between the two. Rows "balanced", "relaxed".
4. Readout: a linear value on what the encoder says of the part, weighted by activity, early and late. The printed score cannot leave
   sigmoid(1) (see `dotcbm.models.readout`). The last features of any patch on the object know its class and, behind it, where such
   objects live; early ones know what the patch shows. Rows "mean within the part", "without details".
5. No adapters, no concept embeddings, no orthogonality losses: nothing is left for them to do. Row "DOT-CBM, patches to concepts" has them.
6. The class head reads logits where places are found: they carry what labels of classes do not say. Where most places are learned, the
   labels are of single pictures and the head reads probabilities, as printed. Rows "head on probabilities" (birds) and "DOT-CBM, head
   on logits" (strengths.yaml, blood_cells.yaml).
7. gamma is uniform over the parts; equations 17 and 18 are about concepts.
8. A concept that varies within classes learns its place: patches to concepts, as printed, but from a start that knows the parts, in a
   prior as wide as it goes, and with labels that say something of places. Row "DOT-CBM, found places only" of strengths.yaml and
   blood_cells.yaml; on birds, whose labels are of classes, row "places learned".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.models.object_core import CORES
from dotcbm.models.parts import Parts, group_shares, part_plan, within_class_share
from dotcbm.models.readout import frequency_logit
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem
from dotcbm.transport.priors import core_prior

__all__ = ["SEARCH_TRAVEL", "DotCBM", "HeadOn", "LearnPlaces"]

HeadOn = Literal["auto", "probability", "logit"]
LearnPlaces = Literal["varying", "all", "none"]
_VARIES = 0.05  # share of the variance within classes from which on a place is learned; less is noise of labelling
SEARCH_TRAVEL = 8.0  # how far the steps of a whole training may take a query; the rate of learning follows from their number
_SILENT = 0.1  # of a typical activity: what a patch weighs in a Lehmer mean in which the channel is silent


class DotCBM(Bottleneck):
    """Patches to found parts, from there to concepts, concepts to classes."""

    centre_D: Tensor
    basis_DE: Tensor
    part_CE: Tensor
    activity: Tensor
    share_GC: Tensor
    mean_GX: Tensor
    scale_GX: Tensor
    group_M: Tensor
    learned_M: Tensor
    core_at: Tensor
    found: Tensor

    def __init__(
        self,
        problem: Problem,
        *,
        num_parts: int = 12,
        num_clusterings: int = 8,
        part_width: int = 64,
        scored: bool = True,
        core: float | None = None,
        core_tolerance: float = 0.03,
        softness: float = 1 / 6,
        patch_smoothing: int = 3,
        eps: float = 0.1,
        relax_patch: float | None = 0.0,
        iterations: int = 50,
        power: float = 2.0,
        read_details: bool = True,
        learn_places: LearnPlaces = "varying",
        l2: float = 0.2,
        head_on: HeadOn = "auto",
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        num_parts: Parts of one clustering of the patches.
        num_clusterings: Clusterings, whose parts stand side by side: C = num_parts * num_clusterings. One alone is a matter of luck.
        scored: Give each group of concepts the parts that predict it; else all of them alike, as a control.
        part_width: Width E of the space in which patches and parts are compared; at most the encoder's.
        core: Where the core of what stands out begins (`dotcbm.transport.priors.core_prior`); lower, and the maps reach further to
            the rim and over it. None for the core that suits the training pictures (`dotcbm.models.object_core`); where places are
            learned, for the widest.
        core_tolerance: By how much the AUROC of what is predicted within the chosen core may be below that of the best; without effect
            where core is given. Smaller takes wider cores: surer concepts, more of the maps on the background.
        softness: Of the core's edge, as a share of what lies above it, 1 - core: a wide core has a soft edge.
        patch_smoothing: Side, odd, of the square of patches over which the saliency is averaged; 1 for no averaging.
        eps: Entropy of the plan, on costs in [0, 2]; smaller tells parts apart more sharply.
        relax_patch: Strength of the KL term that holds the plan's patch marginal to theta: 0 leaves it free, None makes it exact.
        iterations: Sinkhorn passes; without effect where relax_patch is 0.
        power: Of the Lehmer mean; 1 is the plain mean over the part.
        read_details: Read the details beside the features, where the encoder gives them. Parts are found by them in any case.
        learn_places: Whose places are learned in training, from where the group's parts are: of concepts that vary within classes, of
            all, or of none.
        l2: Strength of the penalty l2 / 2 times the mean over concepts of the squared norm of their weights.
        head_on: What the class head reads. Logits carry more than the concepts' presence, probabilities leak less. "auto" takes
            probabilities where most concepts learn their places, else logits.

        Raises:
            ValueError: A setting out of range.
        """
        super().__init__(
            problem,
            settings={
                "num_parts": num_parts,
                "num_clusterings": num_clusterings,
                "part_width": part_width,
                "scored": scored,
                "core": core,
                "core_tolerance": core_tolerance,
                "softness": softness,
                "patch_smoothing": patch_smoothing,
                "eps": eps,
                "relax_patch": relax_patch,
                "iterations": iterations,
                "power": power,
                "read_details": read_details,
                "learn_places": learn_places,
                "l2": l2,
                "head_on": head_on,
            },
        )
        for name, value in (("num_parts", num_parts), ("num_clusterings", num_clusterings), ("part_width", part_width)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if power < 1:
            raise ValueError(f"power is {power}; below 1 the mean would dwell on the patches in which a channel is silent")
        if core is not None and not core < 1:
            raise ValueError(f"core is {core}; at 1 and above no patch belongs to it")
        if not softness > 0:
            raise ValueError(f"softness is {softness}; it must be positive")
        if core_tolerance < 0:
            raise ValueError(f"core_tolerance is {core_tolerance}; no core predicts better than the best")
        if l2 < 0:
            raise ValueError(f"l2 is {l2}; a penalty is not negative")
        for name, value, known in (("head_on", head_on, HeadOn), ("learn_places", learn_places, LearnPlaces)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}; choose one of {list(get_args(known))}")
        self.num_parts, self.num_clusterings, self.scored = num_parts, num_clusterings, scored
        self.core, self.core_tolerance, self.softness, self.patch_smoothing = core, core_tolerance, softness, patch_smoothing
        self.eps, self.relax_patch, self.iterations = eps, relax_patch, iterations
        self.power, self.l2 = power, l2
        self.head_on: HeadOn = head_on
        self.learn_places: LearnPlaces = learn_places
        num_concepts, width = problem.concepts.num_concepts, problem.patch_width
        num_all, part_width = num_parts * num_clusterings, min(part_width, width)
        group_M = problem.concepts.group_index_M()
        num_groups = int(group_M.max()) + 1
        self.register_buffer("group_M", group_M)
        self.register_buffer("centre_D", torch.zeros(width))
        self.register_buffer("basis_DE", torch.eye(width, part_width))
        self.register_buffer("part_CE", torch.zeros(num_all, part_width))
        self.register_buffer("activity", torch.tensor(1.0))
        self.register_buffer("core_at", torch.tensor(CORES[0] if core is None else core))
        self.register_buffer("share_GC", torch.full((num_groups, num_all), 1 / num_all))
        self.detail_width = problem.detail_width if read_details else 0
        num_read = width + self.detail_width
        self.register_buffer("mean_GX", torch.zeros(num_groups, num_read))
        self.register_buffer("scale_GX", torch.ones(num_groups, num_read))
        self.register_buffer("found", torch.tensor(False))
        self.register_buffer("learned_M", torch.zeros(num_concepts, dtype=torch.bool))
        self.query_ME = nn.Parameter(torch.zeros(num_concepts, part_width), requires_grad=False)
        self.concept = nn.Linear(num_read, num_concepts)
        nn.init.zeros_(self.concept.weight)  # a convex problem: nothing is gained by chance
        with torch.no_grad():
            self.concept.bias.copy_(frequency_logit(problem))
        self.head = nn.Linear(num_concepts, problem.concepts.num_classes)

    @torch.no_grad()
    def set_parts(self, parts: Parts, *, core: float | None = None) -> None:
        """Look for these parts from now on, within this core if it is given. Call `set_scale` next: what the weights read has changed.

        Raises:
            ValueError: Parts of another encoder, of other settings, or of other groups of concepts.
        """
        for name in ("centre_D", "basis_DE", "part_CE", "activity"):
            own, value = getattr(self, name), getattr(parts, name)
            if own.shape != value.shape:
                raise ValueError(f"the parts' {name} has shape {tuple(value.shape)}; this bottleneck needs {tuple(own.shape)}")
            own.copy_(value)
        score_GC = parts.score_GC if self.scored else torch.zeros_like(parts.score_GC)
        share_GC = group_shares(score_GC, num_clusterings=self.num_clusterings)
        if share_GC.shape != self.share_GC.shape:
            raise ValueError(f"the parts serve {len(share_GC)} groups of concepts; there are {len(self.share_GC)}")
        self.share_GC.copy_(share_GC)
        if core is not None:
            self.core_at.fill_(core)
        self.found.fill_(True)

    @torch.no_grad()
    def set_learned(self, concept_nM: Tensor, label_n: Tensor) -> None:
        """Choose the concepts whose places are learned, before the training.

        Args:
            concept_nM: Of the training pictures, in [0, 1], NaN where unknown.
            label_n: Their classes.
        """
        if self.learn_places == "varying":
            self.learned_M.copy_(within_class_share(concept_nM, label_n) >= _VARIES)
        else:
            self.learned_M.fill_(self.learn_places == "all")
        self.query_ME.requires_grad_(self.learns)

    @property
    def learns(self) -> bool:
        """Whether the place of any concept is learned."""
        return bool(self.learned_M.any())

    @torch.no_grad()
    def set_scale(self, read_nGX: Tensor) -> None:
        """Take mean and deviation of what each group reads of the training pictures (`read`).

        Features are divided by the root of their deviation, in units of its mean over the patch features or over the details, so that
        the penalty trusts those that hardly vary less than others.
        """
        self.mean_GX.copy_(read_nGX.mean(0))
        width = self.problem.patch_width
        for block in (slice(width), slice(width, None)) if self.detail_width else (slice(width),):
            deviation_GX = read_nGX[..., block].std(0, correction=0)
            typical_G1 = deviation_GX.mean(1, keepdim=True).clamp(min=1e-6)
            self.scale_GX[:, block] = (deviation_GX.clamp(min=1e-3 * typical_G1) * typical_G1).sqrt()

    def prior(self, features: PatchFeatures) -> Tensor:
        """(B, N) theta."""
        return core_prior(features, core=self.core_at, softness=self.softness, smoothing=self.patch_smoothing)

    def find(self, patch_BND: Tensor, theta_BN: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, G) where each group of concepts is found, columns summing to 1, and (B,) the residual of the transport.

        Args:
            patch_BND: The encoder's patches.
            theta_BN: (B, N) sums to 1.
        """
        return self._find(self._embedded(patch_BND), theta_BN)

    def look(self, patch_BND: Tensor, theta_BN: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, M) where each concept looks, columns summing to 1, and (B,) the residual of the transport; see `find`.

        A concept that learns its place starts half way, in logs, from the prior to where its group is found: a sharp start is hard to
        leave. From there it is transport at the cost -patch . query with a free patch marginal, a softmax.
        """
        embedded_BNE = self._embedded(patch_BND)
        found_BNG, residual_B = self._find(embedded_BNE, theta_BN)
        tiny, learned_M = torch.finfo(found_BNG.dtype).tiny, self.learned_M.to(found_BNG.dtype)
        found_BNM, theta_BN1 = found_BNG.clamp(min=tiny).log()[:, :, self.group_M], theta_BN.clamp(min=tiny).log()[:, :, None]
        gain_BNM = F.normalize(embedded_BNE, dim=2) @ self.query_ME.T
        return (found_BNM + learned_M * ((theta_BN1 - found_BNM) / 2 + gain_BNM)).softmax(1), residual_B

    def _find(self, embedded_BNE: Tensor, theta_BN: Tensor) -> tuple[Tensor, Tensor]:
        plan_BNC, residual_B = part_plan(
            embedded_BNE, self.part_CE, theta_BN, eps=self.eps, relax_patch=self.relax_patch, iterations=self.iterations
        )
        return plan_BNC @ self.share_GC.T, residual_B

    def _embedded(self, patch_BND: Tensor) -> Tensor:
        return (patch_BND - self.centre_D) @ self.basis_DE

    def read(self, features: PatchFeatures, seen_BNR: Tensor) -> Tensor:
        """(B, R, X) what R groups or concepts read of the patches that they look at: the Lehmer means of the D features, and the means of
        the L details (X = D + L).
        """
        features, look_BRN = self._wanted(features), seen_BNR.transpose(1, 2)
        active_BND = self._active(features.patch_BND)
        lehmer_BRD = look_BRN @ (active_BND * features.patch_BND) / (look_BRN @ active_BND)
        return lehmer_BRD if features.detail_BNL is None else torch.cat([lehmer_BRD, look_BRN @ features.detail_BNL], 2)

    def _active(self, patch_BND: Tensor) -> Tensor:
        """(B, N, D) weights of a Lehmer mean. None is near 0: where a channel is silent in all of a part, its mean would else be that of
        whatever patch it speaks in, however little of the plan is there.
        """
        return patch_BND.abs() ** (self.power - 1) + (_SILENT * self.activity) ** (self.power - 1)

    @property
    def condense(self) -> Callable[[PatchFeatures], PatchFeatures] | None:
        """See `Bottleneck.condense`: what the groups read, where it is fewer numbers than the patches. Where no place is learned, nothing
        of it is, once the parts are found.
        """
        problem = self.problem
        num_numbers = problem.grid[0] * problem.grid[1] * (problem.patch_width + problem.detail_width)
        return self._condensed if self.mean_GX.numel() < num_numbers and not self.learns else None

    def _condensed(self, features: PatchFeatures) -> PatchFeatures:
        features = features.to(self.part_CE.device, self.part_CE.dtype)
        found_BNG, _ = self.find(features.patch_BND, self.prior(features))
        read_BGX = (self.read(features, found_BNG) - self.mean_GX) / self.scale_GX
        return PatchFeatures(features.patch_BND[:, :0].half(), features.global_BD.half(), grid=(0, 0), read_BGX=read_BGX.half())

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`; of condensed features without maps."""
        if features.read_BGX is None:
            return self.transported(features, self.prior(features))
        logit_BM = self._logits(features.read_BGX.to(self.head.weight.dtype)[:, self.group_M])
        return ConceptOutput(logit_BM, self.classify(logit_BM), grid=features.grid, losses=self._penalty())

    def transported(self, features: PatchFeatures, theta_BN: Tensor) -> ConceptOutput:
        """`forward` with a patch prior from outside.

        Args:
            features: See `Bottleneck.forward`.
            theta_BN: (B, N) sums to 1.
        """
        features = self._wanted(features)
        theta_BN = theta_BN.to(features.patch_BND.dtype)
        seen_BNM, residual_B = self.look(features.patch_BND, theta_BN)
        mean_MX, scale_MX = self.mean_GX[self.group_M], self.scale_GX[self.group_M]
        logit_BM = self._logits((self.read(features, seen_BNM) - mean_MX) / scale_MX)
        num_concepts = seen_BNM.shape[2]
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=None if self.training else self._evidence(features, seen_BNM),
            plan_BNM=seen_BNM / num_concepts,
            theta_BN=theta_BN,
            gamma_BM=torch.full_like(logit_BM, 1 / num_concepts),
            residual_B=residual_B,
            losses=self._penalty(),
        )

    def _logits(self, scaled_BMX: Tensor) -> Tensor:
        """(B, M)."""
        return (scaled_BMX * self.concept.weight).sum(2) + self.concept.bias

    def _penalty(self) -> dict[str, Tensor]:
        return {"l2": self.l2 / 2 * self.concept.weight.square().sum(1).mean()} if self.training and self.l2 else {}

    def _wanted(self, features: PatchFeatures) -> PatchFeatures:
        """In the precision of the weights, with the details that the bottleneck was built for."""
        if not self.detail_width:
            features = replace(features, detail_BNL=None)
        elif features.detail_BNL is None or features.detail_BNL.shape[2] != self.detail_width:
            raise ValueError(f"the bottleneck reads {self.detail_width} details of each patch; the features hold none or others")
        return features.to(dtype=self.head.weight.dtype)

    def _evidence(self, features: PatchFeatures, seen_BNM: Tensor) -> Tensor:
        """(B, N, M) seen_ij (sum_d a_id (f_id - mean_jd) w_jd / below_jd + sum_l (detail_il - mean_jl) w_jl), a_id as in `_active`,
        below_jd the Lehmer mean's denominator: summed over i, the logit less its bias.
        """
        weight_MX, active_BND = self.concept.weight / self.scale_GX[self.group_M], self._active(features.patch_BND)
        mean_MX = self.mean_GX[self.group_M]
        width = active_BND.shape[2]
        factor_BMD = weight_MX[:, :width] / (seen_BNM.transpose(1, 2) @ active_BND)
        value_BNM = (active_BND * features.patch_BND) @ factor_BMD.transpose(1, 2)
        value_BNM = value_BNM - active_BND @ (factor_BMD * mean_MX[:, :width]).transpose(1, 2)
        if features.detail_BNL is not None:
            detail_ML = weight_MX[:, width:]
            value_BNM = value_BNM + features.detail_BNL @ detail_ML.T - (mean_MX[:, width:] * detail_ML).sum(1)
        return seen_BNM * value_BNM

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) logits or probabilities."""
        del context_BX
        if self.head_on == "auto":
            most = self.learned_M.to(concept_logit_BM.dtype).mean() > 0.5
            return torch.where(most, concept_logit_BM.sigmoid(), concept_logit_BM)
        return concept_logit_BM if self.head_on == "logit" else concept_logit_BM.sigmoid()
