"""A ViT-MoE from `dotcbm fit` through every budget and `dotcbm grow` to `dotcbm fit` again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml

from dotcbm.cli import main
from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import from_pretrained, save_pretrained

MOE = str(Path(__file__).parent / "conf" / "moe.yaml")
LAST = "runs/moe/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run in `runs/moe`."""
    folder = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "--config", MOE]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def read(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)


def pictures(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_one_checkpoint_at_every_budget(home, capsys):
    losses = {}
    for budget in (1, 2, 4):
        out = home / f"budget{budget}.json"
        assert main(["test", "--config", MOE, "--model.encoder.budget", str(budget), "--out", str(out)]) == 0
        losses[budget] = json.loads(out.read_text())["splits"]["test"]["concept_auroc"]
    assert len(set(losses.values())) > 1
    assert main(["test", "--config", MOE, "--model.encoder.budget=[1, 2]", "--out", str(home / "two.json")]) == 0
    capsys.readouterr()
    assert main(["test", "--config", MOE, "--model.encoder.budget", "5"]) == 1
    assert "budget is 5; each token has 1 to 4 of the 4 experts" in capsys.readouterr().err


def test_a_saved_model_is_read_back(home):
    folder, checkpoint = (from_pretrained(home / "runs/moe" / name) for name in ("model", "checkpoints/model.ckpt"))
    # Training lays convolutions out for speed, and a checkpoint keeps that: some processors would then round differently.
    assert all(parameter.is_contiguous() for parameter in checkpoint.parameters())
    with torch.no_grad():
        assert torch.equal(folder(pictures()).class_logit_BK, checkpoint(pictures()).class_logit_BK)
    folder.encoder.set_budget(1)
    save_pretrained(folder, home / "frugal")
    again = from_pretrained(home / "frugal")
    assert again.encoder.settings["budget"] == 1
    with torch.no_grad():
        assert torch.equal(folder(pictures()).class_logit_BK, again(pictures()).class_logit_BK)


def test_it_is_exported_for_any_number_of_pictures(home, capsys):
    assert main(["export", "--checkpoint", "runs/moe/model", "--out", "moe.pt2"]) == 0
    assert "concepts: largest difference" in capsys.readouterr().out
    program, model = torch.export.load("moe.pt2").module(), from_pretrained("runs/moe/model")
    with torch.no_grad():
        assert torch.allclose(program(pictures(3))[0], model(pictures(3)).concept_BM, atol=1e-5)


def test_a_frozen_one_is_cached_budget_by_budget(home):
    arguments = ["fit", "--config", MOE, "--run_dir", "runs/frozen", "--model.encoder.trainable=false", "--model.ema_decay=null"]
    assert main([*arguments, "--data.cache_dir", "cache"]) == 0
    before = {path.name for path in (home / "cache").iterdir()}
    test = ["test", "--config", str(home / "runs/frozen/config.yaml"), "--run_dir", "runs/frozen"]
    assert main(test) == 0
    assert main([*test, "--model.encoder.budget=1", "--out", "one.json"]) == 0
    assert {path.name for path in (home / "cache").iterdir()} > before


def test_an_upcycled_encoder_exists_nowhere_else(home):
    """Its dense weights can be had again, its routers cannot."""
    import timm

    dense = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=2, num_classes=0)
    timm.models.save_for_hf(dense, home / "dense", safe_serialization=True, model_args={"depth": 2, "embed_dim": 32, "num_heads": 2})
    arguments = ["--model.encoder.pretrained=true", "--model.encoder.image_size=64", "--model.encoder.trainable=false"]
    arguments += [f"--model.encoder.moe.base=local-dir:{home / 'dense'}", "--model.ema_decay=null", "--run_dir", "runs/upcycled"]
    assert main(["fit", "--config", MOE, *arguments]) == 0
    model = from_pretrained("runs/upcycled/model")
    assert not model.encoder.has_source
    with pytest.raises(ValueError, match="exists nowhere else"):
        save_pretrained(model, home / "without", include_encoder=False)
    with pytest.raises(ValueError, match="drawn at random, and the file does not hold them"):
        from_pretrained("runs/upcycled/checkpoints/model.ckpt")


def test_a_larger_model_gives_the_same_and_is_trained_on(home, capsys):
    small = read(LAST)
    how = ["--width", "2", "--depth", "zero", "--alpha", "0", "--optimizer", "duplicate"]
    assert main(["grow", LAST, *how, "--out", "grown"]) == 0
    said = capsys.readouterr().out
    assert "blocks: 8, with experts: 4 of 8, active: 4" in said
    assert "--ckpt_path grown/grown.ckpt" in said
    manifest, large = json.loads(Path("grown/manifest.json").read_text()), read("grown/grown.ckpt")
    assert manifest["exact"]
    assert manifest["blocks"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert manifest["tensors"]["tower.model.pos_embed"] == {"from": "tower.model.pos_embed"}
    assert large["dotcbm"]["growth"][0]["growth"]["width"] == 2
    features = []
    for checkpoint in (small, large):
        told = checkpoint["dotcbm"]["encoder"]
        encoder = ImageEncoder(**told["settings"], blueprint=told["blueprint"]).eval()
        prefix = "model.encoder."
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)})
        with torch.no_grad():
            features.append(encoder(pictures()).patch_BND)
    assert torch.allclose(features[0], features[1], atol=1e-5)
    (kept,) = (value for value in large["callbacks"].values() if "best_state" in value)
    assert kept["best"] == -math.inf
    assert kept["best_state"] == {}
    assert kept["mean"].keys() == large["state_dict"].keys()
    assert len(large["optimizer_states"][0]["param_groups"][-1]["params"]) > len(small["optimizer_states"][0]["param_groups"][-1]["params"])

    config = ["fit", "--config", MOE, "--config", "grown/encoder.yaml", "--ckpt_path", "grown/grown.ckpt", "--run_dir", "runs/grown"]
    assert main([*config, "--trainer.max_epochs=2"]) == 0
    trained = read("runs/grown/checkpoints/last.ckpt")
    assert trained["epoch"] == small["epoch"] + 1
    assert trained["optimizer_states"][0]["state"][0]["step"] == 2 * small["optimizer_states"][0]["state"][0]["step"]
    name = "model.encoder.tower.model.blocks.3.mlp.experts.down_EHD"
    assert large["state_dict"][name].abs().max() == 0
    assert trained["state_dict"][name].abs().max() > 0
    assert from_pretrained("runs/grown/model").encoder.blueprint["moe"]["num_experts"] == 8


def test_the_optimizer_can_be_dropped_and_counters_set_back(home):
    assert main(["grow", LAST, "--width", "2", "--restart", "--out", "restarted"]) == 0
    large = read("restarted/grown.ckpt")
    assert large["optimizer_states"][0]["state"] == {}
    assert (large["epoch"], large["global_step"]) == (0, 0)
    config = ["fit", "--config", MOE, "--config", "restarted/encoder.yaml", "--ckpt_path", "restarted/grown.ckpt"]
    assert main([*config, "--run_dir", "runs/restarted"]) == 0
    assert read("runs/restarted/checkpoints/last.ckpt")["global_step"] == read(LAST)["global_step"]


def test_a_saved_model_grows_too(home):
    assert main(["grow", "runs/moe/model", "--width", "2", "--alpha", "0", "--out", "larger"]) == 0
    small, large = from_pretrained("runs/moe/model"), from_pretrained("larger/model")
    with torch.no_grad():
        assert torch.allclose(small.encoder(pictures()).patch_BND, large.encoder(pictures()).patch_BND, atol=1e-5)
    told = yaml.safe_load(Path("larger/encoder.yaml").read_text())["model"]["encoder"]["init_args"]
    assert told["moe"]["num_experts"] == 8
    assert told["pretrained"] is False


def test_a_grown_checkpoint_meets_no_other_configuration(home, capsys):
    assert main(["grow", LAST, "--width", "2", "--out", "wide"]) == 0
    config = ["fit", "--config", MOE, "--ckpt_path", "wide/grown.ckpt", "--run_dir", "runs/wide", "--trainer.max_epochs=2"]
    assert main(config) == 1
    assert "grown to other experts: it has k 4, the configuration asks for 2; num_experts 8" in capsys.readouterr().err
    assert main([*config, "--config", "wide/encoder.yaml", "--model.encoder.moe.gate=sigmoid"]) == 1
    assert "it has gate 'softmax', the configuration asks for 'sigmoid'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([LAST], 2, "nothing to grow"),
        ([LAST, "--width", "0"], 2, "--width is 0"),
        ([LAST, "--width", "2", "--keep-first", "1"], 2, "work with --depth"),
        ([LAST, "--depth", "zero", "--keep-first", "3", "--keep-last", "1"], 1, "leave one at least"),
        ([LAST, "--width", "2", "--alpha", "-1"], 1, "alpha is -1"),
        (["nowhere.ckpt", "--width", "2"], 1, "no such checkpoint"),
        (["text.ckpt", "--width", "2"], 1, "cannot be read as a checkpoint"),
        (["other.ckpt", "--width", "2"], 1, "was not written by dotcbm"),
        (["list.ckpt", "--width", "2"], 1, "holds a list"),
        ([LAST, "--depth", "twice"], 2, "invalid choice"),
        ([LAST, "--widht", "2"], 2, "--width"),
    ],
)
def test_what_cannot_grow_leaves_nothing_behind(home, capsys, arguments, status, message):
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, "other.ckpt")
    torch.save([], "list.ckpt")
    assert main(["grow", *arguments, "--out", "nothing"]) == status
    assert message in capsys.readouterr().err
    assert not Path("nothing").exists()
    assert not list(home.glob(".nothing*"))


def test_a_frozen_encoder_is_not_in_its_checkpoint(home, capsys):
    checkpoint = read(LAST)
    checkpoint["dotcbm"]["encoder"]["frozen"] = True
    torch.save(checkpoint, "frozen.ckpt")
    assert main(["grow", "frozen.ckpt", "--width", "2", "--out", "nothing"]) == 1
    assert "grow the run's folder `model`" in capsys.readouterr().err


def test_nothing_is_overwritten_or_half_written(home, capsys, monkeypatch):
    assert main(["grow", LAST, "--width", "2", "--out", "runs"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dotcbm.cli.grow._yaml", full)
    assert main(["grow", LAST, "--width", "2", "--out", "half"]) == 1
    assert not list(home.glob("*half*"))
