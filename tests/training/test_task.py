"""One task, from the configuration to figures, and what it refuses."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fakes.source import TinySource

from dotcbm.encoders.image import ImageEncoder
from dotcbm.models.cbm import CBM
from dotcbm.models.cem import CEM
from dotcbm.models.coop_cbm import CoopCBM
from dotcbm.models.label_free import LabelFreeCBM
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.models.post_hoc import PostHocCBM
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.models.random_concepts import RandomConcepts
from dotcbm.models.salf_cbm import SALFCBM
from dotcbm.models.sparse_cbm import SparseCBM
from dotcbm.models.vlg_cbm import VLGCBM
from dotcbm.structures import ConceptBatch, ConceptOutput, Problem
from dotcbm.training.evaluation import evaluate
from dotcbm.training.head_fit import collect_head_input, fit_head, true_head_input
from dotcbm.training.kept_weights import KeptWeights
from dotcbm.training.task import ConceptTask


def fitted(run, *callbacks, epochs=2, source=None, data_settings=None, **settings):
    task = run.task(**settings)
    data = run.data(source, **(data_settings or {}))
    trainer = run.trainer(*callbacks, epochs=epochs)
    trainer.fit(task, datamodule=data)
    return task, data, trainer


def test_two_stages_leave_an_optimal_head_and_figures_for_all_splits(run):
    source = TinySource(counts=(("train", 40), ("test", 16), ("shifted", 12)))
    task, data, trainer = fitted(run, source=source, head_l2="auto", epochs=3)
    assert task.head_fit is not None
    inputs, labels = collect_head_input(task.model, data.plain_loader("val"))
    predicted = (inputs @ task.model.bottleneck.head.weight.T + task.model.bottleneck.head.bias).argmax(1)
    assert float((predicted == labels).float().mean()) == pytest.approx(task.head_fit.val_accuracy)
    figures = {name: value for each in trainer.test(task, datamodule=data, verbose=False) for name, value in each.items()}
    for split, num in (("test", 16), ("shifted", 12)):
        direct = evaluate(task.model, data.plain_loader(split, annotations="all"), data.concepts)
        assert direct["num_pictures"] == num
        assert {name.removeprefix(f"{split}/"): v for name, v in figures.items() if name.startswith(split)} == pytest.approx(direct)
    for needed in ("accuracy", "concept_auroc", "pointing_0.1_plan", "pointing_0.1_prior", "pointing_0.1_centre", "foreground_mass_prior"):
        assert f"test/{needed}" in figures


def test_the_head_gets_no_gradient_in_stage_one_and_the_encoder_never(run):
    class Watch(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            bottleneck = pl_module.model.bottleneck
            assert bottleneck.head.weight.grad is None
            assert bottleneck.readout.value.weight.grad.abs().sum() > 0
            assert all(p.grad is None for p in pl_module.encoder.parameters())

    before = {name: value.clone() for name, value in run.encoder.state_dict().items()}
    task, _, _ = fitted(run, Watch(), epochs=1, bottleneck=PublishedDotCBM)
    assert all(torch.equal(value, before[name]) for name, value in run.encoder.state_dict().items())
    assert task.model.bottleneck.head.weight.requires_grad


def test_the_loss_is_the_weighted_sum_of_its_terms(run):
    task, data, trainer = fitted(run, epochs=1, regime="joint", concept_weighting="balanced", class_weighting="balanced", class_weight=3.0)
    batch = next(iter(data.plain_loader("train")))
    drawn = torch.Generator().manual_seed(0)
    output = ConceptOutput(
        concept_logit_BM=torch.randn(len(batch), 5, generator=drawn),
        class_logit_BK=torch.randn(len(batch), 4, generator=drawn),
        grid=(2, 2),
        losses={"vop": torch.tensor(0.3), "top": torch.tensor(0.7)},
    )
    terms = task.losses(output, batch)
    probability = output.concept_BM.double()
    weight = data.concept_pos_weights().double()
    total, known = 0.0, 0
    for i in range(len(batch)):
        for j in range(5):
            target = float(batch.concepts_BM[i, j])
            if target == target:  # not NaN
                p = probability[i, j]
                total -= float(weight[j] * target * p.log() + (1 - target) * (1 - p).log())
                known += 1
    assert known < len(batch) * 5
    assert float(terms["concept"]) == pytest.approx(total / known, rel=1e-5)
    assert float(terms["class"]) == pytest.approx(float(F.cross_entropy(output.class_logit_BK, batch.label_B, data.class_weights())))
    assert task.loss_weights == {"concept": 0.8, "vop": 0.15, "top": 0.2, "class": 3.0}
    task.model.forward_batch = lambda _: output  # the sum itself
    task.log = lambda *args, **kwargs: None
    task.trainer = trainer
    expected = 0.8 * terms["concept"] + 0.15 * 0.3 + 0.2 * 0.7 + 3 * terms["class"]
    assert float(task.training_step(batch, 0)) == pytest.approx(float(expected))


def test_training_learns_what_can_be_learned(run):
    """A random network's features tell colours and places of squares well enough to beat chance by far."""
    source = TinySource(counts=(("train", 160), ("test", 80)))
    task, data, _ = fitted(run, source=source, epochs=20, bottleneck=CBM, lr=3e-2, lr_halve_every=0)
    probe, _, _ = fitted(run, source=source, bottleneck=LinearProbe)
    for trained in (task, probe):
        # Chance is 0.25; of 80 pictures its deviation is 0.05.
        assert evaluate(trained.model, data.plain_loader("test"), data.concepts)["accuracy"] > 0.45
    assert evaluate(task.model, data.plain_loader("test"), data.concepts)["concept_auroc"] > 0.6


def test_a_linear_probe_goes_straight_to_its_head(run):
    task, _, trainer = fitted(run, epochs=5, bottleneck=LinearProbe)
    assert trainer.global_step == 0
    assert task.head_fit is not None
    assert task.head_fit.weight_KF.shape == (4, task.encoder.global_width)


def test_the_best_epoch_is_kept(run):
    class Script(pl.Callback):
        """Says that epoch 1 is the best, and remembers its weights."""

        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                pl_module.log("val/script", [0.1, 0.9, 0.9, 0.2][trainer.current_epoch])

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.weights = {name: value.clone() for name, value in pl_module.learned_state().items()}

    script = Script()
    task, _, trainer = fitted(run, script, epochs=4, monitor="val/script")
    (kept,) = [callback for callback in trainer.callbacks if isinstance(callback, KeptWeights)]
    assert (kept.best_epoch, kept.best) == (1, pytest.approx(0.9))
    for name, value in task.learned_state().items():
        if "head" not in name:
            assert torch.equal(value, script.weights[name])


def test_the_moving_mean_is_that_of_torch(run):
    class Mean(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
            self.model = torch.optim.swa_utils.AveragedModel(pl_module.model.bottleneck, multi_avg_fn=average)
            self.model.update_parameters(pl_module.model.bottleneck)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.model.update_parameters(pl_module.model.bottleneck)

    mean = Mean()
    # Without a validation split the mean of the last step is what is kept.
    task, _, _ = fitted(run, mean, epochs=2, bottleneck=CBM, ema_decay=0.9, data_settings={"val_fraction": 0})
    expected = mean.model.module.concept.weight
    assert torch.allclose(task.model.bottleneck.concept.weight, expected, atol=1e-7)


def test_the_rate_is_halved(run):
    seen = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    fitted(run, Rates(), epochs=5, lr=0.4, lr_halve_every=2, bottleneck=CBM)
    assert seen == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1])


def test_a_checkpoint_says_what_it_is_and_holds_no_frozen_encoder(run):
    task, _, _ = fitted(run, epochs=1)
    for name in ("last.ckpt", "model.ckpt"):
        checkpoint = torch.load(run.folder / "run" / name, weights_only=True)
        record = checkpoint["dotcbm"]
        assert json.loads(json.dumps(record)) == record
        assert record["bottleneck"]["settings"]["dim"] == 16
        assert record["encoder"]["fingerprint"] == run.encoder.fingerprint()
        assert record["problem"]["concepts"]["names"] == list(TinySource().concepts.names)
        assert all(name.startswith("model.bottleneck.") for name in checkpoint["state_dict"])
        assert checkpoint["dotcbm_tensors"]["concept_frequency_M"].shape == (5,)
    final = torch.load(run.folder / "run" / "model.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(final["model.bottleneck.head.weight"], task.model.bottleneck.head.weight)


def test_testing_from_a_checkpoint_gives_the_same_figures(run):
    task, data, trainer = fitted(run, epochs=1)
    expected = trainer.test(task, datamodule=data, verbose=False)
    again = run.trainer().test(run.task(seed=9), datamodule=run.data(), ckpt_path=str(run.folder / "run" / "model.ckpt"), verbose=False)
    assert again == expected


def test_other_concepts_than_the_checkpoints_are_named(run):
    fitted(run, epochs=1)
    other = TinySource(names=("red", "green", "left", "upright", "unknown"))
    with pytest.raises(ValueError, match=r"missing: .*right.*added: .*upright"):
        run.trainer().test(run.task(), datamodule=run.data(other), ckpt_path=str(run.folder / "run" / "model.ckpt"))


def test_another_encoder_than_the_checkpoints_is_named(run):
    fitted(run, epochs=1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64)
    with pytest.raises(ValueError, match=r"made with another encoder: timm/test_resnet \(image_size=64.*fingerprint"):
        run.trainer().test(run.task(encoder=other), datamodule=run.data(), ckpt_path=str(run.folder / "run" / "model.ckpt"))


def test_another_bottleneck_than_the_checkpoints_is_named(run):
    fitted(run, epochs=1)
    other = run.task(bottleneck=lambda problem: PublishedDotCBM(problem, dim=16, iterations=6))
    with pytest.raises(ValueError, match=r"settings that differ: \['iterations'\]"):
        run.trainer().test(other, datamodule=run.data(), ckpt_path=str(run.folder / "run" / "model.ckpt"))


def test_a_trainable_encoder_learns_and_is_saved(run):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64, trainable=True)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    task, _, _ = fitted(run, epochs=1, regime="joint", encoder=encoder, encoder_lr=1e-3)
    assert any(not torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    saved = torch.load(run.folder / "run" / "model.ckpt", weights_only=True)["state_dict"]
    assert any(name.startswith("model.encoder.") for name in saved)
    assert saved.keys() == task.learned_state().keys()


def test_accumulated_batches_make_the_step_of_a_large_one(run):
    """Without dropout or batch statistics, and with all labels known, two batches of 8 have the mean gradient of one of 16.

    The gradients are compared, not the weights after a step: Adam divides by their size, so that rounding alone decides the
    sign of a step along which there is no slope.
    """
    source = TinySource(names=("red", "green", "left", "right"))

    class Keep(pl.Callback):
        def __init__(self) -> None:
            self.gradients: list[torch.Tensor] = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.gradients.append(pl_module.model.bottleneck.concept.weight.grad.clone())

    def gradients(batch_size, accumulate):
        keep = Keep()
        trainer = run.trainer(keep, epochs=2, accumulate_grad_batches=accumulate)
        data = run.data(source, batch_size=batch_size, val_fraction=0.2)
        task = run.task(bottleneck=lambda problem: CBM(problem, scaling="none"), lr=1e-9, lr_halve_every=0)
        trainer.fit(task, datamodule=data)
        assert trainer.global_step == len(keep.gradients) == 4
        return torch.stack(keep.gradients)

    large, small = gradients(16, 1), gradients(8, 2)
    assert large.abs().max() > 1e-3
    assert torch.allclose(large, small, rtol=1e-4, atol=1e-6)


def test_half_precision_trains(run):
    task, _, _ = fitted(run, epochs=1)
    half = run.task()
    run.trainer(epochs=1, precision="bf16-mixed", directory="half").fit(half, datamodule=run.data())
    a, b = (t.learned_state()["model.bottleneck.readout.value.weight"] for t in (task, half))
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.05


def test_prediction_leaves_out_bad_pictures_and_names_them(run):
    task, _, trainer = fitted(run, epochs=1)
    data = run.data(TinySource(bad_rows=(2, 9)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        outputs = trainer.predict(task, datamodule=data)
    assert sum(len(output.concept_logit_BM) for output in outputs) == 14
    assert data.skipped == ["test/002.png", "test/009.png"]
    assert any("2 of 16 pictures could not be decoded and were skipped: test/002.png, test/009.png" in str(w.message) for w in said)


def test_the_configuration_builds_a_task():
    cli = pytest.importorskip("lightning.pytorch.cli")
    from dotcbm.data.datamodule import ConceptDataModule
    from dotcbm.training.task import ConceptTask

    parser = cli.LightningArgumentParser()
    parser.add_lightning_class_args(ConceptTask, "model")
    parser.add_lightning_class_args(ConceptDataModule, "data")
    encoder = {"class_path": "dotcbm.encoders.image.ImageEncoder", "init_args": {"name": "timm/test_vit", "pretrained": False}}
    bottleneck = {"class_path": "dotcbm.models.published_dot_cbm.PublishedDotCBM", "init_args": {"eps": 0.2}}
    source = {"class_path": "dotcbm.data.synthetic.Synthetic", "init_args": {"size": 64, "num_train": 16}}
    config = parser.parse_object(
        {
            "model": {"encoder": encoder, "bottleneck": bottleneck, "head_l2": 0.5, "lr": 0.01},
            "data": {"source": source, "views": ["plain", "flip"], "cache_dir": None},
        }
    )
    built = parser.instantiate_classes(config)
    assert built.model.head_l2 == 0.5
    model = built.model.build(built.data)
    assert isinstance(model.bottleneck, PublishedDotCBM)
    assert model.bottleneck.settings["eps"] == 0.2
    assert built.data.views == ("plain", "flip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regime": "one_stage"}, "regime is 'one_stage'"),
        ({"lr": 0.0}, r"lr is 0\.0"),
        ({"head_l2": -1.0}, r"head_l2 is -1\.0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0"),
    ],
)
def test_bad_settings_are_named(run, settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(run, **settings)


def test_auto_l2_without_validation_is_refused_at_the_start(run):
    class Never(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pytest.fail("training has started")

    with pytest.raises(ValueError, match="head_l2 'auto' chooses on a validation split"):
        fitted(run, Never(), head_l2="auto", data_settings={"val_fraction": 0})


def test_other_data_than_a_concept_data_module_is_refused(run):
    with pytest.raises(ValueError, match="needs a ConceptDataModule"):
        run.trainer().fit(run.task(), train_dataloaders=[torch.zeros(1)])


def test_a_batch_without_features_and_pictures_is_refused(run):
    task, data, _ = fitted(run, epochs=1)
    batch: ConceptBatch = next(iter(data.plain_loader("train")))
    with pytest.raises(ValueError, match="neither pictures nor features"):
        collect_head_input(task.model, [replace(batch, features=None)])


def test_the_independent_head_is_that_of_the_true_concepts(run):
    source = TinySource(counts=(("train", 40), ("test", 16)), names=("red", "green", "left", "right"))
    task, data, _ = fitted(run, source=source, regime="independent", bottleneck=CBM, epochs=1, data_settings={"val_fraction": 0.0})
    train = data.dataset("train")
    expected = fit_head(train.concept_NM, train.label_N, num_classes=4, l2=1e-2)
    head = task.model.bottleneck.head
    assert torch.allclose(head.weight.double(), expected.weight_KF, atol=1e-5)
    assert task.head_fit.train_accuracy == 1.0
    # The model itself reads predicted concepts.
    inputs, _ = collect_head_input(task.model, data.plain_loader("train"))
    assert not torch.allclose(inputs, train.concept_NM, atol=0.05)


def test_the_independent_head_takes_an_unknown_concept_for_its_frequency(run):
    source = TinySource()
    data = run.data(source)
    data.use_encoder(run.encoder)
    train = data.dataset("train")
    assert train.concept_NM.isnan().any()
    problem = Problem(run.encoder.width, run.encoder.global_width, run.encoder.grid, source.concepts)
    inputs, labels = true_head_input(CBM(problem), train)
    frequency = train.concept_NM[:, 4].nanmean()
    assert torch.allclose(inputs[train.concept_NM[:, 4].isnan(), 4], frequency)
    assert torch.equal(inputs[:, :4], train.concept_NM[:, :4])
    assert torch.equal(labels, train.label_N)


def test_the_independent_regime_refuses_heads_that_read_no_probabilities(run):
    for bottleneck, name in ((LinearProbe, "LinearProbe"), (partial(CBM, head_on="logit"), "CBM")):
        with pytest.raises(ValueError, match=f"the head of {name} reads something else"):
            fitted(run, regime="independent", bottleneck=bottleneck)


def test_a_sparse_head_has_the_wanted_number_of_weights(run):
    task, _, _ = fitted(run, bottleneck=partial(CBM, head_on="logit"), head_nec=2)
    weight = task.model.bottleneck.head.weight
    assert 0 < int((weight != 0).sum()) <= 2 * weight.shape[0]


def test_sparse_heads_of_joint_training_make_no_sense(encoder):
    with pytest.raises(ValueError, match="head_nec fits a sparse head after the concepts"):
        ConceptTask(encoder, CBM, regime="joint", head_nec=5)
    with pytest.raises(ValueError, match="head_nec is 0"):
        ConceptTask(encoder, CBM, head_nec=0)


def test_random_concepts_learn_the_scale_of_the_features_before_their_head(run):
    task, data, _ = fitted(run, bottleneck=RandomConcepts, epochs=1)
    pooled = torch.cat([batch.features.patch_BND.float().mean(1) for batch in data.plain_loader("train")])
    norm = task.model.bottleneck.norm
    assert torch.allclose(norm.running_mean, pooled.mean(0), atol=0.1 * float(pooled.std()))
    inputs, _ = collect_head_input(task.model, data.plain_loader("train"))
    assert float((inputs - 0.5).abs().mean()) > 0.02  # unscaled features would leave every concept at one half, or at 0 and 1


_POOLED = {
    "CBM": partial(CBM, l2=0.1),
    "CEM": CEM,
    "Coop": CoopCBM,
    "post-hoc": PostHocCBM,
    "label-free": LabelFreeCBM,
    "sparse": SparseCBM,
    "VLG": partial(VLGCBM, scaling="half"),
    "probe": LinearProbe,
}


@pytest.mark.parametrize("name", _POOLED)
def test_bottlenecks_that_read_the_mean_train_on_it_as_on_all_patches(run, monkeypatch, name):
    def trained(*, reads_mean):
        monkeypatch.setattr(getattr(_POOLED[name], "func", _POOLED[name]), "reads_mean", reads_mean)
        regime = "joint" if name == "CEM" else "two_stage"
        task, data, _ = fitted(run, bottleneck=_POOLED[name], regime=regime, epochs=2)
        batch = next(iter(data.train_dataloader()))
        assert (batch.features.patch_BND.shape[1] == 1) == reads_mean
        assert evaluate(task.model, data.plain_loader("test", annotations="all"), data.concepts)["num_pictures"] > 0
        return task.learned_state()

    mean, patches = trained(reads_mean=True), trained(reads_mean=False)
    assert mean.keys() == patches.keys()
    for key, value in mean.items():
        torch.testing.assert_close(value, patches[key], atol=2e-4, rtol=2e-3, msg=lambda said, key=key: f"{key}: {said}")


def test_bottlenecks_that_read_patches_are_given_them(run):
    _, data, _ = fitted(run, bottleneck=SALFCBM, epochs=1)
    assert next(iter(data.train_dataloader())).features.patch_BND.shape[1] > 1


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_each_step_seeds_its_device_as_torch_does(run, monkeypatch, kind):
    """Faster than `torch.manual_seed`, and the same numbers."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    monkeypatch.setattr(ConceptTask, "device", property(lambda task: torch.device(kind)))
    task = run.task(seed=3)
    task.on_train_batch_start(None, 7)
    drawn = torch.rand(4)
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(drawn, torch.rand(4))
    assert seeds == ([torch.initial_seed()] if kind == "cuda" else [])
    task.on_train_batch_start(None, 8)
    assert not torch.equal(drawn, torch.rand(4))
