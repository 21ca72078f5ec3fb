"""What a checkpoint says of itself, and the check that it meets the data and the encoder that it was made with.

A checkpoint of `ConceptTask` is Lightning's, loads with `torch.load(weights_only=True)`, lacks the weights of a frozen encoder,
and has two keys of ours:

    dotcbm           JSON values: format, version, encoder {class_path, settings, blueprint, fingerprint, preprocessing,
                     frozen}, problem {patch_width, global_width, grid, concepts}, bottleneck {class_path, settings}, regime
    dotcbm_tensors   text_MD and concept_frequency_M of the problem, where it has them

The bottleneck's weights are in `state_dict` below "model.bottleneck.", a trained encoder's below "model.encoder.".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import dotcbm
from dotcbm.data.concepts import compare_concepts, concepts_from_dict, concepts_to_dict
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import Problem

__all__ = ["FORMAT", "check_record", "make_record", "record_tensors"]

FORMAT = 1


def make_record(model: ConceptModel, *, fingerprint: str, regime: str) -> dict[str, Any]:
    """JSON values under the key "dotcbm"."""
    encoder, problem = model.encoder, model.bottleneck.problem
    return {
        "format": FORMAT,
        "version": dotcbm.__version__,
        "encoder": {
            "class_path": _path(encoder),
            "settings": encoder.settings,
            "blueprint": encoder.blueprint,
            "fingerprint": fingerprint,
            "preprocessing": encoder.preprocessing.to_dict(),
            "frozen": not encoder.trainable,
        },
        "problem": {
            "patch_width": problem.patch_width,
            "global_width": problem.global_width,
            "grid": list(problem.grid),
            "concepts": concepts_to_dict(problem.concepts),
        },
        "bottleneck": {"class_path": _path(model.bottleneck), "settings": model.bottleneck.settings},
        "regime": regime,
    }


def record_tensors(problem: Problem) -> dict[str, Tensor]:
    """Tensors under the key "dotcbm_tensors"."""
    tensors = {"text_MD": problem.text_MD, "concept_frequency_M": problem.concept_frequency_M}
    return {name: value.cpu() for name, value in tensors.items() if value is not None}


def check_record(checkpoint: dict[str, Any], *, model: ConceptModel, fingerprint: str) -> None:
    """Check that a checkpoint belongs to this encoder, this bottleneck and these concepts.

    Args:
        checkpoint: As loaded.
        model: What it is to be loaded into.
        fingerprint: Of the model's encoder; compared if the checkpoint's was frozen.

    Raises:
        ValueError: Naming what differs.
    """
    record = checkpoint.get("dotcbm")
    if record is None:
        raise ValueError("this checkpoint was not written by dotcbm: it has no key 'dotcbm'")
    if record["format"] != FORMAT:
        raise ValueError(f"the checkpoint has format {record['format']}, this version reads {FORMAT}; install dotcbm {record['version']}")
    compare_concepts(
        concepts_from_dict(record["problem"]["concepts"], where="the checkpoint"), model.concepts, what="the data", of="the checkpoint"
    )
    theirs, encoder = record["encoder"], model.encoder
    if theirs["preprocessing"] != encoder.preprocessing.to_dict() or (theirs["frozen"] and theirs["fingerprint"] != fingerprint):
        raise ValueError(
            f"the checkpoint was made with another encoder: {_told(theirs['settings'], theirs['fingerprint'])}; this one is "
            f"{_told(encoder.settings, fingerprint)}. Features of one encoder mean nothing to a bottleneck of another: use the encoder "
            "and weights that it was trained with, or train again"
        )
    _check_experts(record, encoder.blueprint)
    bottleneck = record["bottleneck"]
    if bottleneck["class_path"] != _path(model.bottleneck) or bottleneck["settings"] != model.bottleneck.settings:
        changed = sorted(
            name
            for name in {*bottleneck["settings"], *model.bottleneck.settings}
            if bottleneck["settings"].get(name) != model.bottleneck.settings.get(name)
        )
        raise ValueError(
            f"the checkpoint holds a {bottleneck['class_path']}, the configuration asks for {_path(model.bottleneck)}; settings that "
            f"differ: {changed or 'none'}. Use the configuration that the run was started with"
        )


def _check_experts(record: dict[str, Any], blueprint: dict[str, Any]) -> None:
    theirs = record["encoder"]["blueprint"]
    if "vit_moe" not in (theirs.get("library"), blueprint.get("library")):
        return
    # What is no architecture (jitter) may change between two starts, and so may rates that are not learned.
    found, asked = ({**told.get("arguments", {}), **told.get("moe", {}), "stem": _stem(told)} for told in (theirs, blueprint))
    differing = [name for name in sorted({*found, *asked} - {"jitter", "drop_path_rate"}) if found.get(name) != asked.get(name)]
    if differing:
        was = "grown to" if record.get("growth") else "made with"
        told = "; ".join(f"{name} {found.get(name)!r}, the configuration asks for {asked.get(name)!r}" for name in differing)
        raise ValueError(
            f"the checkpoint was {was} other experts: it has {told}. Use the configuration of the checkpoint (`dotcbm grow` writes it as "
            "encoder.yaml); to evaluate it with more or fewer active experts leave k as it is and set budget"
        )


def _stem(blueprint: dict[str, Any]) -> dict[str, Any] | None:
    stem = blueprint.get("stem")
    return None if stem is None else {name: stem[name] for name in ("architecture", "arguments", "layer", "trainable")}


def _path(thing: object) -> str:
    kind = next(kind for kind in type(thing).__mro__ if not issubclass(kind, FSDPModule))  # FSDP2 puts a class before a module's own
    return f"{kind.__module__}.{kind.__qualname__}"


def _told(settings: dict[str, Any], fingerprint: str) -> str:
    shown = ", ".join(f"{name}={value!r}" for name, value in settings.items() if name in ("image_size", "resize", "layer"))
    return f"{settings['name']} ({shown}, fingerprint {fingerprint[:12]})"
