"""The shipped notebooks run from the first cell to the last on a model trained for seconds, and show what they say they show."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from torchvision.io import write_png

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.data.synthetic import Synthetic
from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import save_pretrained
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.report.record_file import read_record
from dotcbm.training.task import ConceptTask

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCE = Synthetic(size=64, num_train=160, num_val=32, num_test=32)


@dataclass(frozen=True)
class Promise:
    """What a notebook has to show: so many pictures, and these words among what it prints."""

    pictures: int
    words: tuple[str, ...]


PROMISES = {
    "heatmaps": Promise(7, ("of the classes right", "always saying no", "strength of the features", "95 % interval", "without the box")),
    "intervene": Promise(9, ("in truth", "speaks for", "without", "no weight on", "control: another class's concepts", "area")),
    "read_an_audit": Promise(1, ("rule:", "control (", "the record says:", "the record says (parts/", "could not be measured", "written:")),
    "compare_models": Promise(
        3, ("PublishedDotCBM and CBM", "(paired)", "McNemar p =", "concepts in AUROC differ beyond chance", "written:")
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, as `dotcbm fit` leaves it. What the notebooks say of its model need not be good, only true."""
    torch.manual_seed(0)
    encoder = ImageEncoder("timm/test_resnet", image_size=64, layer=2, pretrained=False, trainable=True)
    data = ConceptDataModule(SOURCE, batch_size=32, cache_dir=None)
    task = ConceptTask(encoder, partial(PublishedDotCBM, dim=32, adapter="linear", iterations=5), lr=1e-2)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(task, datamodule=data)
    folder = tmp_path_factory.mktemp("run")
    save_pretrained(task.model, folder / "model")
    source = {"class_path": "Synthetic", "init_args": asdict(SOURCE)}
    config = {"data": {"source": source, "batch_size": 32, "cache_dir": None, "evaluate_splits": ["test"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


@pytest.fixture
def start(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that a notebook starts in; nothing of the user's is left."""
    for name in ("DOTCBM_OTHER", "DOTCBM_PICTURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOTCBM_RUN", str(run))
    monkeypatch.setenv("DOTCBM_COMPARED", str(tmp_path / "compared"))
    return monkeypatch


def executed(name: str) -> tuple[str, int]:
    """What a notebook printed, and how many figures it drew."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs), sum("image/png" in output.get("data", {}) for output in outputs)


def test_every_notebook_is_run_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_notebook_is_committed_without_outputs(name: str):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear the outputs before committing"


@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.usefixtures("start")
def test_notebook_shows_what_it_promises(name: str):
    text, pictures = executed(name)
    assert pictures == PROMISES[name].pictures
    assert [word for word in PROMISES[name].words if word not in text] == []


@pytest.mark.usefixtures("start")
def test_audit_is_read_where_there_is_one(run: Path):
    """The second time the notebook reads what was written, and writes the same."""
    written = run / "audit-notebook" / "audit.json"
    if not written.exists():
        executed("read_an_audit")
    kept = run / "audit" / "audit.json"
    kept.parent.mkdir(exist_ok=True)
    text = written.read_text(encoding="utf-8")
    values = json.loads(text) | {"title": "An audit from before"}
    kept.write_text(json.dumps(values), encoding="utf-8")
    try:
        printed, _ = executed("read_an_audit")
    finally:
        kept.unlink()
    assert "An audit from before: 32 pictures" in printed
    assert read_record(written).title == "An audit from before"


def test_model_compared_with_itself_turns_no_picture(run: Path, start: pytest.MonkeyPatch):
    start.setenv("DOTCBM_OTHER", str(run))
    printed, _ = executed("compare_models")
    assert "PublishedDotCBM 1 and PublishedDotCBM 2" in printed
    assert "PublishedDotCBM 2: 0 pictures right only here, 0 wrong only here" in printed
    assert "0.0 [0.0 to 0.0] (paired)" in printed


def test_heatmaps_of_my_own_pictures(tmp_path: Path, start: pytest.MonkeyPatch):
    test = SOURCE.load("test")
    for row in range(2):
        write_png(test.sample(row).image, str(tmp_path / f"{row}.png"))
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    start.setenv("DOTCBM_PICTURES", str(tmp_path))
    assert executed("heatmaps")[1] == PROMISES["heatmaps"].pictures
