"""The commands that need no Lightning, and what is said when something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dotcbm.cli import COMMANDS, main
from dotcbm.cli.export import export_model
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import save_pretrained
from dotcbm.models import published_dot_cbm
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import Problem
from dotcbm.transport.sinkhorn import sinkhorn

SOURCE = Synthetic(size=64, num_train=4, num_val=1, num_test=4)


def make_model(kind: type[Bottleneck] = PublishedDotCBM, **settings) -> ConceptModel:
    torch.manual_seed(0)
    encoder = ImageEncoder("timm/test_vit", image_size=64, pretrained=False)
    return ConceptModel(encoder, kind(Problem(encoder.width, encoder.global_width, encoder.grid, SOURCE.concepts), **settings)).eval()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(make_model(dim=8, iterations=2), tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(2):
        Image.fromarray(SOURCE.picture("test", row).permute(1, 2, 0).numpy()).save(folder / f"creature {row}.png")
    return folder


def run_python(code: str, *, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, what) in COMMANDS.items():
        assert f"  {name} " in shown
        assert what in shown


def test_no_command(capsys):
    assert main([]) == 2
    assert "usage: dotcbm" in capsys.readouterr().out


def test_a_misspelt_command(capsys):
    assert main(["explian", "a.png"]) == 2
    assert "did you mean `dotcbm explain`?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["explain", "a.png", "--chekpoint", "x"], ["export", "--checkpoint", "x", "--outt", "y"]])
def test_a_misspelt_option(capsys, arguments):
    assert main(arguments) == 2
    assert "--checkpoint" in (shown := capsys.readouterr().err) or "--out" in shown


def test_explain_writes_a_figure_and_a_record_for_each_picture(model_folder, photos, tmp_path, capsys):
    out = tmp_path / "why"
    assert main(["explain", str(photos), "--checkpoint", str(model_folder), "--out", str(out), "--top", "3"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"creature {row}.{kind}" for row in range(2) for kind in ("json", "png")]
    found = json.loads((out / "creature 0.json").read_text())
    assert found["picture"] == str(photos / "creature 0.png")
    assert len(found["top_concepts"]) <= 3
    assert len(found["concepts"]) == SOURCE.concepts.num_concepts
    first = next(concept for concept in found["concepts"] if concept["name"] == found["top_concepts"][0])
    assert 0 <= first["probability"] <= 1
    assert first["contribution"] == pytest.approx(first["weight"] * first["probability"], abs=1e-5)
    assert len(first["box"]) == 4
    assert len(first["peak"]) == 2
    total = sum(concept["contribution"] for concept in found["concepts"]) + found["target_bias"]
    assert total == pytest.approx(found["target_logit"], abs=1e-4)
    with Image.open(out / "creature 0.png") as figure:
        pixels = np.asarray(figure.convert("L"))
    assert min(pixels.shape) > 300
    assert pixels.std() > 10
    assert found["top_concepts"][0] in capsys.readouterr().out


def test_explain_another_class(model_folder, photos, tmp_path, capsys):
    arguments = ["explain", str(photos / "creature 0.png"), "--checkpoint", str(model_folder), "--out", str(tmp_path / "why")]
    assert main([*arguments, "--class", "Bramble"]) == 0
    assert json.loads((tmp_path / "why" / "creature 0.json").read_text())["target_class"] == "Bramble"
    assert main([*arguments, "--class", "Brambel"]) == 1
    assert "did you mean one of ['Bramble'" in capsys.readouterr().err


def test_explain_goes_on_after_a_picture_that_cannot_be_decoded(model_folder, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"no picture")
    assert main(["explain", str(photos), "--checkpoint", str(model_folder), "--out", str(tmp_path / "why")]) == 1
    shown = capsys.readouterr().err
    assert "broken.png" in shown
    assert "1 of 3 pictures could not be read" in shown
    assert len(list((tmp_path / "why").glob("*.png"))) == 2


def test_explain_pictures_of_one_name(model_folder, photos, tmp_path):
    (photos / "more").mkdir()
    (photos / "more" / "creature 0.png").write_bytes((photos / "creature 1.png").read_bytes())
    assert main(["explain", str(photos), "--checkpoint", str(model_folder), "--out", str(tmp_path / "why")]) == 0
    assert {path.name for path in (tmp_path / "why").glob("*.json")} == {"creature 0.json", "creature 0-2.json", "creature 1.json"}


@pytest.mark.parametrize(("places", "said"), [(["nix.png"], "nix.png: no such picture or folder"), (["."], "no picture in this folder")])
def test_explain_nothing(model_folder, tmp_path, monkeypatch, capsys, places, said):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *places, "--checkpoint", str(model_folder)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain", "predict"])
def test_a_checkpoint_that_is_not_there(photos, tmp_path, capsys, command):
    out = ["--out", str(tmp_path / "x.csv")]
    assert main([command, str(photos), "--checkpoint", str(tmp_path / "nix"), *out]) == 1
    assert "no such folder or file" in capsys.readouterr().err


def test_predict_to_another_kind_of_file(model_folder, photos, capsys):
    assert main(["predict", str(photos), "--checkpoint", str(model_folder), "--out", "x.xlsx"]) == 1
    assert "must be .parquet or .csv" in capsys.readouterr().err


def test_predict_without_one_good_picture(model_folder, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert main(["predict", str(tmp_path), "--checkpoint", str(model_folder), "--out", str(tmp_path / "x.csv")]) == 1
    shown = capsys.readouterr().err
    assert "a.png" in shown
    assert "no picture could be decoded" in shown
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "outputs"),
    [
        (PublishedDotCBM, {"dim": 8, "iterations": 2}, ["concepts", "classes", "plan"]),
        (CBM, {}, ["concepts", "classes", "evidence"]),
        (LinearProbe, {}, ["concepts", "classes"]),
    ],
)
def test_a_torch_program_runs_alone_at_any_batch_size(tmp_path, kind, settings, outputs):
    model = make_model(kind, **settings)
    difference = export_model(model, tmp_path / "model.pt2")
    assert list(difference) == outputs
    assert max(difference.values()) < 1e-4
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch_size in (1, 5):
        image = torch.randn(batch_size, 3, 64, 64)
        with torch.no_grad():
            expected, found = model(image), program(image)
        torch.testing.assert_close(found[0], expected.concept_BM)
        torch.testing.assert_close(found[1], expected.class_BK)
        if "plan" in outputs:
            torch.testing.assert_close(found[2], expected.plan_BNM)


def test_export_to_onnx(model_folder, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'dotcbm[export]')")
    out = tmp_path / "deep" / "model.onnx"
    assert main(["export", "--checkpoint", str(model_folder), "--format", "onnx", "--out", str(out)]) == 0
    assert "plan: largest difference" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    model, image = make_model(dim=8, iterations=2), torch.randn(4, 3, 64, 64)
    concepts, classes, plan = session.run(["concepts", "classes", "plan"], {"image": image.numpy()})
    with torch.no_grad():
        expected = model(image)
    np.testing.assert_allclose(concepts, expected.concept_BM, atol=1e-5)
    np.testing.assert_allclose(classes, expected.class_BK, atol=1e-5)
    assert expected.plan_BNM is not None
    np.testing.assert_allclose(plan, expected.plan_BNM, atol=1e-5)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_an_exported_transport_stops_each_picture_where_the_model_does(tmp_path, monkeypatch, format):
    """Where null_concept leaves concepts 5 % of the mass, passes too many show in their probabilities."""
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'dotcbm[export]')")
    model = make_model(dim=8, adapter="linear", patch_prior="uniform", null_concept=0.95, eps=0.05, readout="cosine", iterations=5)
    path = tmp_path / {"torch": "model.pt2", "onnx": "model.onnx"}[format]
    assert max(export_model(model, path, format=format, tolerance=1e-5).values()) <= 1e-5
    image = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    image[1:] = torch.nn.functional.interpolate(image[1:, :, :4, :4], size=64) * torch.logspace(-2, 1, 5)[:, None, None, None]
    plans = []
    monkeypatch.setattr(published_dot_cbm, "sinkhorn", lambda *args, **kwargs: plans.append(sinkhorn(*args, **kwargs)) or plans[-1])
    with torch.no_grad():
        expected = model(image)
    assert len(plans[0].num_iter_B.unique()) > 2, "the pictures must stop at different passes"
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(value) for value in session.run(["concepts", "classes", "plan"], {"image": image.numpy()})]
    else:
        with torch.no_grad():
            found = torch.export.load(path).module()(image)
    for theirs, ours in zip(found, (expected.concept_BM, expected.class_BK, expected.plan_BNM), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_an_export_that_differs_is_not_written(tmp_path):
    """A model that draws at random cannot agree with its export."""

    class Random(CBM):
        def forward(self, features):
            output = super().forward(features)
            return type(output)(output.concept_logit_BM, output.class_logit_BK + torch.rand_like(output.class_logit_BK), output.grid)

    path = tmp_path / "model.pt2"
    path.write_bytes(b"the one before")
    with pytest.raises(ValueError, match=r"not written; its numbers differ from the model's: classes by"):
        export_model(make_model(Random), path)
    assert path.read_bytes() == b"the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_export_with_the_wrong_suffix(capsys):
    assert main(["export", "--checkpoint", "x", "--format", "onnx", "--out", "model.pt2"]) == 2
    assert "ends in .onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ("sources", ["CUB", "Synthetic", "Waterbirds", "Folder", "AwA2", "CIFAR"]),
        ("encoders", ["timm/<model>", "open_clip/<arch>", "local-dir:<path>"]),
        ("models", ["PublishedDotCBM", "DotProduct", "CBM", "LinearProbe"]),
        ("configs", ["first.yaml", "what it is for", "demo.yaml"]),
        ("metrics", ["concepts.concept_auroc", "localization.pointing_in_mask"]),
    ],
)
def test_list(tmp_path, monkeypatch, capsys, topic, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "first.yaml").write_text("# what it is for\nmodel: 1\n")
    assert main(["list", topic]) == 0
    shown = capsys.readouterr().out
    for word in expected:
        assert word in shown


def test_find_an_encoder(capsys):
    assert main(["list", "encoders", "--find", "test_vit"]) == 0
    shown = capsys.readouterr().out
    assert "timm/test_vit.r160_in1k" in shown
    assert "resnet" not in shown


def test_doctor(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "features").write_bytes(bytes(2_000_000))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert importlib.metadata.version("torch") in shown
    assert "cpu: " in shown
    assert "features: 2.0 MB in cache" in shown


def test_doctor_says_what_is_missing(monkeypatch, capsys):
    version = importlib.metadata.version

    def without(*names: str):
        def lookup(name: str) -> str:
            if name in names:
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)

        return lookup

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(importlib.metadata, "version", without("captum", "onnx"))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert 'captum (for captum attributions): pip install "dotcbm[attribution]"' in shown
    assert 'onnx (for dotcbm export --format onnx): pip install "dotcbm[export]"' in shown
    monkeypatch.setattr(importlib.metadata, "version", without("torch"))
    assert main(["doctor"]) == 1


def test_doctor_knows_every_extra_of_the_package():
    from dotcbm.cli.doctor import _EXTRAS

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(_EXTRAS) - {""} == set(project["optional-dependencies"]) - {"all", "dev"}
    for extra, (_, packages) in _EXTRAS.items():
        asked = project["optional-dependencies"][extra] if extra else project["dependencies"]
        names = {re.split(r"[\[<>=~!]", line)[0] for line in asked} - {"dotcbm"}
        assert set(packages) == names


def test_doctor_without_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from dotcbm.cli import main; raise SystemExit(main(['doctor']))"
    done = run_python(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported" in done.stdout


@pytest.mark.parametrize("package", ["lightning", "jsonargparse"])
@pytest.mark.parametrize("command", ["fit", "demo"])
def test_a_missing_extra_is_named(tmp_path, package, command):
    code = f"import sys; sys.modules['{package}'] = None; from dotcbm.cli import main; raise SystemExit(main(['{command}']))"
    done = run_python(code, folder=tmp_path)
    assert done.returncode == 2
    assert 'pip install "dotcbm[train]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_parquet_without_pyarrow(model_folder, photos, tmp_path):
    arguments = ["predict", str(photos), "--checkpoint", str(model_folder), "--out", "x.parquet"]
    code = f"import sys; sys.modules['pyarrow'] = None; from dotcbm.cli import main; raise SystemExit(main({arguments!r}))"
    done = run_python(code, folder=tmp_path)
    assert done.returncode == 2
    assert 'needs pyarrow, which is not installed: pip install "dotcbm[train]"' in done.stderr
