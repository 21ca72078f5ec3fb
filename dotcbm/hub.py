"""Models on disk: written whole or not at all, and read back with everything checked that can be.

A saved model is a folder of these files:

    model.safetensors   the weights of bottleneck and encoder, and the tensors that the bottleneck was built from
    config.json         format, encoder (settings, blueprint, fingerprint, preprocessing), bottleneck (class and settings)
    concepts.json       concepts, classes, groups, parts (`dotcbm.data.concepts`)
    edits.json          what was changed in it by hand, who did and why (`dotcbm.models.edits`); only where something was
    README.md           the model card

`from_pretrained` runs no code that the folder brings along: the files hold data only, and the class named in config.json must be
a bottleneck of `dotcbm.models`. A bottleneck of your own is handed over as a class: `from_pretrained(path, bottleneck=MyBottleneck)`.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import dotcbm
from dotcbm.data.concepts import concepts_from_dict, concepts_to_dict, load_concepts
from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.weights import MissingWeightsError
from dotcbm.hub_card import CardInfo, card_text
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.edits import Edit, check_removed, edits_from_dict, edits_to_dict
from dotcbm.structures import ConceptSet, Preprocessing, Problem

__all__ = ["CardInfo", "describe", "from_pretrained", "save_pretrained"]

FORMAT = 1
_WEIGHTS, _CONFIG, _CONCEPTS, _CARD, _EDITS = "model.safetensors", "config.json", "concepts.json", "README.md", "edits.json"
_FILES = (_WEIGHTS, _CONFIG, _CONCEPTS, _CARD, _EDITS)


@dataclass(frozen=True)
class _Stored:
    """A model as read, before anything is built.

    Attributes:
        where: The folder or file, for messages.
        config: As `describe` gives it.
        concepts: The vocabulary.
        weights: Tensors by name, with the prefixes "encoder.", "bottleneck." and "problem.".
        edits: The log.
    """

    where: Path
    config: Mapping[str, Any]
    concepts: ConceptSet
    weights: dict[str, Tensor]
    edits: tuple[Edit, ...] = ()


def describe(model: ConceptModel) -> dict[str, Any]:
    """What is needed to build `model` again, besides its weights and concepts, as JSON values."""
    encoder, bottleneck = model.encoder, model.bottleneck
    return {
        "format": FORMAT,
        "version": dotcbm.__version__,
        "encoder": {
            "settings": encoder.settings,
            "blueprint": encoder.blueprint,
            "fingerprint": encoder.fingerprint(any_budget=True),
            "preprocessing": encoder.preprocessing.to_dict(),
            "frozen": not encoder.trainable,
        },
        "problem": {
            "patch_width": encoder.width,
            "global_width": encoder.global_width,
            "grid": list(encoder.grid),
            "num_concepts": model.concepts.num_concepts,
            "num_classes": model.concepts.num_classes,
        },
        "bottleneck": {"class_path": _class_name(type(bottleneck)), "settings": bottleneck.settings},
    }


def save_pretrained(model: ConceptModel, directory: str | Path, *, card: CardInfo | None = None, include_encoder: bool = True) -> Path:
    """Write a model as a folder; see the head of this file.

    The folder appears whole or not at all: it is written beside its place and then moved there. After an error (a full disk, Ctrl-C)
    a model that was there before is still there.

    Args:
        model: What to save, in any mode and on any device.
        directory: The folder. It may hold an older model, which is replaced, but no other files.
        card: What the model card says of data and figures.
        include_encoder: Save the encoder's weights too, so that the folder stands alone. Without them `from_pretrained` builds the
            encoder from its settings, where its weights are at hand, and compares its fingerprint.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds files that are no part of a saved model; an encoder that exists nowhere else is to be left out; or
            the head reads a concept again that the model's log says was removed.
        OSError: The disk is full or cannot be written.
    """
    directory = Path(directory)
    _check_replaceable(directory)
    check_removed(model.bottleneck.head, model.edits, where="this model")
    if not include_encoder and not model.encoder.has_source:
        raise ValueError("this encoder was trained here or drawn at random and exists nowhere else; save it too (include_encoder=True)")
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        config = describe(model)
        config["encoder"]["included"] = include_encoder
        _write(fresh / _CONFIG, json.dumps(config, indent=1))
        _write(fresh / _CONCEPTS, json.dumps(concepts_to_dict(model.concepts), ensure_ascii=False, allow_nan=False, indent=1) + "\n")
        if model.edits:
            _write(fresh / _EDITS, json.dumps(edits_to_dict(model.edits), ensure_ascii=False, allow_nan=False, indent=1) + "\n")
        _write(fresh / _CARD, card_text(model, card=card, version=dotcbm.__version__))
        _write_weights(fresh / _WEIGHTS, _weights(model, include_encoder=include_encoder))
        fresh.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        _move(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def from_pretrained(
    path: str | Path, *, map_location: str | torch.device = "cpu", bottleneck: type[Bottleneck] | None = None
) -> ConceptModel:
    """Read a model that `save_pretrained` or a training run (a Lightning checkpoint, .ckpt) wrote.

    Args:
        path: The folder, or the .ckpt file.
        map_location: Device of the model.
        bottleneck: The class of the bottleneck, needed where it is not one of dotcbm's own: no class is imported because a file names it.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: A file is missing, damaged, of a newer format, or contradicts another; the encoder at hand is not the one that
            the model was trained with; the bottleneck's class is not known.
        MissingWeightsError: The encoder's weights are neither in the folder nor on this machine.
    """
    path = Path(path)
    if path.is_dir():
        stored = _read_folder(path)
    elif path.is_file():
        stored = _read_checkpoint(path)
    else:
        raise ValueError(f"{path}: no such folder or file; expected a folder written by save_pretrained, or a .ckpt of a training run")
    _check_format(stored.config, stored.where)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        encoder = _encoder(stored)
        built = _bottleneck(stored, encoder=encoder, given=bottleneck)
    check_removed(built.head, stored.edits, where=str(stored.where))
    model = ConceptModel(encoder, built).to(map_location).eval()
    model.edits = stored.edits
    return model


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _weights(model: ConceptModel, *, include_encoder: bool) -> dict[str, Tensor]:
    tensors = {f"bottleneck.{name}": value for name, value in model.bottleneck.state_dict().items()}
    if include_encoder:
        tensors |= {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    problem = model.bottleneck.problem
    for name in ("text_MD", "concept_frequency_M"):
        if (value := getattr(problem, name)) is not None:
            tensors[f"problem.{name}"] = value
    # safetensors refuses tensors that share memory; a copy of each is safe.
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # a second entry would come in random order
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written ({error}); is the disk full?") from error
    path.chmod(0o644)
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def _check_replaceable(directory: Path) -> None:
    if directory.is_dir():
        strange = sorted(entry.name for entry in directory.iterdir() if entry.name not in _FILES)
        if strange:
            raise ValueError(f"{directory} holds {strange[0]!r}, which is no part of a saved model; give an empty or a new folder")
    elif directory.exists():
        raise ValueError(f"{directory} is a file; give a folder")


def _move(fresh: Path, directory: Path) -> None:
    """Put `fresh` in the place of `directory`, whose old content survives if that fails."""
    if not directory.exists():
        fresh.rename(directory)
        return
    old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.old."))
    old.rmdir()
    directory.rename(old)
    try:
        fresh.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_folder(directory: Path) -> _Stored:
    missing = [name for name in (_CONFIG, _CONCEPTS, _WEIGHTS) if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory}: lacks {', '.join(missing)}; expected a folder written by save_pretrained")
    path = directory / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no JSON ({error}); the file may be truncated") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, expected what save_pretrained writes")
    _check_format(config, directory)  # before the other files, whose formats may be newer too
    try:
        weights = load_file(directory / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / _WEIGHTS}: cannot be read ({error}); the file is truncated or damaged: copy it again") from error
    return _Stored(directory, config, load_concepts(directory / _CONCEPTS), weights, _read_edits(directory / _EDITS))


def _read_edits(path: Path) -> tuple[Edit, ...]:
    if not path.is_file():
        return ()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no JSON ({error}); the file may be truncated: copy it again") from error
    return edits_from_dict(values, where=str(path))


def _read_checkpoint(path: Path) -> _Stored:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({error}); is it truncated, or no .ckpt of dotcbm?") from error
    if not isinstance(found, dict) or "dotcbm" not in found:
        raise ValueError(f"{path}: is no checkpoint of dotcbm (no entry 'dotcbm'); expected a .ckpt that `dotcbm fit` wrote")
    about = found["dotcbm"]
    _check_format(about, path)
    if path.name == "last.ckpt" and about.get("regime") != "joint":
        warnings.warn(
            f"{path}: was written during training, before its class head was fitted; model.ckpt holds the finished model", stacklevel=3
        )
    weights = {name.removeprefix("model."): value for name, value in found["state_dict"].items() if name.startswith("model.")}
    weights |= {f"problem.{name}": value for name, value in found.get("dotcbm_tensors", {}).items()}
    concepts = concepts_from_dict(about["problem"]["concepts"], where=str(path))
    return _Stored(where=path, config=about, concepts=concepts, weights=weights)


def _check_format(config: Mapping[str, Any], where: Path) -> None:
    found = config.get("format")
    if not isinstance(found, int):
        raise ValueError(f"{where}: no format number; expected what save_pretrained writes")
    if found > FORMAT:
        by = config.get("version", "of a newer version")
        raise ValueError(
            f"{where}: has format {found}, written by dotcbm {by}; this is dotcbm {dotcbm.__version__}, which reads formats up to "
            f"{FORMAT}. Install a newer dotcbm"
        )
    for part in ("encoder", "problem", "bottleneck"):
        if not isinstance(config.get(part), Mapping):
            raise ValueError(f"{where}: says nothing of the {part}; expected what save_pretrained writes")


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def _encoder(stored: _Stored) -> ImageEncoder:
    told = stored.config["encoder"]
    settings = {"detail": False, **told["settings"]}  # models that were saved before there were details
    weights = _part(stored.weights, "encoder")
    if weights:
        encoder = ImageEncoder(**settings, blueprint=told["blueprint"])
        _load(encoder, weights, where=stored.where, what=f"the encoder {encoder.name}")
    else:
        try:
            encoder = ImageEncoder(**settings)
        except MissingWeightsError as error:
            raise MissingWeightsError(
                f"{stored.where}: holds the bottleneck but not the weights of its encoder, and those are not at hand.\n{error}"
            ) from error
    where, name = stored.where, settings["name"]
    expected = Preprocessing.from_dict(told["preprocessing"])
    if encoder.preprocessing != expected:
        raise ValueError(f"{where}: {name} prepares pictures by {encoder.preprocessing}; the model was trained with {expected}")
    # The fingerprint in a checkpoint of a trained encoder is that of the weights that training started from.
    fingerprint = encoder.fingerprint(any_budget=True)
    if (told["frozen"] or stored.where.is_dir()) and fingerprint != told["fingerprint"]:
        if weights:
            found = "in the file are damaged"
        elif encoder.has_source:
            found = "on this machine are others than those that the model was trained with"
        else:
            found = "were drawn at random, and the file does not hold them. The folder `model` of the run does"
        raise ValueError(
            f"{where}: the fingerprint of the encoder {name} is {fingerprint[:12]}, expected {told['fingerprint'][:12]}: its "
            f"weights {found}. Save the model with its encoder (include_encoder=True) where it was trained, or get the same weights"
        )
    return encoder


def _bottleneck(stored: _Stored, *, encoder: ImageEncoder, given: type[Bottleneck] | None) -> Bottleneck:
    told, tensors = stored.config["bottleneck"], _part(stored.weights, "problem")
    cls = _bottleneck_class(told["class_path"], given=given, where=stored.where)
    for what, count in (("concepts", stored.concepts.num_concepts), ("classes", stored.concepts.num_classes)):
        expected = stored.config["problem"].get(f"num_{what}", count)
        if expected != count:
            raise ValueError(
                f"{stored.where}: the model has {expected} {what}, its list of concepts and classes names {count}; "
                "the files belong to different models"
            )
    problem = Problem(
        patch_width=encoder.width,
        global_width=encoder.global_width,
        detail_width=encoder.detail_width,
        grid=encoder.grid,
        concepts=stored.concepts,
        text_MD=tensors.get("text_MD"),
        concept_frequency_M=tensors.get("concept_frequency_M"),
    )
    try:
        built = cls(problem, **told["settings"])
    except TypeError as error:
        raise ValueError(
            f"{stored.where}: {told['class_path']} does not take the stored settings ({error}); install the dotcbm that wrote them"
        ) from error
    _load(built, _part(stored.weights, "bottleneck"), where=stored.where, what=f"the bottleneck {cls.__name__}")
    return built


def _bottleneck_class(name: str, *, given: type[Bottleneck] | None, where: Path) -> type[Bottleneck]:
    if given is not None:
        if _class_name(given) != name:
            raise ValueError(f"{where}: was saved from the bottleneck {name}, not from {_class_name(given)}")
        return given
    module, _, attribute = name.rpartition(".")
    if module.split(".")[:2] != ["dotcbm", "models"]:
        raise ValueError(
            f"{where}: its bottleneck {name} is none of dotcbm's, and no class is imported because a file names it; "
            f"import it yourself and call from_pretrained(path, bottleneck={attribute})"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise ValueError(f"{where}: dotcbm {dotcbm.__version__} has no bottleneck {name}; install the version that wrote it") from None
    if not (isinstance(found, type) and issubclass(found, Bottleneck)):
        raise ValueError(f"{where}: {name} is no bottleneck; the file is damaged")
    return found


def _load(module: torch.nn.Module, weights: dict[str, Tensor], *, where: Path, what: str) -> None:
    try:
        # `assign` keeps the precision that the weights were saved in. The copies lie aligned in memory, unlike a mapped file, and in the
        # order of their dimensions, unlike convolutions of a checkpoint: on both, some kernels round differently, and a model read back
        # from either must give the same numbers.
        ordered = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
        module.load_state_dict(ordered, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{where}: the weights do not fit {what} ({error})") from error
