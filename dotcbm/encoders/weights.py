"""Where pretrained weights lie on this machine. Nothing here opens a connection."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["MissingWeightsError", "cached_on_hub", "near_matches", "offline", "weights_digest"]


class MissingWeightsError(FileNotFoundError, ValueError):
    """Pretrained weights that are not on this machine; the message says where they were looked for and how to get them."""

    @classmethod
    def of(cls, name: str, looked_at: Iterable[str]) -> MissingWeightsError:
        """The error for the encoder `name`, after looking at the places `looked_at`."""
        places = "\n".join(f"  - {place}" for place in looked_at)
        return cls(
            f"the weights of {name} are not on this machine, and nothing is downloaded unless asked for. Looked at:\n{places}\n"
            "Either let them be downloaded once (allow_download: true), or give a folder that holds them (name: local-dir:<path>), "
            "or start from random weights (pretrained: false)."
        )

    @classmethod
    def unreachable(cls, name: str, error: OSError) -> MissingWeightsError:
        """The error for the encoder `name`, whose download failed with `error`."""
        reason = str(error).partition("\n")[0] or type(error).__name__
        return cls(
            f"the weights of {name} are not on this machine and could not be downloaded: {reason}\n"
            "Check the network, or fetch them elsewhere and give the folder that holds them (name: local-dir:<path>), "
            "or start from random weights (pretrained: false)."
        )


def near_matches(name: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" with the nearest of the `known` names, or "" if none is near."""
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def cached_on_hub(repo: str, file_names: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The first of `file_names` that the local Hugging Face cache holds of the repository `repo`, and the places looked at.

    Args:
        repo: "owner/name", or "owner/name@revision".
        file_names: In order of preference.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    repo_id, _, revision = repo.partition("@")
    looked_at = []
    for file_name in file_names:
        found = try_to_load_from_cache(repo_id, file_name, revision=revision or None)
        if isinstance(found, str):
            return Path(found), looked_at
        looked_at.append(f"{constants.HF_HUB_CACHE}/models--{repo_id.replace('/', '--')}/.../{file_name}")
    return None, looked_at


@contextmanager
def offline(enabled: bool) -> Iterator[None]:
    """Inside this block libraries built on huggingface_hub read their local cache only, if `enabled`."""
    if not enabled:
        yield
        return
    # The environment variable HF_HUB_OFFLINE is read once, when huggingface_hub is imported; the constant is read every time.
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        yield


def weights_digest(state: Mapping[str, Tensor], *, told: Mapping[str, Any]) -> str:
    """A sha256 over the names, types, shapes and bytes of tensors, and over the JSON values `told`."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
