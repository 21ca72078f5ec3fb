"""Concept vectors in the shared space: adapted text embeddings, or learned ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotcbm.models.adapters import AdapterKind, make_adapter
from dotcbm.structures import Problem

__all__ = ["ConceptEmbedding"]


class ConceptEmbedding(nn.Module):
    """(M, D) concept vectors. With text embeddings in the problem: adapter(text). Without: free parameters."""

    text_MD: Tensor | None

    def __init__(self, problem: Problem, *, dim: int, adapter: AdapterKind, dropout: float) -> None:
        super().__init__()
        text_MD = problem.text_MD
        # Kept with the weights: a saved model must not need the text encoder again.
        self.register_buffer("text_MD", None if text_MD is None else text_MD.clone().float())
        if text_MD is None:
            self.free_MD = nn.Parameter(torch.randn(problem.concepts.num_concepts, dim) / dim**0.5)
        else:
            self.adapter = make_adapter(adapter, width_in=text_MD.shape[1], width_out=dim, dropout=dropout)

    def forward(self) -> Tensor:
        """(M, D), not normalised."""
        return self.free_MD if self.text_MD is None else self.adapter(self.text_MD)
