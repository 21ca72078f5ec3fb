"""Concept names to vectors, computed once and kept on disk.

>>> encoder = TextEncoder("sentence:path/to/all-MiniLM-L6-v2", templates=("a photo of a bird with a {}",))  # doctest: +SKIP
>>> encoder.encode(["hooked bill", "red crown"]).shape  # doctest: +SKIP
torch.Size([2, 384])
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dotcbm.encoders.clip_tower import clip_checkpoint, read_clip_directory
from dotcbm.encoders.weights import MissingWeightsError, offline, weights_digest

__all__ = ["TextEncoder"]

_BATCH = 256
_SENTENCE_FILES = (".json", ".txt", ".safetensors", ".bin", ".model")  # weights, configs and vocabularies; no cards or pictures


class TextEncoder:
    """A frozen text tower with prompt templates.

    A name's embedding is the mean over the templates of the normalised embeddings of the filled-in templates, normalised
    again, as CLIP's authors build their zero-shot classifiers.

    Attributes:
        name: As given.
        templates: As given.
        settings: The arguments it was built with, as JSON values.
    """

    def __init__(
        self,
        name: str,
        *,
        templates: Sequence[str] = ("a photo of {}",),
        cache_dir: str | Path | None = None,
        allow_download: bool = False,
    ) -> None:
        """Nothing is read before `encode` or `fingerprint` is called, and the tower is built only for names that are not in the cache.

        Args:
            name: "open_clip/<arch>@<tag>" (the text tower that belongs to that image tower), "local-dir:<path>" of a folder in
                open_clip's format, or "sentence:<path>" of a folder in the format of sentence-transformers.
            templates: Each with one "{}" for the name.
            cache_dir: Where embeddings are kept, or None to keep none.
            allow_download: Fetch weights that are in no local cache. Without it no connection is opened.

        Raises:
            ValueError: An unknown kind of name, no template, or a template without exactly one "{}".
        """
        if not name.startswith(("open_clip/", "local-dir:", "sentence:")):
            raise ValueError(f"no text encoder is called {name!r}; names are open_clip/<arch>@<tag>, local-dir:<path> or sentence:<path>")
        if isinstance(templates, str) or not templates:
            raise ValueError(f'templates is {templates!r}; give a list of at least one text with a {{}}, such as "a photo of {{}}"')
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f'the template {template!r} needs exactly one {{}} where the name goes, such as "a photo of {{}}"')
        self.name = name
        self.templates = tuple(templates)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.allow_download = allow_download
        self.settings: dict[str, Any] = {
            "name": name,
            "templates": list(templates),
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "allow_download": allow_download,
        }
        self._embed: Callable[[list[str]], Tensor] | None = None

    def encode(self, names: Sequence[str]) -> Tensor:
        """Embeddings of concept names.

        Args:
            names: M names.

        Returns:
            (M, D) float32 on the CPU, rows of length 1.

        Raises:
            ValueError: No names, or an empty one.
            MissingWeightsError: Weights that are not on this machine.
        """
        if isinstance(names, str) or not names or not all(name.strip() for name in names):
            raise ValueError(f"names must be a list of at least one text, none of them empty, got {names!r}")
        if self.cache_dir is None:
            return self._compute(names)
        key = self._key(names)
        path = self.cache_dir / f"text-{key[:16]}.safetensors"
        if path.exists():
            try:
                return _read(path, key=key)
            except (SafetensorError, ValueError, OSError) as error:
                warnings.warn(f"{path}: cached text embeddings cannot be used and are computed again ({error})", stacklevel=2)
        text_MD = self._compute(names)
        _write(path, text_MD, key=key)
        return text_MD

    def fingerprint(self) -> str:
        """A sha256 over the files of the tower (weights, config, vocabulary); not over the templates, nor where the files lie."""
        told, paths = self._source()
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for name, path in sorted(paths.items()):
            with path.open("rb") as opened:
                digest.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
        return digest.hexdigest()

    def _source(self) -> tuple[dict[str, Any], dict[str, Path]]:
        """What is told of the tower beyond its files, and its files by name."""
        if self.name.startswith("sentence:"):
            directory = _sentence_directory(self.name)
            files = [path for path in directory.rglob("*") if path.suffix in _SENTENCE_FILES and path.is_file()]
            return {"kind": "sentence"}, {path.relative_to(directory).as_posix(): path for path in files}
        _, model_cfg, path = _clip_source(self.name, allow_download=self.allow_download)
        return {"kind": "open_clip", "model": model_cfg}, {"weights": path}

    def _key(self, names: Sequence[str]) -> str:
        told = {"encoder": self.fingerprint(), "templates": list(self.templates), "names": list(names)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def _compute(self, names: Sequence[str]) -> Tensor:
        if self._embed is None:
            is_sentence = self.name.startswith("sentence:")
            self._embed = _sentence(self.name) if is_sentence else _open_clip(self.name, allow_download=self.allow_download)
        texts = [template.format(name) for template in self.templates for name in names]
        parts = [functional.normalize(self._embed(texts[i : i + _BATCH]).float().cpu(), dim=-1) for i in range(0, len(texts), _BATCH)]
        each_TMD = torch.cat(parts).unflatten(0, (len(self.templates), len(names)))
        return functional.normalize(each_TMD.mean(0), dim=-1)


def _sentence_directory(name: str) -> Path:
    directory = Path(name.removeprefix("sentence:")).expanduser()
    if not (directory / "modules.json").is_file():
        raise MissingWeightsError(
            f"no sentence encoder in {directory}. Looked at:\n  - {directory / 'modules.json'} (no such file)\n"
            "Give the folder of a model saved by sentence-transformers (SentenceTransformer.save writes it)."
        )
    return directory


def _sentence(name: str) -> Callable[[list[str]], Tensor]:
    directory = _sentence_directory(name)
    from sentence_transformers import SentenceTransformer

    with offline(True):
        try:
            model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{directory}: cannot be loaded as a sentence encoder ({error}); copy the folder again") from error
    model.requires_grad_(False).eval()

    def embed(texts: list[str]) -> Tensor:
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    return embed


def _clip_source(name: str, *, allow_download: bool) -> tuple[str, dict[str, Any], Path]:
    """(what open_clip calls it, its config, its weights)."""
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:")).expanduser()
        model_cfg, _, path = read_clip_directory(directory, pretrained=True)
        identifier = f"local-dir:{directory}"
    else:
        model_cfg, _, path = clip_checkpoint(name.removeprefix("open_clip/"), pretrained=True, allow_download=allow_download)
        identifier = name.removeprefix("open_clip/").partition("@")[0]
    if path is None:
        raise MissingWeightsError.of(name, ["the place that its config names, which is empty"])
    return identifier, model_cfg, path


def _open_clip(name: str, *, allow_download: bool) -> Callable[[list[str]], Tensor]:
    import open_clip

    identifier, model_cfg, path = _clip_source(name, allow_download=allow_download)
    with offline(not allow_download):
        try:
            model: Any = open_clip.create_model(
                identifier,
                pretrained=None if identifier.startswith("local-dir:") else str(path),
                force_quick_gelu=bool(model_cfg.get("quick_gelu", False)),
            )
            tokenizer = open_clip.get_tokenizer(identifier)
        except OSError as error:  # the config or tokenizer of a text tower from transformers
            raise MissingWeightsError.of(
                name, [f"the local Hugging Face cache, for the text tower's config or tokenizer ({error})"]
            ) from error
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path}: not the weights of {name} ({error})") from error
    del model.visual  # dead weight here
    model.requires_grad_(False).eval()

    def embed(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts))

    return embed


def _read(path: Path, *, key: str) -> Tensor:
    with safe_open(path, framework="pt") as opened:
        told = opened.metadata() or {}
        text_MD = opened.get_tensor("text")
    if told.get("key") != key:
        raise ValueError("it was made for another encoder, other templates or other names")
    if told.get("checksum") != weights_digest({"text": text_MD}, told={}):
        raise ValueError("its content differs from its checksum")
    return text_MD


def _write(path: Path, text_MD: Tensor, *, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file({"text": text_MD.contiguous()}, scratch, metadata={"key": key, "checksum": weights_digest({"text": text_MD}, told={})})
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
