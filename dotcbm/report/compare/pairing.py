"""Several audits laid over each other picture by picture, and the errors where they do not belong together.

n pictures, M concepts that all records have, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dotcbm.report.record import AuditRecord

__all__ = ["Answers", "Overlay", "overlay"]


@dataclass(frozen=True)
class Answers:
    """What one model said, in the order of the overlay's pictures.

    Attributes:
        predicted_n: (n,) class indices.
        confidence_n, true_n: (n,) float64, probability of the predicted and of the true class.
        concept_nM: (n, M) float64 probabilities.
        pointing_n2: (n, 2) float64 hits and pairs; None without.
        prior_n2: The same for the prior.
    """

    predicted_n: Tensor
    confidence_n: Tensor
    true_n: Tensor
    concept_nM: Tensor
    pointing_n2: Tensor | None
    prior_n2: Tensor | None


@dataclass(frozen=True)
class Overlay:
    """The same pictures, seen by several models.

    Attributes:
        names: n names, in the order of the reference.
        class_names, concept_names: K and M.
        label_n: (n,) class indices.
        truth_nM: (n, M) float64 in {0, 1}, NaN where unknown.
        group_n: (n,) long, or None.
        answers: By model.
        missing: Concepts that not all records have.
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    concept_names: tuple[str, ...]
    label_n: Tensor
    truth_nM: Tensor
    group_n: Tensor | None
    answers: tuple[Answers, ...]
    missing: tuple[str, ...]


def overlay(records: Sequence[AuditRecord], names: Sequence[str], *, against: int) -> Overlay:
    """Match pictures, classes and concepts by name.

    Raises:
        ValueError: The records speak of other data, splits, pictures or classes, or contradict each other on what is true.
    """
    reference, hint = records[against], "audit both models on the same pictures, or compare without pairing (--unpaired)"
    first = names[against]
    rows_of = {name: row for row, name in enumerate(reference.pictures.name)}
    if not rows_of:
        raise ValueError(f"{first}: holds no pictures; {hint}")
    shared = [c.name for c in reference.concepts if all(c.name in {other.name for other in record.concepts} for record in records)]
    everything = dict.fromkeys(c.name for record in records for c in record.concepts)
    for record, name in zip(records, names, strict=True):
        _check_same_data(record, reference, name=name, first=first, hint=hint)
        extra = [picture for picture in record.pictures.name if picture not in rows_of]
        lacking = set(rows_of) - set(record.pictures.name)
        if extra or lacking:
            shown = extra[0] if extra else min(lacking)
            raise ValueError(
                f"{name} and {first} were audited on other pictures: {len(extra)} only in {name}, {len(lacking)} only in {first} "
                f"({shown!r} for one); {hint}"
            )
    aligned = [_aligned(record, rows_of, reference.class_names, shared) for record in records]
    base = aligned[against]
    for (label_n, truth_nM, group_n, _), name in zip(aligned, names, strict=True):
        if not torch.equal(label_n, base[0]):
            row = int((label_n != base[0]).nonzero()[0])
            raise ValueError(f"{name} and {first} name different classes for {reference.pictures.name[row]!r}; {hint}")
        same = (truth_nM == base[1]) | (truth_nM.isnan() & base[1].isnan())
        if not bool(same.all()):
            row, j = (~same).nonzero()[0].tolist()
            raise ValueError(
                f"{name} and {first} disagree on whether {reference.pictures.name[row]!r} shows {shared[j]!r}: their labels were made "
                f"otherwise; {hint}"
            )
        if (group_n is None) != (base[2] is None) or (group_n is not None and base[2] is not None and not torch.equal(group_n, base[2])):
            raise ValueError(f"{name} and {first} put pictures into other sub-populations; {hint}")
    return Overlay(
        names=reference.pictures.name,
        class_names=reference.class_names,
        concept_names=tuple(shared),
        label_n=base[0],
        truth_nM=base[1],
        group_n=base[2],
        answers=tuple(answers for *_, answers in aligned),
        missing=tuple(name for name in everything if name not in shared),
    )


def _check_same_data(record: AuditRecord, reference: AuditRecord, *, name: str, first: str, hint: str) -> None:
    ours, theirs = record.card, reference.card
    if ours.split != theirs.split:
        raise ValueError(f"{name} was audited on the split {ours.split!r}, {first} on {theirs.split!r}; {hint}")
    # The fingerprint depends on the pictures' order too; then what the source prints must be the same.
    if ours.data_fingerprint != theirs.data_fingerprint and ours.data != theirs.data:
        raise ValueError(f"{name} was audited on {ours.data}, {first} on {theirs.data}; {hint}")
    if set(record.class_names) != set(reference.class_names):
        odd = sorted(set(record.class_names) ^ set(reference.class_names))
        raise ValueError(f"{name} and {first} know other classes ({odd[0]!r} for one); {hint}")


def _aligned(
    record: AuditRecord, rows_of: dict[str, int], class_names: Sequence[str], shared: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor | None, Answers]:
    pictures = record.pictures
    at = {name: row for row, name in enumerate(pictures.name)}
    order = torch.tensor([at[name] for name in rows_of], dtype=torch.long)
    class_of = torch.tensor([class_names.index(name) for name in record.class_names], dtype=torch.long)
    columns = [[c.name for c in record.concepts].index(name) for name in shared]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[order]

    def pairs(hits: Sequence[int]) -> Tensor | None:
        return torch.stack([column(hits), column(pictures.pointing_pairs)], 1) if hits and pictures.pointing_pairs else None

    if pictures.concept_probability and columns:
        concept_nM = torch.tensor(pictures.concept_probability, dtype=torch.float64)[order][:, columns]
        truth = [[math.nan if value is None else value for value in row] for row in pictures.concept_truth]
        truth_nM = torch.tensor(truth, dtype=torch.float64)[order][:, columns]
    else:
        concept_nM = truth_nM = torch.zeros(len(order), 0, dtype=torch.float64)
    return (
        class_of[torch.tensor(pictures.label)[order]],
        truth_nM,
        torch.tensor(pictures.group)[order] if pictures.group else None,
        Answers(
            predicted_n=class_of[torch.tensor(pictures.predicted)[order]],
            confidence_n=column(pictures.confidence),
            true_n=column(pictures.true_probability),
            concept_nM=concept_nM,
            pointing_n2=pairs(pictures.pointing_hits),
            prior_n2=pairs(pictures.prior_hits),
        ),
    )
