"""CIFAR through torchvision on a tiny archive in its pickled batch format, concept lists, and pseudo-labels in three formats."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import datasets

from dotcbm.data.cifar import CIFAR, read_concept_list

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FINE_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar cattle
    chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
    orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
FINE = tuple(FINE_NAMES.split())
HUNDRED = tuple(f"thing_{i}" for i in range(100))
LISTS = Path(__file__).parents[2] / "datasets"
NAN = float("nan")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_archive(
    root: Path, kind: type[datasets.CIFAR10], *, classes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> np.random.Generator:
    """Batches of 4 pictures, as the original ones; torchvision's list of checksums is replaced by theirs for the test."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, attribute):
            labels = [0, 1, 2, len(classes) - 1]
            with (folder / name).open("wb") as file:
                pickle.dump({"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), key: labels}, file)
            entries.append([name, md5(folder / name)])
        monkeypatch.setattr(kind, attribute, entries)
    meta = kind.meta["filename"]
    with (folder / meta).open("wb") as file:
        pickle.dump({kind.meta["key"]: list(classes)}, file)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(folder / meta)})
    return random


@pytest.fixture
def ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 with 20 training and 4 test pictures."""
    write_archive(tmp_path, datasets.CIFAR10, classes=TEN, monkeypatch=monkeypatch)
    return tmp_path


def concept_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_pictures_are_the_batches(ten: Path) -> None:
    source = CIFAR(str(ten), variant="cifar10", concepts_file=str(LISTS / "cifar10_concepts.txt"))
    train, test = source.load("train"), source.load("test")
    assert (len(train), len(test), source.splits) == (20, 4, ("train", "test"))
    with (ten / "cifar-10-batches-py/data_batch_2").open("rb") as file:
        raw = pickle.load(file)
    sample = pickle.loads(pickle.dumps(train))[5]
    assert torch.equal(sample.image, torch.from_numpy(raw["data"][1]).reshape(3, 32, 32))  # red, green, blue planes, row by row
    assert (sample.label, sample.name, sample.size) == (1, "train/00005", (32, 32))
    assert torch.equal(sample.concepts_M, source.concepts.class_concept_KM[1])
    assert train.fingerprint() != test.fingerprint()


def test_cifar100_takes_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path, datasets.CIFAR100, classes=HUNDRED, monkeypatch=monkeypatch)
    source = CIFAR(str(tmp_path), variant="cifar100", concepts_file=concept_file(tmp_path, "wet\nthing 99: wet\n"))
    assert source.concepts.class_names[99] == "thing 99"
    assert source.load("test").concept_NM[3].tolist() == [1.0]
    assert source.load("test").concept_NM[:3].isnan().all()


def test_concept_list_with_groups_and_classes(tmp_path: Path) -> None:
    path = Path(concept_file(tmp_path, "# note\nflies\n[body]\nfur\n two_legs \n\n[]\nred\nCat: fur\nbird: flies, two legs\n"))
    concepts = read_concept_list(path, class_names=TEN)
    assert concepts.names == ("flies", "fur", "two legs", "red")
    assert concepts.groups == ("flies", "body", "body", "red")
    torch.testing.assert_close(
        concepts.class_concept_KM[2:5],  # bird, cat, deer; nobody spoke of red, nor of deer
        torch.tensor([[1.0, 0, 1, NAN], [0.0, 1, 0, NAN], [NAN, NAN, NAN, NAN]]),
        equal_nan=True,
    )


def test_concept_list_of_class_lines_alone(tmp_path: Path) -> None:
    concepts = read_concept_list(Path(concept_file(tmp_path, "cat: fur, claws\ndog: fur, bark\n")), class_names=TEN)
    assert concepts.names == ("fur", "claws", "bark")
    assert concepts.class_concept_KM[3].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cta: fur\n", r"list.txt, line 1: no class 'cta'; .*did you mean 'cat'"),
        ("fur\nfur\n", r"line 2: the concept 'fur' is listed twice"),
        ("fur\ncat: furr\n", r"line 2: the concept 'furr' is not listed; did you mean 'fur'"),
        ("cat: fur\ncat: claws\n", r"line 2: the class 'cat' already has a line"),
        ("cat: fur, fur\n", r"line 1: 'fur' appears twice"),
        ("# nothing\n[body]\n", r"no concept in it"),
    ],
)
def test_bad_concept_lists(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_concept_list(Path(concept_file(tmp_path, text)), class_names=TEN)


@pytest.mark.parametrize(("file", "classes"), [("cifar10_concepts.txt", TEN), ("cifar100_concepts.txt", FINE)])
def test_the_lists_that_are_shipped_tell_the_classes_apart(file: str, classes: tuple[str, ...]) -> None:
    concepts = read_concept_list(LISTS / file, class_names=classes)
    assert not concepts.class_concept_KM.isnan().any()
    assert len({tuple(row) for row in concepts.class_concept_KM.tolist()}) == len(classes) in (10, 100)
    assert concepts.class_concept_KM.sum(0).min() >= 1  # each concept belongs to a class
    assert concepts.class_concept_KM.sum(0).max() < len(classes)  # and tells some class from another
    assert concepts.groups is not None
    assert set(concepts.groups).isdisjoint(concepts.names)  # each stands under a heading


@pytest.mark.parametrize("form", ["npy", "csv", "safetensors"])
def test_pseudo_labels(ten: Path, form: str) -> None:
    random = np.random.default_rng(1)
    scores = {"train": random.random((20, 2)).astype(np.float32), "test": random.random((4, 2)).astype(np.float32)}
    scores["train"][0, 1] = np.nan
    scores["test"][0] = (0.5, 0.49)
    path = "scores_{split}." + form if form != "safetensors" else "scores.safetensors"
    for split, array in scores.items():
        file = ten / path.replace("{split}", split)
        if form == "npy":
            np.save(file, array)
        elif form == "csv":  # the columns may come in any order
            file.write_text("wet,fur\n" + "".join(f"{'' if np.isnan(b) else b},{a}\n" for a, b in array))
    if form == "safetensors":
        save_file({split: torch.from_numpy(array) for split, array in scores.items()}, ten / path)
    source = CIFAR(str(ten), variant="cifar10", concepts_file=concept_file(ten, "fur\nwet\ncat: fur\n"), pseudo_labels=str(ten / path))
    train, test = source.load("train"), source.load("test")
    assert test.concept_NM[0].tolist() == [1.0, 0.0]
    expected = np.where(np.isnan(scores["train"]), np.nan, scores["train"] >= 0.5)
    np.testing.assert_array_equal(train.concept_NM.numpy(), expected)
    np.testing.assert_allclose(
        source.concepts.class_concept_KM[0].numpy(), np.nanmean(expected[0::4], axis=0)
    )  # every fourth is an airplane
    assert source.concepts.class_concept_KM[3].isnan().all()  # no cat in these batches


def test_bad_pseudo_labels(ten: Path) -> None:
    concepts = concept_file(ten, "fur\nwet\n")

    def load(path: str) -> None:
        CIFAR(str(ten), variant="cifar10", concepts_file=concepts, pseudo_labels=str(ten / path)).load("test")

    with pytest.raises(ValueError, match=r"s_train.npy: no such file; expected \(20, 2\) scores"):
        load("s_{split}.npy")
    np.save(ten / "s_train.npy", np.zeros((20, 3)))
    with pytest.raises(ValueError, match=r"shape \(20, 3\) for 'train'; 20 pictures and 2 concepts of .*list.txt need \(20, 2\)"):
        load("s_{split}.npy")
    np.save(ten / "s_train.npy", np.full((20, 2), -0.2))
    with pytest.raises(ValueError, match=r"picture 0, concept 'fur': the score -0.2 is not in \[0, 1\]"):
        load("s_{split}.npy")
    np.save(ten / "s_train.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as a NumPy array of numbers"):
        load("s_{split}.npy")
    (ten / "s_train.csv").write_text("fur,wett\n1,0\n")
    with pytest.raises(ValueError, match=r"no column 'wet' .*did you mean 'wett'"):
        load("s_{split}.csv")
    (ten / "s_train.csv").write_text("fur,wet\n1,0\n1,no\n")
    with pytest.raises(ValueError, match=r"s_train.csv, row 3, column 'wet': 'no' is no number"):
        load("s_{split}.csv")
    save_file({"training": torch.zeros(20, 2)}, ten / "s.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'train'; it holds \['training'\]"):
        load("s.safetensors")
    (ten / "s.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load("s.safetensors")
    with pytest.raises(ValueError, match=r"one file for two splits; write '\{split\}'"):
        load("s.npy")
    with pytest.raises(ValueError, match=r"ends in '.pt'; expected .npy, .csv or .safetensors"):
        load("s.pt")


def test_a_missing_or_damaged_archive_says_where_and_how(ten: Path) -> None:
    concepts = concept_file(ten, "fur\n")
    with pytest.raises(
        ValueError, match=r"cifar100 was looked for in .*cifar-100-python: no such folder; set download=True, or unpack https://"
    ):
        CIFAR(str(ten), variant="cifar100", concepts_file=concepts).load("train")
    (ten / "cifar-10-batches-py/data_batch_3").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"the files \['data_batch_3'\] are damaged"):
        CIFAR(str(ten), variant="cifar10", concepts_file=concepts).load("test")
    (ten / "cifar-10-batches-py/batches.meta").unlink()
    with pytest.raises(ValueError, match=r"the files \['batches.meta'\] are missing"):
        CIFAR(str(ten), variant="cifar10", concepts_file=concepts).load("test")


def test_settings_are_checked_before_anything_is_read(ten: Path) -> None:
    with pytest.raises(ValueError, match="variant='cifar'; expected 'cifar10' or 'cifar100'"):
        CIFAR(str(ten), variant="cifar", concepts_file="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no split 'val'"):
        CIFAR(str(ten), variant="cifar10", concepts_file="x").load("val")
    with pytest.raises(ValueError, match=r"x.txt: no such file; expected one concept a line"):
        CIFAR(str(ten), variant="cifar10", concepts_file=str(ten / "x.txt")).load("train")


def test_nothing_is_fetched_unless_asked(ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: object) -> None:
        raise OSError("no way out")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    concepts = concept_file(ten, "fur\n")
    assert len(CIFAR(str(ten), variant="cifar10", concepts_file=concepts).load("test")) == 4
    with pytest.raises(ValueError, match=r"could not be fetched or unpacked into .*\(no way out\); set download=True, or unpack"):
        CIFAR(str(ten), variant="cifar10", concepts_file=concepts, download=True).load("test")
