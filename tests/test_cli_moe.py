"""The shipped configurations with experts, made tiny: they are understood, and a step of each is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dotcbm.cli import main
from dotcbm.hub import from_pretrained

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "moe").glob("*.yaml"))
TINY = {
    "data": {
        "source": {"class_path": "Synthetic", "init_args": {"size": 64, "num_train": 16, "num_val": 4, "num_test": 4}},
        "val_fraction": 0.0,
        "batch_size": 8,
        "num_workers": 0,
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 1},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_understood(path, capsys):
    assert main(["fit", "--config", str(path), "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["experts"]["draws"] == {"k_max": 6, "k_min": 1, "scope": "layer", "tau": None, "seed": 0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_train_and_are_tested_at_every_budget(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load(path.read_text())["model"]["encoder"]
    encoder = given.get("init_args", given)
    small = {"image_size": 64, "pretrained": False}
    if "stem" in encoder["moe"]:  # the same ViT on a small network
        small["moe"] = {**encoder["moe"], "stem": "test_efficientnet", "arguments": {**encoder["moe"]["arguments"], "depth": 2}}
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "model": {"encoder": {"class_path": "ImageEncoder", "init_args": small}}}))
    assert main(["fit", "--config", str(path), "--config", "tiny.yaml", "--run_dir", "run"]) == 0
    for budget in (1, 6):
        assert main(["test", "--config", "run/config.yaml", "--model.encoder.budget", str(budget), "--out", f"{budget}.json"]) == 0
        assert Path(f"{budget}.json").is_file()
    assert from_pretrained("run/model").encoder.blueprint["moe"]["k"] == encoder["moe"]["k"]
