"""Training steps above the encoder as programs of torch.compile: with cached features an epoch else waits for Python, which starts
hundreds of small kernels in every step.

One program, for batches of the full size, does what the bottleneck and its losses do. The smaller last batch of an epoch runs eagerly: a
second program would take as long to compile and, with CUDA graphs, as much memory, for one step an epoch. Encoder, optimizer, validation,
prediction and whatever else a model is asked run eagerly as ever; the model itself is not touched, so its weights keep their names.

A compiled run is an eager one up to rounding, which AdamW enlarges where gradients are small:
    dropout     draws the numbers that eager code draws, from the seed that each batch sets
    transport   on a processor, or of more concepts than Triton takes, is solved by Python between two programs, not unrolled
and it is the same each time on the same machine, resumed or not: nothing is chosen by how long it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptOutput, PatchFeatures
from dotcbm.transport.sinkhorn import solved_eagerly

__all__ = ["CompileMode", "CompiledStep", "check_accumulates", "check_mode"]

CompileMode = Literal["default", "reduce-overhead"]
Losses = Callable[[ConceptOutput, Tensor, Tensor], dict[str, Tensor]]
"""Of an output, (B, M) true concepts and (B,) classes: unweighted scalars by name."""
_Read = Callable[[PatchFeatures, Tensor, Tensor], tuple[tuple[str, ...], Tensor, Tensor | None]]


def check_mode(mode: str | None) -> None:
    """Raise ValueError for a mode that is neither None nor a `CompileMode`."""
    if mode is not None and mode not in get_args(CompileMode):
        raise ValueError(f"compile is {mode!r}; choose one of {list(get_args(CompileMode))}, or None for eager training")


def check_accumulates(mode: str | None, batches: int) -> None:
    """Raise ValueError where graphs would write gradients over those of the batch before, of which a step needs the sum."""
    if mode == "reduce-overhead" and batches > 1:
        raise ValueError(
            f"compile 'reduce-overhead' writes the gradients of each batch to the same memory, and accumulate_grad_batches is {batches}; "
            "set compile to 'default', or accumulate_grad_batches to 1"
        )


class CompiledStep:
    """What a training step does above the encoder, for batches of one size.

    Attributes:
        batch_size: That size.
    """

    def __init__(self, model: ConceptModel, losses: Losses, *, mode: CompileMode, batch_size: int) -> None:
        """Args:
        model: On the device of the training, whose weights stay where they are.
        losses: With everything that it reads on that device.
        mode: "reduce-overhead" records CUDA graphs; on a processor it is the same as "default".
        batch_size: Pictures in a batch.

        What torch compiled earlier in this process is dropped: it would stop compiling at the ninth model, and tell nobody but its log.
        """

        def read(features: PatchFeatures, concepts_BM: Tensor, label_B: Tensor) -> tuple[tuple[str, ...], Tensor, Tensor | None]:
            output = model.read(features, concepts_BM=concepts_BM)
            terms = losses(output, concepts_BM, label_B)
            # Maps and plans stay inside; in one tensor, the terms take one copy to keep.
            residual = None if output.residual_B is None else output.residual_B.mean()
            return tuple(terms), torch.stack(list(terms.values())), residual

        torch.compiler.reset()
        self.batch_size = batch_size
        self._model = model
        self._replays = mode == "reduce-overhead" and next(model.bottleneck.parameters()).is_cuda
        self._read = _compiled(read, mode)

    def __call__(self, features: PatchFeatures, concepts_BM: Tensor, label_B: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The unweighted terms of the loss, and the mean residual of the transport where there is one. The caller may keep both.

        Args:
            features: Of `batch_size` pictures.
            concepts_BM: (B, M) true concepts, NaN where unknown.
            label_B: (B,) classes.

        Raises:
            ValueError: torch cannot compile the bottleneck.
        """
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        if self._replays:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with solved_eagerly():
                names, term_T, residual = self._read(features, concepts_BM, label_B)
        except TorchDynamoException as error:
            said = str(error).split("\n\nSet TORCHDYNAMO_VERBOSE")[0].strip()
            raise ValueError(
                f"torch.compile cannot compile the training step of {type(self._model.bottleneck).__name__}: {said}; leave compile out to "
                "train it eagerly (on a processor torch.compile needs a C++ compiler, such as g++)"
            ) from error
        if self._replays:  # the next replay writes where this one did
            term_T, residual = term_T.clone(), None if residual is None else residual.clone()
        return dict(zip(names, term_T.unbind(), strict=True)), residual


def _compiled(read: _Read, mode: CompileMode) -> _Read:
    options: dict[str, Any] = {"triton.cudagraphs": mode == "reduce-overhead", "fallback_random": True, "deterministic": True}
    return torch.compile(read, dynamic=False, options=options)
