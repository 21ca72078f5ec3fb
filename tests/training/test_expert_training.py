"""Training of experts: balance over the whole step, active experts by step, biases, and runs that stop and go on."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import from_pretrained
from dotcbm.models.linear_probe import LinearProbe
from dotcbm.moe.balance import expert_counts, switch_loss, top1_loss
from dotcbm.moe.layer import moe_layers
from dotcbm.moe.matryoshka import BudgetDraws
from dotcbm.moe.sparsify import Sparsification
from dotcbm.training.experts import ExpertTraining

FIGURES = {"max_vio", "min_vio", "dead", "entropy", "bias_spread", "switch_loss"}
SWITCH = Sparsification(start=(4, 2), target=1, begin=3)


def vit_moe(*, k: int = 2, trainable: bool = True, **settings) -> ImageEncoder:
    """Two layers of four experts; 40 training pictures less 8 for validation make 4 steps an epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moe = {"num_experts": 4, "k": k, "jitter": 0.1, "arguments": {"embed_dim": 32, "drop_path_rate": 0.1}}
        return ImageEncoder("vit_moe/test", pretrained=False, trainable=trainable, moe=moe, **settings)


def expert_task(run, experts: ExpertTraining | None, *, k: int = 2, **settings):
    return run.task(encoder=vit_moe(k=k), experts=experts, **{"lr": 1e-3, "regime": "joint", **settings})


class Watch(pl.Callback):
    """What the layers did in each training step, and the k that is in force between steps."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.resting: list[list[int]] = []
        self.counts: list[list[torch.Tensor]] = []
        self.bias: list[list[torch.Tensor]] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        layers = moe_layers(pl_module.encoder).values()
        self.bias.append([layer.router.selection_bias.clone() for layer in layers])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layers = moe_layers(pl_module.encoder).values()
        self.steps.append([layer.routing.index_TK.shape[1] for layer in layers])
        self.counts.append([expert_counts(layer.routing) for layer in layers])
        self.resting.append([layer.k for layer in layers])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.resting.append([layer.routing.index_TK.shape[1] for layer in moe_layers(pl_module.encoder).values()])


def test_draws_and_schedules_say_how_many_are_active_in_training_alone(run):
    for experts, k in ((ExpertTraining(draws=BudgetDraws(k_max=4, seed=3)), 2), (ExpertTraining(sparsify=SWITCH), 1)):
        watch = Watch()
        task = expert_task(run, experts, k=k)
        run.trainer(watch, epochs=2).fit(task, datamodule=run.data())
        schedule = experts.draws or experts.sparsify
        assert watch.steps == [[schedule.k(layer, step) for layer in (0, 1)] for step in range(8)]
        assert len({tuple(ks) for ks in watch.steps}) > 1
        assert all(ks == [k, k] for ks in watch.resting)


def test_figures_of_each_layer_are_logged(run):
    task = expert_task(run, ExpertTraining(z_weight=1e-3))
    trainer = run.trainer(epochs=1)
    trainer.fit(task, datamodule=run.data())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for layer in (0, 1):
        assert {f"val/experts/{layer}/{figure}" for figure in FIGURES} <= logged.keys()
        assert 0 <= logged[f"val/experts/{layer}/max_vio"] <= 3
        assert logged[f"val/experts/{layer}/switch_loss"] == pytest.approx(1, abs=0.2)
        assert logged[f"val/experts/{layer}/bias_spread"] == 0
    assert logged["train/balance_loss"] == pytest.approx(1, abs=0.2)
    assert logged["train/z_loss"] > 0
    # Experts that nothing balances have figures too.
    trainer = run.trainer(epochs=1)
    trainer.fit(expert_task(run, None), datamodule=run.data())
    assert "val/experts/1/dead" in trainer.callback_metrics
    assert "train/balance_loss" not in trainer.callback_metrics


def test_terms_are_means_over_layers_and_count_layer_by_layer(run):
    task = expert_task(run, ExpertTraining(balance="switch", balance_weight=0.05, z_weight=0.01))
    assert task.loss_weights["balance"] == pytest.approx(0.1)
    assert task.loss_weights["z"] == pytest.approx(0.02)
    torch.manual_seed(0)
    task.encoder(torch.randn(4, 3, 64, 64))
    terms = task.experts.terms()
    routing = [layer.routing for layer in task.experts.layers.values()]
    assert float(terms["balance"]) == pytest.approx(float(sum(switch_loss(each) for each in routing)) / 2)
    z = sum(each.logit_TE[each.counted_T].logsumexp(-1).square().mean() for each in routing) / 2
    assert float(terms["z"]) == pytest.approx(float(z), rel=1e-5)
    (gradient,) = torch.autograd.grad(terms["balance"] + terms["z"], [task.experts.layers["tower.model.blocks.1.mlp"].router.weight])
    assert gradient.abs().sum() > 0


def test_the_switch_loss_can_be_added_to_the_top1_loss(run):
    task = expert_task(run, ExpertTraining(balance="top1", top1_switch=3.0))
    torch.manual_seed(0)
    task.encoder(torch.randn(4, 3, 64, 64))
    expected = [top1_loss(layer.routing) + 3 * switch_loss(layer.routing) for layer in task.experts.layers.values()]
    assert float(task.experts.terms()["balance"]) == pytest.approx(float(sum(expected)) / 2)


@pytest.mark.parametrize("balance", ["none", "top1", "bias"])
def test_other_kinds_of_balance(run, balance):
    task = expert_task(run, ExpertTraining(balance=balance))
    trainer = run.trainer(epochs=1)
    trainer.fit(task, datamodule=run.data())
    assert ("train/balance_loss" in trainer.callback_metrics) == (balance == "top1")
    assert any(bool(layer.router.selection_bias.any()) for layer in task.experts.layers.values()) == (balance == "bias")


def test_biases_move_once_a_step_by_the_load_of_all_its_batches(run):
    watch = Watch()
    task = expert_task(run, ExpertTraining(balance="bias", bias_step=0.01))
    run.trainer(watch, epochs=2, accumulate_grad_batches=2).fit(task, datamodule=run.data())
    expected = [torch.zeros(4), torch.zeros(4)]
    for step in range(4):
        for layer in (0, 1):
            count_E = (watch.counts[2 * step][layer] + watch.counts[2 * step + 1][layer]).float()
            expected[layer] = expected[layer] + 0.01 * (count_E.mean() - count_E).sign()
    (first, second) = task.experts.layers.values()
    last = torch.load(run.folder / "run" / "last.ckpt", weights_only=True)["state_dict"]
    name = "model.encoder.tower.model.blocks.{}.mlp.router.selection_bias"
    assert torch.allclose(last[name.format(1)], expected[0])
    assert torch.allclose(last[name.format(3)], expected[1])
    # The run ends with the weights of its best epoch, biases included.
    best = torch.load(run.folder / "run" / "model.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(first.router.selection_bias, best[name.format(1)])
    assert torch.equal(second.router.selection_bias, best[name.format(3)])


def test_micro_batches_are_balanced_by_the_loads_of_the_step_so_far(run):
    task = expert_task(run, ExpertTraining(balance="global"))
    layers = list(task.experts.layers.values())
    loads, found = [torch.zeros(4), torch.zeros(4)], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        task.encoder(torch.randn(2, 3, 64, 64))
        loads = [load + expert_counts(layer.routing) for load, layer in zip(loads, layers)]
        found.append((float(task.experts.terms()["balance"]), sum(float(switch_loss(x.routing, c)) for x, c in zip(layers, loads)) / 2))
    assert found[0][0] == pytest.approx(found[0][1])
    assert found[1][0] == pytest.approx(found[1][1])
    task.experts.end_step()
    assert float(task.experts.terms()["balance"]) == pytest.approx(sum(float(switch_loss(x.routing)) for x in layers) / 2)


class StopAt(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("experts", "k"),
    [
        (ExpertTraining(draws=BudgetDraws(k_max=4), z_weight=1e-3), 2),
        (ExpertTraining(balance="bias", sparsify=Sparsification(start=(4, 3), begin=2, end=9)), 1),
    ],
    ids=["draws", "bias and schedule"],
)
def test_a_resumed_run_ends_with_the_same_bits(run, experts, k):
    settings = {"k": k, "ema_decay": 0.8}
    through = expert_task(run, experts, **settings)
    run.trainer(directory="through", epochs=3).fit(through, datamodule=run.data())
    with pytest.raises(SystemExit):
        run.trainer(StopAt(), epochs=3).fit(expert_task(run, experts, **settings), datamodule=run.data())
    resumed = expert_task(run, experts, **settings)
    run.trainer(epochs=3).fit(resumed, datamodule=run.data(), ckpt_path=str(run.folder / "run" / "last.ckpt"))
    for name in ("last.ckpt", "model.ckpt"):
        a, b = (torch.load(run.folder / folder / name, weights_only=True)["state_dict"] for folder in ("through", "run"))
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_the_moving_mean_takes_biases_and_leaves_scales(run):
    """The mean's routers choose by the mean's biases: the mean of those that were in force after each step."""

    class After(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(next(iter(moe_layers(pl_module.encoder).values())).router.selection_bias.clone())

    after = After()
    task = expert_task(run, ExpertTraining(balance="bias", bias_step=0.1), ema_decay=0.5)
    run.trainer(after, epochs=1).fit(task, datamodule=run.data())
    mean = torch.zeros(4)
    for seen in after.seen:
        mean = 0.5 * mean + 0.5 * seen
    router = next(iter(task.experts.layers.values())).router
    assert mean.any()
    assert torch.allclose(router.selection_bias, mean)
    assert float(router.scale) == 1


def test_what_is_saved_has_the_trained_number_of_active_experts(run):
    task = expert_task(run, ExpertTraining(sparsify=SWITCH), k=1)
    run.trainer(epochs=1).fit(task, datamodule=run.data())
    model = from_pretrained(run.folder / "run" / "model.ckpt")
    assert [layer.k for layer in moe_layers(model.encoder).values()] == [1, 1]


@pytest.mark.parametrize(
    ("experts", "k", "message"),
    [
        (ExpertTraining(draws=BudgetDraws(k_max=5)), 2, "k_max is 5, and .* has 4 experts"),
        (ExpertTraining(draws=BudgetDraws(k_min=3, k_max=4)), 2, "saved with 2, at which it is not trained"),
        (ExpertTraining(sparsify=Sparsification(start=(5, 1))), 1, "5 active experts in .* has 4"),
        (ExpertTraining(sparsify=Sparsification(start=(4, 2, 1))), 1, "3 entries, and the model 2 expert layers"),
        (ExpertTraining(sparsify=Sparsification(start=(4, 2), begin=8)), 1, "at step 8, and training ends after 8 steps"),
        (ExpertTraining(sparsify=SWITCH), 2, r"saved with k = \[2, 2\]; set k of its moe to 1"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_before_the_first_step(run, experts, k, message):
    with pytest.raises(ValueError, match=message):
        run.trainer(epochs=2).fit(expert_task(run, experts, k=k), datamodule=run.data())
    assert not (run.folder / "run" / "last.ckpt").exists()


def test_experts_need_an_encoder_that_has_and_trains_them(run):
    with pytest.raises(ValueError, match="timm/test_resnet has none"):
        run.task(experts=ExpertTraining())
    with pytest.raises(ValueError, match="vit_moe/test is frozen; set trainable to true"):
        run.task(encoder=vit_moe(trainable=False), experts=ExpertTraining())
    # A probe has no first stage: there is nothing to train, and no step to do it in.
    run.trainer(epochs=1).fit(expert_task(run, ExpertTraining(), regime="two_stage", bottleneck=LinearProbe), datamodule=run.data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": "swich"}, "choose one of"),
        ({"balance_weight": -1.0}, "neither may be negative"),
        ({"top1_tau": 0.0}, "must be positive"),
        ({"balance": "top1", "top1_switch": -1.0}, "may not be negative"),
        ({"balance": "global", "top1_switch": 1.0}, "belongs to balance: top1"),
        ({"bias_step": 0.0}, "must be positive"),
        ({"sparsify": SWITCH, "draws": BudgetDraws(k_max=2)}, "leave one of them out"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ExpertTraining(**settings)
