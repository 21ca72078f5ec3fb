"""What the tests of the baseline bottlenecks share: a small problem, and the checks that each of them must pass."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fakes.source import TinySource

from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import from_pretrained, save_pretrained
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel
from dotcbm.structures import ConceptSet, PatchFeatures, Problem
from dotcbm.training.task import ConceptTask

B, GRID, D, M, K = 3, (4, 5), 16, 6, 4
N = GRID[0] * GRID[1]


def make_problem(*, unknown: bool = False) -> Problem:
    table_KM = torch.rand(K, M, generator=torch.Generator().manual_seed(0))
    if unknown:
        table_KM[1, 2] = torch.nan
    names = tuple(f"concept {j}" for j in range(M)), tuple(f"class {k}" for k in range(K))
    return Problem(patch_width=D, global_width=D, grid=GRID, concepts=ConceptSet(*names, table_KM))


def make_features(seed: int = 0, *, pictures: int = B) -> PatchFeatures:
    patch = torch.randn(pictures, N, D, generator=torch.Generator().manual_seed(seed))
    return PatchFeatures(patch_BND=patch, global_BD=patch.mean(1), grid=GRID)


def check_promises(model: Bottleneck) -> None:
    """Classes and contributions follow from concepts and context, evidence adds up, settings build it again. Leaves eval mode."""
    model.train()
    for seed in range(5):
        model(make_features(seed))  # moves running statistics away from 0 and 1
    model.eval()
    out = model(make_features())
    assert torch.allclose(model.classify(out.concept_logit_BM, out.context_BX), out.class_logit_BK, atol=1e-5)
    contribution_BKM = model.contributions(out.concept_logit_BM, out.context_BX)
    assert contribution_BKM.shape == (B, K, M)
    assert torch.allclose(contribution_BKM.sum(2) + model.head.bias, out.class_logit_BK, atol=1e-4)
    assert out.losses == {}
    if out.evidence_BNM is not None:
        other = model(make_features(7))
        bias_BM = out.concept_logit_BM - out.evidence_BNM.sum(1)
        assert torch.allclose(bias_BM, bias_BM[:1].expand_as(bias_BM), atol=1e-5)
        assert torch.allclose(bias_BM, other.concept_logit_BM - other.evidence_BNM.sum(1), atol=1e-5)
    twin = type(model)(model.problem, **model.settings)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(make_features()).class_logit_BK, out.class_logit_BK)
    features = make_features()
    alone = PatchFeatures(features.patch_BND[1:2], features.global_BD[1:2], GRID)
    assert torch.allclose(model(alone).class_logit_BK, out.class_logit_BK[1:2], atol=1e-5)
    assert model(features.to(dtype=torch.float16)).class_logit_BK.dtype == torch.float32
    one = model.train()(alone)  # the last batch of an epoch may hold one picture
    assert one.class_logit_BK.isfinite().all()
    (one.class_logit_BK.sum() + one.concept_logit_BM.sum() + sum(one.losses.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    model.eval()


def make_encoder() -> ImageEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)


def train(
    folder: Path, kind: type[Bottleneck], *, regime: str = "two_stage", epochs: int = 6, **settings: Any
) -> tuple[float, float, dict]:
    """Train on drawn squares by the real trainer; the first and last epoch's loss, and the figures on the test split."""
    losses: list[float] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ConceptDataModule(TinySource(), batch_size=8, cache_dir=str(folder / "cache"), views=["plain", "flip"])
        task = ConceptTask(make_encoder(), partial(kind, **settings), regime=regime, lr=1e-2, lr_halve_every=0, head_l2=1e-2)  # pyright: ignore
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[Watch()],
        )
        trainer.fit(task, datamodule=data)
        figures = trainer.test(task, datamodule=data, verbose=False)[0]
    return (losses or [0.0])[0], (losses or [0.0])[-1], dict(figures)


def roundtrip(folder: Path, kind: type[Bottleneck], **settings: Any) -> ConceptModel:
    """Save a model of random weights, read it back, and check that it gives the same numbers, bit by bit; returns the read one."""
    encoder = make_encoder()
    problem = Problem(encoder.width, encoder.global_width, encoder.grid, TinySource().concepts)
    torch.manual_seed(5)
    model = ConceptModel(encoder, kind(problem, **settings))
    picture = TinySource().load("test").sample(0).image
    assert picture is not None
    with torch.no_grad():
        for _ in range(3):  # statistics that are not those of a fresh model
            model.bottleneck.train()(model.encoder(torch.randn(4, 3, 64, 64)))
    model.eval()
    back = from_pretrained(save_pretrained(model, folder / "model"))
    assert type(back.bottleneck) is kind
    assert back.bottleneck.settings == model.bottleneck.settings
    ours, theirs = model.predict(picture), back.predict(picture)
    assert torch.equal(ours.concept_logit_BM, theirs.concept_logit_BM)
    assert torch.equal(ours.class_logit_BK, theirs.class_logit_BK)
    again = save_pretrained(back, folder / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    return back
