"""What is exported: pictures in, plain tensors out."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from dotcbm.models.concept_model import ConceptModel
from dotcbm.moe.layer import MoELayer

__all__ = ["ExportedModel"]


class ExportedModel(nn.Module):
    """A concept model whose outputs are a tuple of tensors, named by `outputs`."""

    def __init__(self, model: ConceptModel) -> None:
        super().__init__()
        self.model = deepcopy(model).cpu().float().eval()
        for module in self.model.modules():
            if isinstance(module, MoELayer):
                module.backend = "dense"  # the others sort tokens by expert, in shapes that depend on the picture
        with torch.no_grad():
            found = self.model(torch.zeros(1, 3, *model.preprocessing.size))
        self.outputs: tuple[str, ...] = ("concepts", "classes")
        if found.plan_BNM is not None:
            self.outputs += ("plan",)
        elif found.evidence_BNM is not None:
            self.outputs += ("evidence",)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, h, w) prepared pictures to the tensors named by `outputs`."""
        output = self.model(image)
        tensors = (output.concept_BM, output.class_BK)
        if "plan" in self.outputs:
            return (*tensors, output.plan_BNM)
        return (*tensors, output.evidence_BNM) if "evidence" in self.outputs else tensors
