"""A teacher's similarities, cached, and the labels made of them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.source import CONCEPTS, TinySource
from torch import Tensor

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.teacher import TaughtConcepts, Teacher, teacher_similarities
from dotcbm.data.transforms import prepare_picture
from dotcbm.structures import Preprocessing

PREPROCESSING = Preprocessing(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Colours(Teacher):
    """Says how red and how green a picture is, by its mean colours, in units of its own; and counts what it is asked."""

    def __init__(self, version: str = "1", answer: Any = None) -> None:
        self.version = version
        self.answer = answer
        self.num_asked = 0

    @property
    def preprocessing(self) -> Preprocessing:
        return PREPROCESSING

    def similarities(self, image_B3HW: Tensor, names: Sequence[str]) -> Tensor:
        self.num_asked += len(image_B3HW)
        if self.answer is not None:
            return self.answer(image_B3HW)
        brightness_B3 = image_B3HW.mean((2, 3))
        columns = [50 * brightness_B3[:, j % 2] - 7 for j in range(len(names))]
        return torch.stack([0 * column if name == "unknown" else column for name, column in zip(names, columns, strict=True)], 1)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.version.encode()).hexdigest()


def taught(tmp_path: Path | None = None, **settings: Any) -> TaughtConcepts:
    settings = {"teacher": Colours(), "cache_dir": None if tmp_path is None else str(tmp_path), **settings}
    return TaughtConcepts(settings.pop("source", TinySource()), **settings)


def test_similarities_are_the_teachers_row_by_row() -> None:
    dataset = TinySource().load("test")
    found = teacher_similarities(dataset, teacher=Colours(), names=CONCEPTS, directory=None, batch_size=5)
    for row in (0, 4, 5, 15):
        picture = dataset.sample(row).image
        assert picture is not None
        alone = Colours().similarities(prepare_picture(picture, preprocessing=PREPROCESSING)[None], CONCEPTS)[0]
        assert torch.allclose(found[row], alone, atol=1e-5)
    assert found.shape == (16, 5)


def test_they_are_computed_once_for_each_teacher_names_and_pictures(tmp_path: Path) -> None:
    def ask(teacher: Colours, *, names: Sequence[str] = CONCEPTS, source: TinySource | None = None) -> int:
        dataset = (source or TinySource()).load("test")
        teacher_similarities(dataset, teacher=teacher, names=names, directory=tmp_path)
        return teacher.num_asked

    assert ask(Colours()) == 16
    assert ask(Colours()) == 0
    assert ask(Colours("2")) == 16
    assert ask(Colours(), names=CONCEPTS[::-1]) == 16
    assert ask(Colours(), source=TinySource(size=(48, 64))) == 16

    class Larger(Colours):
        @property
        def preprocessing(self) -> Preprocessing:
            return replace(PREPROCESSING, size=(32, 32))

    assert ask(Larger()) == 16
    assert len(list(tmp_path.iterdir())) == 5  # and no scratch file
    first = teacher_similarities(TinySource().load("test"), teacher=Colours(), names=CONCEPTS, directory=None)
    again = teacher_similarities(TinySource().load("test"), teacher=Colours(), names=CONCEPTS, directory=tmp_path)
    assert torch.equal(first, again)


def test_damaged_files_are_computed_again(tmp_path: Path) -> None:
    dataset = TinySource().load("test")

    def ask() -> Tensor:
        return teacher_similarities(dataset, teacher=Colours(), names=CONCEPTS, directory=tmp_path)

    whole = ask()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    for damaged, reason in ((bytes(content), "checksum"), (b"nonsense", "cannot be used"), (content[:-8], "cannot be used")):
        path.write_bytes(bytes(damaged))
        with pytest.warns(UserWarning, match=reason):
            assert torch.equal(ask(), whole)
        assert torch.equal(ask(), whole)


def test_scores_are_an_affine_map_of_similarities() -> None:
    source = taught(val_fraction=0.0)
    train = source.load("train")
    said = teacher_similarities(TinySource().load("train"), teacher=Colours(), names=CONCEPTS, directory=None)
    for j in range(4):
        column = train.concept_NM[:, j]
        assert column.min() == 0
        assert column.max() == 1
        slope = (said[1, j] - said[0, j]) / (column[1] - column[0])
        assert torch.allclose(said[:, j] - said[0, j], slope * (column - column[0]), atol=1e-3)
    assert (train.concept_NM[:, 4] == 0.5).all()  # equally similar to everything
    expected = torch.stack([train.concept_NM[train.label_N == k].mean(0) for k in range(4)])
    assert torch.allclose(source.concepts.class_concept_KM, expected, atol=1e-6)
    assert source.concepts.names == TinySource().concepts.names
    assert source.concepts.parts == TinySource().concepts.parts


def test_only_training_labels_are_the_teachers() -> None:
    source, own = taught(), TinySource()
    assert source.splits == ("train", "val", "test")
    train, val, test = (source.load(split) for split in source.splits)
    assert not torch.isin(train.concept_NM, torch.tensor([0.0, 0.5, 1.0])).all()
    whole = own.load("train")
    assert sorted((*train.names, *val.names)) == sorted(whole.names)
    assert torch.bincount(val.label_N).tolist() == [2, 2, 2, 2]  # 15 % of each ten, rounded
    for dataset, original in ((val, whole), (test, own.load("test"))):
        rows = [original.names.index(name) for name in dataset.names]
        assert torch.equal(dataset.concept_NM.nan_to_num(-1), original.concept_NM[rows].nan_to_num(-1))
        assert torch.equal(dataset.concepts.class_concept_KM, source.concepts.class_concept_KM)
    assert taught(seed=1).load("val").names != val.names


def test_the_range_is_that_of_the_training_part_alone() -> None:
    source = taught()
    assert source.load("train").concept_NM[:, :4].amin(0).tolist() == [0.0] * 4
    assert source.load("train").concept_NM[:, :4].amax(0).tolist() == [1.0] * 4


def test_a_validation_split_of_the_source_is_kept() -> None:
    source = taught(source=TinySource(counts=(("train", 40), ("val", 8), ("test", 8))))
    assert source.splits == ("train", "val", "test")
    assert len(source.load("train")) == 40
    assert len(source.load("val")) == 8
    assert taught(val_fraction=0.0).splits == ("train", "test")


def test_pictures_keep_the_key_of_their_features() -> None:
    assert taught(val_fraction=0.0).load("train").fingerprint() == TinySource().load("train").fingerprint()
    assert taught().load("test").fingerprint() == TinySource().load("test").fingerprint()


def test_a_class_without_a_training_picture_is_unknown() -> None:
    source = taught(source=TinySource(missing_class=2), val_fraction=0.0)
    assert source.concepts.class_concept_KM[2].isnan().all()
    assert not source.concepts.class_concept_KM[[0, 1, 3]].isnan().any()


def test_another_validation_part_asks_nothing_again(tmp_path: Path) -> None:
    first, second = Colours(), Colours()
    taught(tmp_path, teacher=first).load("train")
    taught(tmp_path, teacher=second, val_fraction=0.3, seed=5).load("train")
    assert (first.num_asked, second.num_asked) == (40, 0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda image: torch.zeros(len(image), 3), r"shape \(32, 3\) for 32 pictures and 5 concepts; expected \(32, 5\)"),
        (lambda image: torch.full((len(image), 5), torch.nan), "train/000.png: the teacher's similarity to 'red' is nan"),
    ],
)
def test_impossible_answers_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taught(teacher=Colours(answer=answer)).load("train")


def test_bad_input_is_refused() -> None:
    for settings, message in (({"val_fraction": 1.0}, "val_fraction is 1.0"), ({"batch_size": 0}, "batch_size is 0")):
        with pytest.raises(ValueError, match=message):
            taught(**settings)
    with pytest.raises(ValueError, match="has no split 'else', only train, val, test"):
        taught().load("else")
    with pytest.raises(ValueError, match="the split 'train' is empty"):
        taught(source=TinySource(counts=(("train", 0), ("test", 4)))).load("train")


def test_a_source_without_labels_can_be_taught(tmp_path: Path) -> None:
    class Unlabelled(ConceptSource):
        concepts = replace(TinySource().concepts, class_concept_KM=torch.full((4, 5), torch.nan))
        splits = ("train", "test")

        def load(self, split: str) -> ConceptDataset:
            dataset = TinySource().load(split)
            return replace(dataset, concepts=self.concepts, concept_NM=torch.full_like(dataset.concept_NM, torch.nan))

    source = taught(source=Unlabelled())
    assert not source.load("train").concept_NM.isnan().any()
    assert source.load("test").concept_NM.isnan().all()
    assert not source.concepts.class_concept_KM.isnan().any()


def tiny_clip(directory: Path) -> tuple[Path, Any]:
    """A random open_clip model on disk, in open_clip's own format."""
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    directory.mkdir(parents=True)
    told = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear"}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": told}))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, directory / "open_clip_model.safetensors")
    return directory, model


def test_a_clip_model_teaches_cosines(tmp_path: Path) -> None:
    import open_clip

    from dotcbm.training.clip_teacher import ClipTeacher

    directory, model = tiny_clip(tmp_path / "clip")
    teacher = ClipTeacher(f"local-dir:{directory}")
    assert teacher.preprocessing.size == (32, 32)
    assert teacher.preprocessing.resize == "crop"
    pictures = torch.randn(3, 3, 32, 32)
    tokens = open_clip.get_tokenizer(f"local-dir:{directory}")([f"a photo of {name}" for name in CONCEPTS])
    with torch.no_grad():
        expected = model.encode_image(pictures, normalize=True) @ model.encode_text(tokens, normalize=True).T
    assert torch.allclose(teacher.similarities(pictures, CONCEPTS), expected, atol=1e-5)
    assert teacher.similarities(pictures, CONCEPTS[:2]).shape == (3, 2)
    fingerprints = {
        teacher.fingerprint(),
        ClipTeacher(f"local-dir:{directory}", templates=["{}"]).fingerprint(),
        ClipTeacher(f"local-dir:{directory}", resize="squash").fingerprint(),
        ClipTeacher(f"local-dir:{directory}", image_size=64).fingerprint(),
    }
    assert len(fingerprints) == 4
    with pytest.raises(ValueError, match="no image-text model is called 'timm/resnet18'"):
        ClipTeacher("timm/resnet18")
    with pytest.raises(ValueError, match="needs exactly one"):
        ClipTeacher(f"local-dir:{directory}", templates=["no place"])


def test_a_taught_source_in_a_config_trains_a_label_free_bottleneck(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from dotcbm.catalog import subclasses
    from dotcbm.cli.config_parser import ConfigParser
    from dotcbm.encoders.image import ImageEncoder
    from dotcbm.models.label_free import LabelFreeCBM
    from dotcbm.training.task import ConceptTask

    directory, _ = tiny_clip(tmp_path / "clip")
    subclasses(ConceptSource, package="dotcbm.data")
    config = tmp_path / "config.yaml"
    config.write_text(
        "source:\n  class_path: TaughtConcepts\n  init_args:\n"
        f"    cache_dir: {tmp_path / 'cache'}\n    val_fraction: 0.2\n"
        "    source:\n      class_path: Synthetic\n"
        "      init_args: {size: 64, num_train: 24, num_val: 8, num_test: 8, num_classes: 4}\n"
        "    teacher:\n      class_path: dotcbm.training.clip_teacher.ClipTeacher\n"
        f"      init_args: {{name: 'local-dir:{directory}'}}\n"
    )
    parser = ConfigParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--source", type=ConceptSource)
    source = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).source
    assert isinstance(source, TaughtConcepts)
    assert "ClipTeacher" in repr(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ConceptDataModule(source, batch_size=8, cache_dir=str(tmp_path / "features"))
        encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)
        task = ConceptTask(encoder, LabelFreeCBM, lr=1e-2, head_l2=1e-2)
        trainer = pl.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(task, datamodule=data)
        assert "val/concept_auroc" in trainer.callback_metrics  # against the source's own labels
        figures = trainer.test(task, datamodule=data, verbose=False)[0]
    assert 0 <= figures["test/accuracy"] <= 1
