"""The model card of an audit: what was audited, on what, with what. No path and no time gets into it.

N pictures of a split.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath

import dotcbm
from dotcbm.report.audit.cards import head_on
from dotcbm.report.audit.tools import Gathered
from dotcbm.report.collect.run import evaluating, pictures_digest
from dotcbm.report.collect.store import weights_digest
from dotcbm.report.record import ModelCard

__all__ = ["model_card", "without_paths"]

_QUOTED = re.compile(r"'([^']*[/\\][^']*)'|\"([^\"]*[/\\][^\"]*)\"")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow")
_TRIED = 4  # pictures that `head_on` is tried on


def without_paths(text: str) -> str:
    """A text with every quoted path cut to its last name: the record must not say where things lay."""
    return _QUOTED.sub(lambda found: repr(_last(found.group(1) or found.group(2))), text)


def _last(path: str) -> str:
    return PurePath(path.replace("\\", "/")).name


def _encoder_name(name: str) -> str:
    scheme, colon, rest = name.partition(":")
    return f"{scheme}:{_last(rest)}" if colon and scheme == "local-dir" else name


def _plain(value: object) -> str:
    return without_paths(json.dumps(value, sort_keys=True, default=str).replace('"', "'")).replace("'", '"')


def model_card(g: Gathered, *, data_licence: str | None, encoder_licence: str | None, training: Sequence[tuple[str, str]]) -> ModelCard:
    """See `ModelCard`.

    Args:
        g: All that was gathered.
        data_licence, encoder_licence: As far as known.
        training: What the run says of its training, without paths.
    """
    model, columns = g.model, g.columns
    encoder, bottleneck = model.encoder, model.bottleneck
    device = next(bottleneck.parameters()).device
    context = None if columns.context_NX is None else columns.context_NX[:_TRIED].to(device)
    with evaluating(model):
        read_on = head_on(model, columns.concept_logit_NM[:_TRIED].to(device), context)
    return ModelCard(
        bottleneck=type(bottleneck).__name__,
        settings=tuple((name, _plain(value)) for name, value in bottleneck.settings.items()),
        encoder=_encoder_name(encoder.name),
        encoder_fingerprint=encoder.fingerprint(),
        weights_sha256=weights_digest(bottleneck),
        head_on=read_on,
        data=without_paths(repr(g.data.source)),
        data_fingerprint=pictures_digest(g.data, columns.split, columns.row_N),
        split=columns.split,
        num_pictures=len(columns),
        num_concepts=len(model.concepts.names),
        num_classes=len(model.concepts.class_names),
        data_licence=data_licence,
        encoder_licence=encoder_licence,
        audit=g.settings.told(),
        training=tuple((name, without_paths(value)) for name, value in training),
        versions=_versions(),
        edits=tuple(edit.told for edit in model.edits),
    )


def _versions() -> tuple[tuple[str, str], ...]:
    found = [("dotcbm", dotcbm.__version__), ("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return tuple(found)
