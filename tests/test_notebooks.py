"""The shipped notebooks run from the first cell to the last, and show what they say they show."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import save_pretrained
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.training.task import ConceptTask

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for seconds: what the notebooks say of it need not be good, only true."""
    torch.manual_seed(0)
    encoder = ImageEncoder("timm/test_resnet", image_size=64, layer=2, pretrained=False, trainable=True)
    data = ConceptDataModule(Synthetic(size=64, num_train=160, num_val=32, num_test=16), batch_size=32, cache_dir=None)
    task = ConceptTask(encoder, partial(DotCBM, dim=32, adapter="linear", iterations=5), lr=1e-2)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(task, datamodule=data)
    path = tmp_path_factory.mktemp("model") / "model"
    save_pretrained(task.model, path)
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOTCBM_MODEL", str(model))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    text = "".join(output.get("text", "") for output in outputs)
    assert "of the classes right" in text
    assert "without" in text
