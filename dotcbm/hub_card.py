"""The card that lies beside a saved model: what it is, what it was trained on, what it knows and how well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dotcbm.models.concept_model import ConceptModel

__all__ = ["CardInfo", "card_text"]

_FEW = 40  # concepts spelled out in a card; all of them are in concepts.json


@dataclass(frozen=True)
class CardInfo:
    """What a model cannot know of itself.

    Attributes:
        data: What it was trained on, with the settings that matter ("CUB-200-2011, 112 attributes, split train").
        metrics: Figure by name ("test/class_accuracy"); the text belongs in the name or in `notes`, not in the number.
        command: The command that trained it.
        data_licence: Terms of the pictures and annotations, as far as known.
        encoder_licence: Terms of the pretrained weights, as far as known.
        notes: Anything else, Markdown.
    """

    data: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    command: str | None = None
    data_licence: str | None = None
    encoder_licence: str | None = None
    notes: str | None = None


def card_text(model: ConceptModel, *, card: CardInfo | None, version: str) -> str:
    """The Markdown of a model card.

    Args:
        model: What is saved.
        card: What is known beyond the model.
        version: Of dotcbm.
    """
    card = card or CardInfo()
    bottleneck, encoder, concepts = model.bottleneck, model.encoder, model.concepts
    height, width = encoder.preprocessing.size
    fitting = "learned with the bottleneck" if encoder.trainable else "kept as it was (frozen)"
    lines = [
        "---",
        "library_name: dotcbm",
        "pipeline_tag: image-classification",
        "tags: [concept-bottleneck, explainability]",
        "---",
        "",
        f"# {type(bottleneck).__name__} on {encoder.name}",
        "",
        f"A picture goes in; {concepts.num_concepts} concept probabilities, where each concept was read from, and "
        f"{concepts.num_classes} class probabilities come out. The class is a linear function of the concepts, unless the bottleneck is a "
        "linear probe.",
        "",
        "```python",
        "import dotcbm",
        "",
        'model = dotcbm.from_pretrained("path/to/this/folder")',
        'output = model.predict(["picture.jpg"])  # output.concept_BM, output.class_BK',
        'dotcbm.explain(model, "picture.jpg").plot().savefig("why.png")',
        "```",
        "",
        "## Model",
        "",
        f"- Encoder: `{encoder.name}`, {height} x {width} pixels ({encoder.preprocessing.resize}), "
        f"grid {encoder.grid[0]} x {encoder.grid[1]}, {fitting}",
        f"- Bottleneck: `{type(bottleneck).__module__}.{type(bottleneck).__qualname__}`",
        *(f"  - {name}: {value}" for name, value in bottleneck.settings.items()),
        f"- Saved by dotcbm {version}" + (f", trained with `{card.command}`" if card.command else ""),
        "",
        "## Data",
        "",
        card.data or "Not stated.",
        "",
        "## Figures",
        "",
        *_table(card.metrics),
        "",
        f"## Concepts ({concepts.num_concepts}) and classes ({concepts.num_classes})",
        "",
        f"Concepts: {_some(concepts.names)}.",
        "",
        f"Classes: {_some(concepts.class_names)}.",
        "",
        "All of them, with the class-concept matrix, are in `concepts.json`.",
        "",
        "## Licence",
        "",
        "Not chosen yet: whoever publishes this model states its terms here. They depend on its inputs:",
        "",
        f"- Pictures and annotations: {card.data_licence or 'not stated; see the data set they come from'}",
        f"- Encoder weights: {card.encoder_licence or f'not stated; see the publisher of {encoder.name}'}",
        "- The program dotcbm: Apache-2.0",
        "",
        *(_edits(model) if model.edits else []),
        *(["## Notes", "", card.notes, ""] if card.notes else []),
        "## Limits",
        "",
        "Concept probabilities are learned from annotations and are wrong where those were. A heatmap says where the model read a concept "
        "from, not that the concept is there: look at the probability first.",
        "",
    ]
    return "\n".join(lines)


def _edits(model: ConceptModel) -> list[str]:
    lines = ["## Edits", "", "Changed by hand after the training (`edits.json` has the details):", ""]
    # Reasons are people's words: a line break in one must not end its list item.
    lines += [f"- {' '.join(edit.told.split())}" for edit in model.edits]
    if model.removed_concepts:
        lines += ["", f"Still predicted, but read by no class: {', '.join(model.removed_concepts)}."]
    return [*lines, ""]


def _table(metrics: Mapping[str, float]) -> list[str]:
    if not metrics:
        return ["None given."]
    return ["| figure | value |", "| --- | ---: |", *(f"| {name} | {value:.4g} |" for name, value in metrics.items())]


def _some(names: tuple[str, ...]) -> str:
    rest = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {rest} more" if rest > 0 else "")
