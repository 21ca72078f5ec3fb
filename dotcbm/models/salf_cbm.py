"""The spatially-aware label-free concept bottleneck.

Benou and Riklin-Raviv, "Show and Tell: Visually Explainable Deep Neural Nets via Spatially-Aware Concept Bottleneck Models",
CVPR 2025 (its code for training was never released). A 1 x 1 convolution turns the feature map into concept maps. Each
place of a concept's map is a column over the pictures, and is trained to be similar, by the cosine of cubed, centred columns,
to the concept's score at that place, which the paper has from CLIP on pictures with a red circle drawn there. The maps are
averaged over the picture and standardised; a sparse head reads them.

Departures: what a place is compared to is a setting. "label" compares every place with the picture's label (or its teacher's
score, `dotcbm.data.teacher`): there are no local scores in most data, so the maps learn where a concept can be told, not where
it is. "text" compares with the cosine of the encoder's own patch and the concept's text, for open_clip encoders, whose patches
lie in the space of the texts: one pass in place of one for each circle. A label says little of one place, and comparing
places alone makes weak concepts (birds, 7 x 7 places, validation: AUROC 90.7, with half of it 96.8): a share 1 - `local` of the
loss compares the averaged map with the label instead, and `local: 0` is the label-free CBM, in which nothing is spatially trained.
Similarities are taken over batches;
activations are standardised by running moments; features may be scaled; and a slope and an offset for each concept, fitted to the
labels beside the training, give probabilities (see `dotcbm.models.label_free`). The sparse head is the task's (`head_nec`).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.models.base import Bottleneck
from dotcbm.models.linear_concepts import Calibration, LinearConcepts, cubed_cosine
from dotcbm.models.pooling import Scaling
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["SALFCBM", "LocalTarget"]

LocalTarget = Literal["label", "text"]


class SALFCBM(Bottleneck):
    """Concept maps by a 1 x 1 convolution, trained place by place; their means are standardised and read by a linear head."""

    text_MD: Tensor | None

    def __init__(
        self,
        problem: Problem,
        *,
        target: LocalTarget = "label",
        local: float = 1.0,
        scaling: Scaling = "full",
        dropout: float = 0.0,
    ) -> None:
        """Args:
        problem: What the data and the encoder fix; for "text" with embeddings of the concept names as wide as the patches.
        target: What each place is compared to; see the head of this file.
        local: Share in [0, 1] of the loss that compares place by place; the paper's is 1.
        scaling: Of the features; see `dotcbm.models.linear_concepts.LinearConcepts`. The paper's is "none".
        dropout: Share of the features dropped in training, for all patches of a picture the same.

        Raises:
            ValueError: A setting out of range, or "text" without embeddings that fit.
        """
        super().__init__(problem, settings={"target": target, "local": local, "scaling": scaling, "dropout": dropout})
        if target not in get_args(LocalTarget):
            raise ValueError(f"target is {target!r}; choose one of {list(get_args(LocalTarget))}")
        if not 0 <= local <= 1:
            raise ValueError(f"local is {local}; give a share in [0, 1]")
        text_MD = problem.text_MD if target == "text" else None
        if target == "text" and (text_MD is None or text_MD.shape[1] != problem.patch_width):
            found = "there are none" if text_MD is None else f"theirs is {text_MD.shape[1]}"
            raise ValueError(
                f"target 'text' needs embeddings of the concepts of the patches' width {problem.patch_width}, and {found}; take encoder "
                "and text from the same open_clip model, or target 'label'"
            )
        self.target: LocalTarget = target
        self.local = local
        self.register_buffer("text_MD", None if text_MD is None else F.normalize(text_MD.float(), dim=-1))
        self.concept = LinearConcepts(problem, scaling=scaling, dropout=dropout, bias=False)
        self.calibration = Calibration(problem)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        map_BNM = self.concept.maps(features.patch_BND)
        logit_BM = self.calibration(map_BNM.mean(1))
        losses: dict[str, Tensor] = {}
        if self.training and self.text_MD is not None:
            patch_BND = features.patch_BND.to(self.text_MD.dtype)
            losses["local"] = 1 - cubed_cosine(map_BNM, F.normalize(patch_BND, dim=-1) @ self.text_MD.T).mean()
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=map_BNM * (self.calibration.slope_M / map_BNM.shape[1]),
            losses=losses,
        )

    def losses(
        self, output: ConceptOutput, *, concepts_BM: Tensor, label_B: Tensor, pos_weight_M: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "concept": `local` times 1 - the mean over concepts and places of the cubed cosine, and 1 - `local` times that of the averaged
        map and the label; "calibration": see `Calibration`.

        With target "text" the places are compared in training only, by `forward`.
        """
        del label_B
        # The similarity knows neither scale nor offset, so logits and evidence serve as well as activations and maps.
        concept = (1 - self.local) * (1 - cubed_cosine(output.concept_logit_BM, concepts_BM).mean())
        others = dict(output.losses)
        if self.local and self.target == "label":
            assert output.evidence_BNM is not None
            concept = concept + self.local * (1 - cubed_cosine(output.evidence_BNM, concepts_BM[:, None, :]).mean())
        elif "local" in others:
            concept = concept + self.local * others.pop("local")
        calibration = self.calibration.loss(output.concept_logit_BM, concepts_BM, pos_weight_M=pos_weight_M)
        return {"concept": concept, "calibration": calibration, **others}

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, M) standardised means of the maps."""
        del context_BX
        return self.calibration.standardised(concept_logit_BM)
