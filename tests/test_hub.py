"""Models go to disk whole or not at all, and come back with the same numbers or a reason why not."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import dotcbm
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.weights import MissingWeightsError
from dotcbm.hub import CardInfo, from_pretrained, save_pretrained
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.dot_product import DotProduct
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem

SOURCE = Synthetic(size=64, num_train=8, num_val=4, num_test=4)


class Own(Bottleneck):
    """A user's own bottleneck."""

    def __init__(self, problem: Problem, *, scale: float = 2.0) -> None:
        super().__init__(problem, settings={"scale": scale})
        self.scale = scale
        self.concept = nn.Linear(problem.patch_width, problem.concepts.num_concepts)
        self.head = nn.Linear(problem.concepts.num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        logit_BM = self.scale * self.concept(features.patch_BND.mean(1))
        return ConceptOutput(concept_logit_BM=logit_BM, class_logit_BK=self.head(logit_BM.sigmoid()), grid=features.grid)


def make_encoder(*, trainable: bool = False, seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    return ImageEncoder("timm/test_vit", image_size=64, pretrained=False, trainable=trainable)


def make_problem(encoder: ImageEncoder, *, text: bool = False) -> Problem:
    m = SOURCE.concepts.num_concepts
    torch.manual_seed(1)
    return Problem(encoder.width, encoder.global_width, encoder.grid, SOURCE.concepts, torch.randn(m, 12) if text else None, torch.rand(m))


def make_model(kind: type[Bottleneck] = PublishedDotCBM, *, trainable: bool = False, text: bool = False, **settings) -> ConceptModel:
    encoder = make_encoder(trainable=trainable)
    return ConceptModel(encoder, kind(make_problem(encoder, text=text), **settings))


def picture() -> torch.Tensor:
    image = SOURCE.load("test").sample(0).image
    assert image is not None
    return image


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, change) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PublishedDotCBM, {"dim": 16, "iterations": 3, "concept_prior": "eq18"}),
        (PublishedDotCBM, {"dim": 16, "iterations": 3, "readout": "cosine"}),
        (DotProduct, {"dim": 16, "pooling": "softmax"}),
        (CBM, {"dropout": 0.1}),
        (LinearProbe, {}),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_a_model_read_back_gives_the_same_numbers(tmp_path, kind, settings, text):
    model = make_model(kind, text=text, **settings)
    back = from_pretrained(save_pretrained(model, tmp_path / "model"))
    ours, theirs = model.predict(picture()), back.predict(picture())
    assert torch.equal(ours.concept_logit_BM, theirs.concept_logit_BM)
    assert torch.equal(ours.class_logit_BK, theirs.class_logit_BK)
    assert (ours.plan_BNM is None) == (theirs.plan_BNM is None)
    if ours.plan_BNM is not None and theirs.plan_BNM is not None:
        assert torch.equal(ours.plan_BNM, theirs.plan_BNM)
    assert type(back.bottleneck) is kind
    assert back.bottleneck.settings == model.bottleneck.settings
    assert back.concepts.names == model.concepts.names
    assert back.preprocessing == model.preprocessing
    assert not back.training


def test_what_was_read_back_can_be_saved_again(tmp_path):
    model = make_model(dim=16, iterations=3, text=True, concept_prior="eq18")
    save_pretrained(model, tmp_path / "first")
    save_pretrained(from_pretrained(tmp_path / "first"), tmp_path / "second")
    for name in ("config.json", "concepts.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_half_precision_stays_half_precision(tmp_path):
    model = make_model(CBM)
    model.bottleneck.half()
    back = from_pretrained(save_pretrained(model, tmp_path / "model"))
    assert back.bottleneck.head.weight.dtype == torch.float16


def test_reading_a_model_leaves_the_random_numbers_alone(tmp_path):
    save_pretrained(make_model(CBM), tmp_path / "model")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    from_pretrained(tmp_path / "model")
    assert torch.equal(torch.rand(3), expected)


def test_the_card_says_what_it_was_told(tmp_path):
    card = CardInfo(data="creatures", metrics={"test/accuracy": 0.875}, command="dotcbm fit", encoder_licence="MIT", notes="Mind the gap.")
    save_pretrained(make_model(CBM), tmp_path / "model", card=card)
    text = (tmp_path / "model" / "README.md").read_text()
    for expected in ("creatures", "| test/accuracy | 0.875 |", "dotcbm fit", "MIT", "Mind the gap.", "striped body", "timm/test_vit"):
        assert expected in text


def test_public_names():
    assert dotcbm.from_pretrained is from_pretrained
    assert dotcbm.save_pretrained is save_pretrained


def test_an_older_model_is_replaced_and_other_files_are_not(tmp_path):
    save_pretrained(make_model(CBM), tmp_path / "model")
    save_pretrained(make_model(LinearProbe), tmp_path / "model")
    assert isinstance(from_pretrained(tmp_path / "model").bottleneck, LinearProbe)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        save_pretrained(make_model(CBM), tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files cannot grow beyond `limit` bytes: the write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 20_000])  # fails at the config, and at the weights
def test_a_full_disk_leaves_nothing_half_written_and_the_old_model_untouched(tmp_path, limit):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = make_model(LinearProbe)
    with full_disk(limit), pytest.raises(OSError, match=r"large|full"):
        save_pretrained(other, folder)
    with full_disk(limit), pytest.raises(OSError, match=r"large|full"):
        save_pretrained(other, tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert isinstance(from_pretrained(folder).bottleneck, CBM)


@pytest.mark.parametrize("name", ["config.json", "concepts.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"):
        from_pretrained(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder or file"):
        from_pretrained(tmp_path / "nix")


def test_truncated_weights(tmp_path):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read .*truncated"):
        from_pretrained(folder)


def test_truncated_config(tmp_path):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    (folder / "config.json").write_text((folder / "config.json").read_text()[:50])
    with pytest.raises(ValueError, match=r"config\.json: is no JSON"):
        from_pretrained(folder)


def test_a_newer_format(tmp_path):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    change_config(folder, lambda config: config.update(format=99, version="9.9"))
    with pytest.raises(ValueError, match=r"format 99, written by dotcbm 9\.9.*Install a newer"):
        from_pretrained(folder)


def test_changed_encoder_weights(tmp_path):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    change_config(folder, lambda config: config["encoder"].update(fingerprint="0" * 64))
    with pytest.raises(ValueError, match="fingerprint of the encoder timm/test_vit"):
        from_pretrained(folder)


def test_changed_preprocessing(tmp_path):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    change_config(folder, lambda config: config["encoder"]["preprocessing"].update(mean=[0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="prepares pictures by"):
        from_pretrained(folder)


def test_concepts_of_another_model(tmp_path):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    concepts = json.loads((folder / "concepts.json").read_text())
    concepts["names"].pop()
    concepts["class_concept_KM"] = [row[:-1] for row in concepts["class_concept_KM"]]
    for name in ("groups", "parts"):
        concepts[name].pop()
    (folder / "concepts.json").write_text(json.dumps(concepts))
    with pytest.raises(ValueError, match=r"the model has \d+ concepts, its list of concepts and classes names \d+"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["os.system", "dotcbm.hub.from_pretrained", "evil.models.Bottleneck", "dotcbm.modelsx.A"])
def test_no_class_is_imported_because_a_file_names_it(tmp_path, name):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    change_config(folder, lambda config: config["bottleneck"].update(class_path=name))
    with pytest.raises(ValueError, match="none of dotcbm's"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "message"), [("dotcbm.models.cbm.nix", "has no bottleneck"), ("dotcbm.models.base.Problem", "is no bottleneck")]
)
def test_a_class_that_is_no_bottleneck(tmp_path, name, message):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    change_config(folder, lambda config: config["bottleneck"].update(class_path=name))
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_settings_of_another_version(tmp_path):
    folder = save_pretrained(make_model(CBM), tmp_path / "model")
    change_config(folder, lambda config: config["bottleneck"]["settings"].update(speed=3))
    with pytest.raises(ValueError, match="does not take the stored settings"):
        from_pretrained(folder)


def test_a_bottleneck_of_ones_own(tmp_path):
    model = make_model(Own, scale=3.0)
    folder = save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"from_pretrained\(path, bottleneck=Own\)"):
        from_pretrained(folder)
    with pytest.raises(ValueError, match="was saved from the bottleneck"):
        from_pretrained(folder, bottleneck=CBM)
    back = from_pretrained(folder, bottleneck=Own)
    assert torch.equal(back.predict(picture()).class_logit_BK, model.predict(picture()).class_logit_BK)


def test_without_the_encoder(tmp_path, monkeypatch):
    """The encoder comes from a folder on this machine; it must be the same one, and be there."""
    import timm

    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "encoder", safe_serialization=True)
    encoder = ImageEncoder(f"local-dir:{tmp_path / 'encoder'}", image_size=64)
    model = ConceptModel(encoder, CBM(make_problem(encoder)))
    folder = save_pretrained(model, tmp_path / "model", include_encoder=False)
    assert torch.equal(from_pretrained(folder).predict(picture()).class_logit_BK, model.predict(picture()).class_logit_BK)

    torch.manual_seed(1)
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "encoder", safe_serialization=True)
    with pytest.raises(ValueError, match="others than those that the model was trained with"):
        from_pretrained(folder)

    (tmp_path / "encoder" / "model.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match=r"not the weights of its encoder(.|\n)*encoder/model\.safetensors"):
        from_pretrained(folder)


@pytest.mark.parametrize("trainable", [False, True])
def test_an_encoder_that_exists_nowhere_else_must_be_saved(tmp_path, trainable):
    with pytest.raises(ValueError, match="exists nowhere else"):
        save_pretrained(make_model(CBM, trainable=trainable), tmp_path / "model", include_encoder=False)


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        from_pretrained(tmp_path / "a.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of dotcbm"):
        from_pretrained(tmp_path / "b.ckpt")
