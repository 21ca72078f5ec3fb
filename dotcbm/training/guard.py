"""Stops a run whose numbers went bad, and says where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["NonFiniteError", "check_losses", "check_weights"]


class NonFiniteError(ValueError):
    """A loss or a weight that is NaN or infinite; the message says which, when, and where the last good weights are."""


def check_losses(losses: Mapping[str, Tensor], *, epoch: int, step: int, names: Sequence[str], checkpoint: str | None) -> None:
    """Raise if a loss term is not finite.

    Args:
        losses: Terms by name, scalars.
        epoch: For the message.
        step: Optimizer steps made.
        names: Of the pictures in the batch.
        checkpoint: File with the last good weights, if there is one.

    Raises:
        NonFiniteError: Naming epoch, step, terms, pictures and file.
    """
    if torch.stack([loss.detach() for loss in losses.values()]).isfinite().all():
        return
    bad = ", ".join(f"{name} = {float(loss)}" for name, loss in losses.items() if not loss.isfinite())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise NonFiniteError(
        f"the loss is not finite in epoch {epoch}, step {step}: {bad}; pictures of the batch: {shown}. "
        f"{_last_good(checkpoint)} Lower lr, use Trainer(gradient_clip_val=1.0), or leave 16-bit precision"
    )


def check_weights(module: nn.Module, *, epoch: int, checkpoint: str | None) -> None:
    """Raise if a weight is not finite.

    Raises:
        NonFiniteError: Naming epoch, weight and file.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not parameter.detach().isfinite().all():
            raise NonFiniteError(
                f"the weight {name} is not finite after epoch {epoch}. {_last_good(checkpoint)} Lower lr, use "
                "Trainer(gradient_clip_val=1.0), or leave 16-bit precision"
            )


def _last_good(checkpoint: str | None) -> str:
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written before."
