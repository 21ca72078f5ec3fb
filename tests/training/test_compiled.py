"""Compiled training steps: the weights of eager ones, the same bits when resumed, and nothing of it in what is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from dotcbm.losses import orthogonality
from dotcbm.models.base import Bottleneck
from dotcbm.models.cbm import CBM
from dotcbm.models.cem import CEM
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import Problem
from dotcbm.training import compiled
from dotcbm.training.task import ConceptTask

ODD = 12  # pictures in a batch: 32 pictures, the validation part apart, make 12, 12 and 8

BOTTLENECKS: dict[str, Callable[[Problem], Bottleneck]] = {
    "cem": CEM,
    "dot": partial(DotCBM, num_parts=3, num_clusterings=2, part_width=8),
    "dot balanced": partial(DotCBM, num_parts=3, num_clusterings=2, part_width=8, relax_patch=None),
    "published": partial(PublishedDotCBM, dim=16, iterations=5),
}


class StopInEpoch(pl.Callback):
    """As Ctrl-C does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KeyboardInterrupt


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Programs are traced and differentiated, but run by eager kernels: compiling kernels takes a processor many times as long. Gives the
    sizes of the batches that they were given.
    """
    sizes: list[int] = []

    def trace(read: Any, mode: str) -> Any:
        program = torch.compile(read, dynamic=False, backend="aot_eager")

        def run(features: Any, concepts_BM: Tensor, label_B: Tensor) -> Any:
            sizes.append(len(label_B))
            return program(features, concepts_BM, label_B)

        return run

    monkeypatch.setattr(compiled, "_compiled", trace)
    return sizes


@pytest.fixture(autouse=True)
def _forget_programs():
    yield
    torch.compiler.reset()


def train(run, mode: str | None, *callbacks, directory: str = "run", trainer: dict[str, Any] | None = None, ckpt_path=None, **settings):
    task = run.task(compile=mode, **settings)
    fitting = run.trainer(*callbacks, directory=directory, **{"epochs": 3, **(trainer or {})})
    fitting.fit(task, datamodule=run.data(batch_size=ODD), ckpt_path=ckpt_path)
    return task, {name: float(value) for name, value in fitting.callback_metrics.items()}


def train_twice(run, mode: str, **settings) -> tuple[ConceptTask, ConceptTask]:
    """A run through, and one that was stopped in its second epoch and resumed."""
    through, _ = train(run, mode, directory="through", **settings)
    with pytest.raises(SystemExit):
        train(run, mode, StopInEpoch(1), **settings)
    torch.manual_seed(12345)  # whatever happened in between
    resumed, _ = train(run, mode, ckpt_path=str(run.folder / "run" / "last.ckpt"), **settings)
    return through, resumed


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a: ConceptTask, b: ConceptTask, *, most: float = 1e-5) -> None:
    ours, theirs = a.learned_state(), b.learned_state()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        if a.regime == "joint" or ".head." not in name:  # fitted to concepts that hardly vary yet, a head enlarges rounding
            torch.testing.assert_close(value, theirs[name], atol=most, rtol=most, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("name", list(BOTTLENECKS))
def test_compiled_training_is_eager_training(run, traced, name):
    """Dropout, and the concepts that CEM replaces, are drawn alike; the last batch of an epoch is smaller, and eager."""
    settings = {"bottleneck": BOTTLENECKS[name]}
    if name == "cem":
        settings |= {"regime": "joint", "concept_weighting": "balanced", "class_weighting": "balanced"}
    eager, figures = train(run, None, directory="eager", **settings)
    ours, ours_figures = train(run, "default", **settings)
    assert traced == [ODD] * 6
    assert_close(ours, eager)
    assert "train/loss" in figures
    assert ours_figures == pytest.approx(figures, rel=1e-4, abs=1e-5)
    saved = [torch.load(run.folder / folder / "model.ckpt", weights_only=True)["state_dict"] for folder in ("eager", "run")]
    assert list(saved[0]) == list(saved[1])


def test_a_compiled_run_that_is_resumed_ends_with_the_same_bits(run, traced):
    through, resumed = train_twice(run, "default", bottleneck=BOTTLENECKS["published"], ema_decay=0.8)
    assert ODD in traced
    assert_same(through.learned_state(), resumed.learned_state())


def test_compiled_kernels_draw_and_resume_as_eager_ones(run):
    """The one test here that compiles all the way."""
    settings = {"bottleneck": partial(CBM, dropout=0.4)}
    eager, _ = train(run, None, directory="eager", **settings)
    through, resumed = train_twice(run, "default", **settings)
    assert_same(through.learned_state(), resumed.learned_state())
    assert_close(through, eager)


def test_gradients_are_accumulated_over_compiled_steps(run, traced):
    settings = {"bottleneck": CBM, "trainer": {"accumulate_grad_batches": 2}}
    eager, _ = train(run, None, directory="eager", **settings)
    ours, _ = train(run, "default", **settings)
    assert traced
    assert_close(ours, eager)


def test_graphs_do_not_accumulate_gradients(run):
    with pytest.raises(ValueError, match=r"'reduce-overhead' writes.*accumulate_grad_batches is 2; set compile to 'default'"):
        train(run, "reduce-overhead", bottleneck=CBM, trainer={"accumulate_grad_batches": 2})


def test_a_training_split_below_a_batch_is_one_batch_and_compiled(run, traced):
    task = run.task(compile="default", bottleneck=CBM)
    run.trainer(epochs=2).fit(task, datamodule=run.data(batch_size=1000))
    assert traced == [32, 32]


def test_a_trainable_encoder_stays_eager_below_the_compiled_bottleneck(run, traced):
    def learned(mode: str | None) -> dict[str, Tensor]:
        encoder = run_encoder()
        task = run.task(compile=mode, encoder=encoder, bottleneck=CBM, lr=1e-3)
        run.trainer(epochs=1, directory=str(mode)).fit(task, datamodule=run.data(batch_size=ODD, cache_dir=None))
        return {name: value.clone() for name, value in task.learned_state().items() if ".head." not in name}

    def run_encoder():
        from dotcbm.encoders.image import ImageEncoder

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ImageEncoder("timm/test_resnet", pretrained=False, image_size=64, trainable=True)

    eager, ours = learned(None), learned("default")
    assert traced == [ODD] * 2
    assert any(name.startswith("model.encoder.") for name in ours)
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name], atol=1e-5, rtol=1e-4)


def test_a_bottleneck_that_has_only_a_head_is_not_compiled(run, traced):
    train(run, "default", bottleneck=LinearProbe)
    assert not traced


def test_an_unknown_mode(run):
    with pytest.raises(ValueError, match=r"compile is 'fast'; choose one of \['default', 'reduce-overhead'\], or None"):
        run.task(compile="fast")


def test_shares_of_a_model_are_not_compiled(run):
    task = run.task(compile="default")
    task._device_mesh = object()
    with pytest.raises(ValueError, match="compile does not go with ModelParallelStrategy"):
        task.configure_model()


def test_what_cannot_be_compiled_is_named(run, monkeypatch):
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiled, "_compiled", lambda read, mode: torch.compile(read, backend=no_compiler))
    with pytest.raises(ValueError, match=r"cannot compile the training step of CBM: (?s:.*)No working C\+\+ compiler.*; leave compile out"):
        train(run, "default", bottleneck=CBM)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are compiled for a GPU on one only")
@pytest.mark.parametrize("count", [32, 33])
def test_orthogonality_compiles_for_a_gpu(count):
    """With 32 vectors Triton 3.6 could not: a step of training on drawn creatures, which have as many concepts, was not to be compiled."""

    def loss(vector_ND: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return orthogonality(vector_ND)

    vector_ND = torch.randn(count, 64, device="cuda", requires_grad=True)
    torch.testing.assert_close(torch.compile(loss)(vector_ND), loss(vector_ND), atol=1e-4, rtol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are recorded on a GPU only")
@pytest.mark.parametrize(
    ("name", "mode"),
    [("published", "default"), ("published", "reduce-overhead"), ("dot", "reduce-overhead"), ("cem", "reduce-overhead")],
)
def test_compiled_on_a_gpu(run, name, mode):
    settings = {
        "bottleneck": BOTTLENECKS[name],
        "regime": "joint",
        "lr": 1e-3,
        "ema_decay": 0.8,
        "class_weighting": "balanced",
        "trainer": {"accelerator": "gpu", "devices": 1},
    }
    eager, figures = train(run, None, directory="eager", **settings)
    through, resumed = train_twice(run, mode, **settings)
    assert_same(through.learned_state(), resumed.learned_state())
    again, again_figures = train(run, mode, directory="again", **settings)
    assert_same(through.learned_state(), again.learned_state())
    for key in ("train/loss", "train/concept_loss", "val/concept_loss"):
        assert again_figures[key] == pytest.approx(figures[key], rel=1e-3), key
    ours, theirs = through.learned_state(), eager.learned_state()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        # The same up to rounding; AdamW enlarges the last digits of small gradients, so a few weights may move by a step.
        difference = (value.double() - theirs[key].double()).abs().flatten()
        assert difference.quantile(0.9) < 1e-4, key
        assert difference.max() < 1e-2, key
