"""What every bottleneck offers: features in, concepts and classes out, and its own settings.

B pictures, M concepts, K classes, F inputs of the class head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dotcbm.losses import concept_loss
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

__all__ = ["Bottleneck", "mean_patch"]


def mean_patch(features: PatchFeatures) -> PatchFeatures:
    """The mean over the patches in their place, as one patch in float32."""
    return replace(features, patch_BND=features.patch_BND.float().mean(1, keepdim=True), grid=(1, 1), detail_BNL=None)


class Bottleneck(nn.Module, ABC):
    """A map from patch features to concepts, and from concepts to classes by one linear `head`.

    Subclasses take a `Problem` first and plain JSON values after it by keyword, and hand the latter on as `settings`, so
    that a saved model can be built again by `type(bottleneck)(problem, **bottleneck.settings)`.

    The class logits are a function of the concept logits and, for some bottlenecks, of a context that the forward pass leaves
    in `ConceptOutput.context_BX`; `classify` computes them again for concepts that were changed by hand.

    Attributes:
        head: Classes from what `head_input` gives.
        settings: All arguments but the problem.
        reads_concepts: Whether the classes follow from the concepts. False only for black boxes.
        trains_on_truth: Whether `forward` wants the true concepts in training (`truth_BM`).
        head_by_gradient: Whether the head can only be trained together with the rest (regime "joint").
        reads_mean: Whether concepts and classes depend on the patches through their mean alone (and on the global token).
    """

    head: nn.Linear
    reads_concepts: ClassVar[bool] = True
    trains_on_truth: ClassVar[bool] = False
    head_by_gradient: ClassVar[bool] = False
    reads_mean: ClassVar[bool] = False

    def __init__(self, problem: Problem, *, settings: dict[str, Any]) -> None:
        super().__init__()
        self.problem = problem
        self.settings = settings

    @property
    def condense(self) -> Callable[[PatchFeatures], PatchFeatures] | None:
        """What makes of the features of a frozen encoder all that concepts and classes depend on, whatever the weights, where that is less.

        Training on it is the same training; maps still need the patches. Equal for bottlenecks that make the same of them.
        """
        return mean_patch if self.reads_mean else None

    @abstractmethod
    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """Concepts and classes of a batch of features.

        Bottlenecks with `trains_on_truth` take a second argument, `truth_BM`: (B, M) in {0, 1, NaN} in training, else None.
        """

    def losses(
        self, output: ConceptOutput, *, concepts_BM: Tensor, label_B: Tensor, pos_weight_M: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The unweighted terms of the loss, by name: "concept" and those that the forward pass left in `output.losses`.

        Args:
            output: Of a batch.
            concepts_BM: (B, M) true concepts in [0, 1], NaN where unknown.
            label_B: (B,) classes; for bottlenecks with an auxiliary class loss.
            pos_weight_M: See `dotcbm.losses.concept_loss`.
        """
        del label_B
        return {"concept": concept_loss(output.concept_logit_BM, concepts_BM, pos_weight_M=pos_weight_M), **output.losses}

    def head_input(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, F) what the class head reads: the concept probabilities, unless a bottleneck says otherwise.

        Args:
            concept_logit_BM: As predicted, or changed by hand.
            context_BX: `ConceptOutput.context_BX` of the same pictures.
        """
        del context_BX
        return concept_logit_BM.sigmoid()

    def classify(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, K) class logits of concepts as predicted, or changed by hand, in any precision; see `head_input` for the arguments."""
        dtype = self.head.weight.dtype
        if not torch.is_autocast_enabled(self.head.weight.device.type):
            concept_logit_BM, context_BX = concept_logit_BM.to(dtype), None if context_BX is None else context_BX.to(dtype)
        return self.head(self.head_input(concept_logit_BM, context_BX))

    def contributions(self, concept_logit_BM: Tensor, context_BX: Tensor | None = None) -> Tensor:
        """(B, K, M) what each concept adds to each class logit; with the head's bias the sum over M is the logit, exactly.

        Here F = M and input j belongs to concept j; bottlenecks with other inputs override this.

        Raises:
            ValueError: The classes are not read from the concepts.
        """
        if not self.reads_concepts:
            raise ValueError(f"the classes of {type(self).__name__} are not read from concepts, so no concept contributes to them")
        return self.head.weight * self.head_input(concept_logit_BM, context_BX)[:, None, :]
