"""The road of a user from a config to a file of predictions, walked on a tiny synthetic set."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from dotcbm.cli import main
from dotcbm.data.synthetic import Synthetic
from dotcbm.hub import from_pretrained
from dotcbm.training.task import ConceptTask

CONF = Path(__file__).parent / "conf"
TINY = str(CONF / "tiny.yaml")


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run in `runs/tiny`."""
    folder = tmp_path_factory.mktemp("home")
    with inside(folder):
        assert main(["fit", "--config", TINY]) == 0
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def pictures(folder: Path, num: int = 3) -> Path:
    """Drawn creatures as PNG files."""
    from torchvision.io import write_png

    folder.mkdir(parents=True, exist_ok=True)
    dataset = Synthetic(size=64, num_train=1, num_val=1, num_test=num).load("test")
    for row in range(num):
        write_png(dataset.read_image(row), str(folder / f"{row}.png"))
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_fit_writes_a_run(home):
    run = home / "runs" / "tiny"
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/model.ckpt", "model/model.safetensors"):
        assert (run / name).is_file(), name
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["source"]["init_args"]["num_train"] == 48
    assert saved["model"]["bottleneck"]["init_args"]["eps"] == 0.1  # a default
    card = (run / "model" / "README.md").read_text()
    assert "val/concept_auroc" in card
    assert "num_train=48" in card


def test_folder_and_checkpoint_are_the_same_model(home):
    """The checkpoint lacks the frozen encoder, which comes from where it came from in training."""
    import timm

    timm.models.save_for_hf(timm.create_model("test_vit"), home / "encoder", safe_serialization=True)
    arguments = [f"--model.encoder.name=local-dir:{home / 'encoder'}", "--model.encoder.pretrained=true"]
    assert main(["fit", "--config", TINY, "--run_dir", "runs/local", *arguments]) == 0
    run, picture = home / "runs" / "local", pictures(home / "photos") / "0.png"
    folder, checkpoint = (from_pretrained(run / name).predict(picture) for name in ("model", "checkpoints/model.ckpt"))
    assert torch.equal(folder.class_logit_BK, checkpoint.class_logit_BK)
    assert torch.equal(folder.concept_logit_BM, checkpoint.concept_logit_BM)
    with pytest.warns(UserWarning, match="before its class head was fitted"):
        from_pretrained(run / "checkpoints" / "last.ckpt")


def test_a_trained_encoder_is_in_the_checkpoint(home):
    assert main(["fit", "--config", TINY, "--run_dir", "runs/joint", "--model.encoder.trainable=true"]) == 0
    run, picture = home / "runs" / "joint", pictures(home / "photos") / "0.png"
    folder, checkpoint = (from_pretrained(run / name).predict(picture) for name in ("model", "checkpoints/model.ckpt"))
    assert torch.equal(folder.class_logit_BK, checkpoint.class_logit_BK)


def test_a_random_frozen_encoder_is_not_in_the_checkpoint(home):
    with pytest.raises(ValueError, match="drawn at random"):
        from_pretrained(home / "runs" / "tiny" / "checkpoints" / "model.ckpt")


def test_a_finished_run_is_not_overwritten_by_mistake(home, capsys):
    before = (home / "runs" / "tiny" / "metrics.csv").read_text()
    assert main(["fit", "--config", TINY]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (home / "runs" / "tiny" / "metrics.csv").read_text() == before


def test_a_run_can_be_repeated_from_its_own_config(home):
    config = str(home / "runs" / "tiny" / "config.yaml")
    assert main(["fit", "--config", config, "--run_dir", "runs/again"]) == 0
    first, second = (weights(home / "runs" / name / "checkpoints" / "model.ckpt") for name in ("tiny", "again"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_config_of_a_run_is_read_by_the_other_commands(home, capsys):
    for extra in ([], ["--overwrite"], ["--resume"]):
        assert main(["fit", "--config", TINY, "--run_dir", "runs/read", *extra]) == 0
        assert not {"resume", "overwrite", "ckpt_path"} & yaml.safe_load(Path("runs/read/config.yaml").read_text()).keys()
        assert main(["test", "--config", "runs/read/config.yaml"]) == 0
        assert str(Path("runs/read/checkpoints/model.ckpt")) in capsys.readouterr().out


def test_a_run_that_was_interrupted_ends_with_the_same_weights(home, monkeypatch):
    def stop(task: ConceptTask) -> None:
        if task.current_epoch == 1:
            raise KeyboardInterrupt

    start = ConceptTask.on_train_epoch_start
    said: list[str] = []
    monkeypatch.setattr(ConceptTask, "on_train_epoch_start", lambda task: (stop(task), start(task)))
    monkeypatch.setattr("dotcbm.training.checkpoints.rank_zero_info", said.append)
    monkeypatch.setattr("sys.argv", ["dotcbm", "fit", "--config", TINY, "--run_dir", "runs/stopped"])
    assert main(["fit", "--config", TINY, "--run_dir", "runs/stopped"]) == 130
    assert f"dotcbm fit --config {TINY} --run_dir runs/stopped --ckpt_path runs/stopped/checkpoints/last.ckpt" in said[-1]
    assert not (home / "runs" / "stopped" / "model").exists()

    monkeypatch.undo()
    monkeypatch.chdir(home)
    assert main(["fit", "--config", TINY, "--run_dir", "runs/stopped", "--resume"]) == 0
    through, resumed = (weights(home / "runs" / name / "checkpoints" / "model.ckpt") for name in ("tiny", "stopped"))
    for name, value in through.items():
        assert torch.equal(value, resumed[name]), name
    assert (home / "runs" / "stopped" / "metrics-1.csv").is_file()


def test_nothing_to_resume_from(capsys):
    assert main(["fit", "--config", TINY, "--run_dir", "runs/fresh", "--resume"]) == 1
    assert "nothing to resume from" in capsys.readouterr().err


def test_test_prints_and_writes_figures(home, capsys):
    assert main(["test", "--config", TINY]) == 0
    shown = capsys.readouterr().out
    assert "test_ood" in shown
    assert "pointing_mask_plan" in shown
    found = json.loads((home / "runs" / "tiny" / "test.json").read_text())
    assert found["splits"]["test"]["num_pictures"] == 16
    assert 0 <= found["splits"]["test_ood"]["concept_auroc"] <= 1
    assert yaml.safe_load((home / "runs" / "tiny" / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_test_with_a_checkpoint_and_a_place_for_its_figures(home):
    checkpoint = str(home / "runs" / "tiny" / "checkpoints" / "model.ckpt")
    arguments = ["test", "--config", TINY, "--run_dir", "nowhere", "--ckpt_path", checkpoint, "--out", "out/figures.json"]
    assert main(arguments) == 0
    assert json.loads(Path("out/figures.json").read_text())["checkpoint"] == checkpoint
    assert not Path("nowhere/config.yaml").exists()


def test_validate(capsys):
    assert main(["validate", "--config", TINY]) == 0
    assert "concept_auroc" in capsys.readouterr().out


def test_test_before_fit(capsys):
    assert main(["test", "--config", TINY, "--run_dir", "runs/none"]) == 1
    assert "train first" in capsys.readouterr().err


def test_predict_a_split(home):
    import pyarrow.parquet as pq

    assert main(["predict", "--config", TINY, "--out", "p/split.parquet"]) == 0
    assert main(["predict", "--config", TINY, "--out", "p/split.csv"]) == 0
    table = pq.read_table("p/split.parquet").to_pylist()
    rows = rows_of(Path("p/split.csv"))
    assert len(table) == len(rows) == 16
    assert list(table[0]) == list(rows[0])
    concepts = [value for name, value in table[0].items() if name.startswith("concept: ")]
    classes = {name.removeprefix("class: "): value for name, value in table[0].items() if name.startswith("class: ")}
    assert len(concepts) == Synthetic().concepts.num_concepts
    assert all(0 <= value <= 1 for value in concepts)
    assert sum(classes.values()) == pytest.approx(1, abs=1e-5)
    assert table[0]["predicted_class"] == max(classes, key=lambda name: classes[name])
    assert float(rows[0]["predicted_probability"]) == pytest.approx(table[0]["predicted_probability"], rel=1e-4)
    assert sorted(path.name for path in Path("p").iterdir()) == ["split.csv", "split.parquet"]


@pytest.mark.parametrize("road", ["pictures", "config"])
def test_predict_skips_what_cannot_be_decoded_and_names_it(home, capfd, road):
    photos = pictures(home / f"mixed-{road}")
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:60])
    out = Path(f"{road}.csv")
    if road == "pictures":
        status = main(["predict", str(photos), "--checkpoint", "runs/tiny/model", "--out", str(out), "--batch-size", "2"])
    else:
        status = main(["predict", "--config", TINY, "--out", str(out), f"--data.predict_files=[{photos}]"])
    assert status == 0
    shown = capfd.readouterr()
    assert "broken.png" in shown.out + shown.err
    assert "1 skipped" in shown.out
    assert [Path(row["picture"]).name for row in rows_of(out)] == ["0.png", "1.png", "2.png"]


def test_both_roads_predict_the_same(home):
    photos = pictures(home / "same")
    assert main(["predict", str(photos), "--checkpoint", "runs/tiny/model", "--out", "one.csv"]) == 0
    assert main(["predict", "--config", TINY, "--out", "two.csv", f"--data.predict_files=[{photos}]"]) == 0
    for one, two in zip(rows_of(Path("one.csv")), rows_of(Path("two.csv")), strict=True):
        assert one.pop("picture") == two.pop("picture")
        assert one.pop("predicted_class") == two.pop("predicted_class")
        assert [float(v) for v in one.values()] == pytest.approx([float(v) for v in two.values()], abs=1e-4)


def test_fit_does_not_skip_what_cannot_be_decoded(home, capsys):
    root = home / "pictures"
    lines = ["image,class,red,round"]
    for row, path in enumerate(sorted(pictures(root / "images", num=12).iterdir(), key=lambda path: int(path.stem))):
        lines.append(f"{path.name},{'cat' if row % 2 else 'dog'},{row % 2},{row % 3 == 0:d}")
    (root / "concepts.csv").write_text("\n".join(lines))
    arguments = ["fit", "--config", str(CONF / "folder.yaml"), "--data.source.root", str(root)]
    assert main([*arguments, "--run_dir", "runs/folder"]) == 0
    shutil.rmtree("cache")
    (root / "images" / "5.png").write_bytes(b"no picture")
    assert main([*arguments, "--run_dir", "runs/broken"]) == 1
    shown = capsys.readouterr().err
    assert "5.png" in shown
    assert "cannot be decoded" in shown


def test_a_checkpoint_with_other_concepts(capsys):
    assert main(["test", "--config", TINY, "--data.source.num_classes", "5"]) == 1
    assert "the classes of the data (5) are not those of the checkpoint (8)" in capsys.readouterr().err


def test_a_checkpoint_of_another_encoder(capsys):
    assert main(["test", "--config", TINY, "--seed_everything", "1"]) == 1  # other random weights
    assert "made with another encoder" in capsys.readouterr().err


def test_weights_that_are_missing_offline(capsys):
    assert main(["fit", "--config", TINY, "--run_dir", "runs/x", "--model.encoder.pretrained", "true"]) == 1
    shown = capsys.readouterr().err
    assert "not on this machine" in shown
    assert "Looked at:" in shown
    assert "allow_download" in shown
    assert not Path("runs/x").exists()


@pytest.mark.parametrize("kind", ["truncated", "folder", "missing"])
def test_a_checkpoint_that_is_none(home, capsys, kind):
    path = home / f"{kind}.ckpt"
    if kind == "truncated":
        path.write_bytes((home / "runs/tiny/checkpoints/model.ckpt").read_bytes()[:5000])
    if kind == "folder":
        path = home / "runs" / "tiny" / "model"
    assert main(["test", "--config", TINY, "--ckpt_path", str(path)]) == 1
    expected = {"truncated": "is it truncated?", "folder": "is a folder", "missing": "no such checkpoint"}[kind]
    assert expected in capsys.readouterr().err


def test_a_full_disk_while_the_model_is_saved(home, capsys, monkeypatch):
    """The whole run fits; the last file does not."""
    import resource

    import dotcbm.hub

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = dotcbm.hub._write_weights

    def on_full_disk(path, tensors):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            write(path, tensors)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(dotcbm.hub, "_write_weights", on_full_disk)
    assert main(["fit", "--config", TINY, "--run_dir", "runs/full"]) == 1
    assert "model.safetensors could not be written" in capsys.readouterr().err
    assert sorted(path.name for path in Path("runs/full").iterdir()) == ["checkpoints", "config.yaml", "metrics.csv"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "class_path: PublishedDotCBM",
            "class_path: DotCMB",
            "line 9: model.bottleneck: there is no class 'DotCMB'; did you mean DotCBM?",
        ),
        ("class_path: Synthetic", "class_path: Sinthetic", "line 17: data.source: there is no class 'Sinthetic'; did you mean Synthetic?"),
        ("dim: 16", "dimm: 16", "line 11: model.bottleneck: there is no option 'dimm'; did you mean dim?"),
        ("size: 64\n      num", "siz: 64\n      num", "line 19: data.source: there is no option 'siz'; did you mean size?"),
        ("max_epochs", "max_epoks", "line 25: there is no option 'trainer.max_epoks'; did you mean trainer.max_epochs?"),
        ("data:", "dat:", "; did you mean data?"),
        ("pretrained: false", "pretrain: false", "there is no option 'pretrain'; did you mean pretrained?"),
        ("lr: 0.003", "lr: fast", "model.lr"),
        ("model:", "model: [", "is no YAML"),
    ],
)
def test_a_config_with_a_mistake(tmp_path, capsys, old, new, said):
    text = Path(TINY).read_text()
    assert text.count(old) == 1
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    assert main(["fit", "--config", str(path)]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert str(path) in shown
    assert len(shown.splitlines()) < 8


def test_a_config_that_is_not_there(capsys):
    assert main(["fit", "--config", TINY.replace("tiny", "tinny")]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_an_option_with_a_mistake(capsys):
    assert main(["fit", "--config", TINY, "--model.lrr", "3"]) == 2
    assert "did you mean --model.lr?" in capsys.readouterr().err


def test_print_config(capsys):
    assert main(["fit", "--config", TINY, "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["bottleneck"]["init_args"]["dim"] == 16
    assert shown["model"]["lr_halve_every"] == 10  # a default


def test_demo(home, tmp_path, capsys):
    """The demo's road with a demo's settings made tiny; its own settings are run by `make demo`."""
    tiny = ["--data.source.num_train=24", "--data.source.num_val=8", "--data.source.num_test=8", "--trainer.max_epochs=1"]
    assert main(["demo", "--out", str(tmp_path / "demo"), *tiny]) == 0
    shown = capsys.readouterr().out
    for row in ("concepts: AUROC", "classes: accuracy", "plan: peak in the part's exact mask", "patch prior alone"):
        assert row in shown
    names = ["concepts.png", "creature-1.png", "creature-2.png", "creature-3.png", "creature-4.png", "pictures", "run"]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == names


def test_demo_with_a_mistake(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--data.source.num_trian=24"]) == 2
    assert "num_trian" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONF.parent.parent.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_understood(path, capsys):
    assert main(["fit", "--config", str(path), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["bottleneck"]["class_path"]
