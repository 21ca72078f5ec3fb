"""Training of a concept bottleneck, in two stages or jointly.

    two_stage   1. concepts:  0.8 BCE(concepts) + 0.15 L_VOP + 0.2 L_TOP  (Xie et al., CVPR 2025, equation 15, weights for CUB)
                2. classes:   the linear head on the frozen concepts, solved to the optimum (`dotcbm.training.head_fit`)
    independent like two_stage, but the head is fitted to the true concepts of the training pictures
    joint       both at once, plus class_weight * CE(classes)

Koh et al. (ICML 2020) call the three sequential, independent and joint.

Departure from the paper: stage 2 is a convex problem and is solved as one, not by AdamW.

Whatever is drawn (order, views, dropout) depends on the seed, the epoch and the batch alone, so a run that was stopped and
resumed ends with the weights of one that ran through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dotcbm.data.batches import Condense, mix_seed
from dotcbm.data.datamodule import ConceptDataModule
from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.text import TextEncoder
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.dot_cbm import DotCBM
from dotcbm.structures import ConceptBatch, ConceptOutput, Problem
from dotcbm.training.compiled import CompiledStep, CompileMode, check_accumulates, check_mode
from dotcbm.training.evaluation import Evaluation
from dotcbm.training.experts import ExpertFigures, ExpertTraining, ExpertWork
from dotcbm.training.flops import FlopsPerBatch
from dotcbm.training.guard import check_losses
from dotcbm.training.head_fit import HeadFit, check_reads_truth
from dotcbm.training.head_stage import solve_head
from dotcbm.training.kept_weights import KeptWeights
from dotcbm.training.optimizer import learns_places, make_optimizer, query_rate, rate_factor
from dotcbm.training.part_finding import check_finds_parts, prepare_parts
from dotcbm.training.record import check_record, make_record, record_tensors
from dotcbm.training.running_means import RunningMeans
from dotcbm.training.sharded import distribute, forget_made_up_moments, is_sharded

__all__ = ["ConceptTask", "Regime", "Weighting"]

Regime = Literal["two_stage", "independent", "joint"]
Weighting = Literal["none", "balanced"]

_DROPOUT, _WEIGHTS = 1, 2  # separate streams of the seed


class ConceptTask(LightningModule):
    """An encoder, a bottleneck to be built, and how to train it. Needs a `ConceptDataModule`.

    Attributes:
        model: The `ConceptModel`, built once the data's concepts are known.
        head_fit: What stage 2 found; None before.
    """

    model: ConceptModel
    encoder: ImageEncoder
    text: TextEncoder | None

    def __init__(
        self,
        encoder: ImageEncoder,
        bottleneck: Callable[[Problem], Bottleneck],
        text: TextEncoder | None = None,
        *,
        regime: Regime = "two_stage",
        lr: float = 1e-4,
        lr_halve_every: int = 10,
        weight_decay: float = 1e-5,
        encoder_lr: float | None = None,
        concept_weight: float = 0.8,
        vop_weight: float = 0.15,
        top_weight: float = 0.2,
        class_weight: float = 1.0,
        concept_weighting: Weighting = "none",
        class_weighting: Weighting = "none",
        head_l2: float | Literal["auto"] = "auto",
        head_views: Literal["plain", "all"] = "plain",
        head_nec: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,
        experts: ExpertTraining | None = None,
        expert_parallel: bool = True,
        compile: CompileMode | None = None,
        seed: int = 0,
    ) -> None:
        """Args:
        encoder: Frozen or trainable.
        bottleneck: Its class with all settings but the problem.
        text: Embeds the concept names; None lets the bottleneck learn its concept vectors.
        regime: See the head of this file.
        lr: Of AdamW at the start; this and the next two default to the paper's.
        lr_halve_every: Epochs after which the rate is halved; 0 for never.
        weight_decay: Of AdamW.
        encoder_lr: For a trainable encoder, at the start; `lr` by default.
        concept_weight, vop_weight, top_weight: Of the concept loss and the two orthogonality losses.
        class_weight: Of the class loss in "joint".
        concept_weighting: "balanced" weighs the positives of each concept by negatives / positives.
        class_weighting: "balanced" weighs pictures by the inverse frequency of their class.
        head_l2: L2 strength of stage 2, or "auto" for the best on the validation split.
        head_views: Fit stage 2 to the training pictures as they are, or to all views of the data module.
        head_nec: Fit a sparse head with this many effective concepts (non-zero weights) a class (`dotcbm.training.sparse_head`);
            None for a dense one. `head_l2` is then not read.
        monitor: Validation figure whose best epoch is kept: "val/accuracy" jointly, else "val/concept_auroc".
        ema_decay: Validate and keep a moving mean of the weights; None for the weights themselves.
        experts: How the experts of a trainable ViT-MoE are trained; None for without balance and with as many active as it has.
        expert_parallel: What Lightning's ModelParallelStrategy gives each process of a trainable ViT-MoE: whole experts, to which tokens
            travel, and a share of each other weight; or, if false, a share of every weight, whatever the number of experts.
        compile: Let torch.compile make a program of what training steps do above the encoder, losses included: "default", or
            "reduce-overhead", which replays it as CUDA graphs. It takes up to a minute, and serves where features are cached and epochs
            many. The encoder, trainable or not, and batches below the full size stay eager (`dotcbm.training.compiled`).
        seed: Of initial weights and dropout.

        Raises:
            ValueError: A setting out of range.
        """
        super().__init__()
        if regime not in get_args(Regime):
            raise ValueError(f"regime is {regime!r}; choose one of {list(get_args(Regime))}")
        if not lr > 0 or lr_halve_every < 0:
            raise ValueError(f"lr is {lr} and lr_halve_every {lr_halve_every}; lr must be positive, lr_halve_every 0 or more epochs")
        if head_l2 != "auto" and not head_l2 > 0:
            raise ValueError(f"head_l2 is {head_l2!r}; give a positive number or 'auto'")
        check_mode(compile)
        if head_nec is not None and head_nec < 1:
            raise ValueError(f"head_nec is {head_nec}; a class needs one concept at least, or None for a dense head")
        if head_nec is not None and regime == "joint":
            raise ValueError("head_nec fits a sparse head after the concepts; in the joint regime the head is trained with them")
        # Kept out of the module's own children: they are part of `model`, and a text tower is no part of it at all.
        object.__setattr__(self, "encoder", encoder)
        object.__setattr__(self, "text", text)
        self.make_bottleneck = bottleneck
        self.regime: Regime = regime
        self.lr = lr
        self.lr_halve_every = lr_halve_every
        self.weight_decay = weight_decay
        self.encoder_lr = encoder_lr
        self.loss_weights = {"concept": concept_weight, "vop": vop_weight, "top": top_weight, "class": class_weight}
        self.experts = ExpertWork(experts, encoder)
        self.expert_parallel = expert_parallel
        self.loss_weights |= self.experts.loss_weights
        self.concept_weighting: Weighting = concept_weighting
        self.class_weighting: Weighting = class_weighting
        self.head_l2: float | Literal["auto"] = head_l2
        self.head_views: Literal["plain", "all"] = head_views
        self.head_nec = head_nec
        self.monitor = monitor or ("val/accuracy" if regime == "joint" else "val/concept_auroc")
        self.ema_decay = ema_decay
        self.compile_mode: CompileMode | None = compile  # `compile` is a method of modules
        self.seed = seed
        self.head_fit: HeadFit | None = None
        self._fingerprint = ""
        self._pos_weight_M: Tensor | None = None
        self._class_weight_K: Tensor | None = None
        self._evaluations: list[Evaluation] = []
        self._compiled: CompiledStep | None = None
        self._means = {"train": RunningMeans(), "val": RunningMeans()}

    @property
    def data(self) -> ConceptDataModule:
        """The trainer's data.

        Raises:
            ValueError: The trainer was given something else.
        """
        data = cast(Any, self.trainer).datamodule
        if not isinstance(data, ConceptDataModule):
            raise ValueError(f"ConceptTask needs a ConceptDataModule, got {type(data).__name__}; call trainer.fit(task, datamodule=data)")
        return data

    def setup(self, stage: str) -> None:
        """Build the model from what the data says, with initial weights that depend on the seed alone."""
        data = self.data
        if not hasattr(self, "model"):
            self.model = self.build(data)
            self._fingerprint = self.encoder.fingerprint(any_budget=True)
        if stage != "fit":
            return
        check_accumulates(self.compile_mode, self.trainer.accumulate_grad_batches)
        bottleneck = self.model.bottleneck
        if isinstance(bottleneck, DotCBM):
            check_finds_parts(self.encoder)
            dataset = data.dataset("train")
            bottleneck.set_learned(dataset.concept_NM, dataset.label_N)
        data.condense_in_training = self._condense
        if bottleneck.head_by_gradient and self.regime != "joint":
            raise ValueError(f"the head of {type(bottleneck).__name__} is trained by gradients; set regime to 'joint', not {self.regime!r}")
        if self.regime == "independent":
            check_reads_truth(bottleneck)
        if self.regime != "joint" and self.head_nec is None and self.head_l2 == "auto" and not data.has_validation:
            # fit_head would say the same, after an hour.
            raise ValueError("head_l2 'auto' chooses on a validation split, and there is none; set val_fraction above 0 or give a number")
        # In stage 1 the head gets no gradient, which DDP must know before it starts. It refuses a model without any gradient.
        bottleneck.head.requires_grad_(self.regime == "joint" or self._is_all_head)
        self._pos_weight_M = data.concept_pos_weights() if self.concept_weighting == "balanced" else None
        self._class_weight_K = data.class_weights() if self.class_weighting == "balanced" else None

    def build(self, data: ConceptDataModule) -> ConceptModel:
        """A fresh model for the concepts of `data`."""
        concepts = data.concepts
        problem = Problem(
            patch_width=self.encoder.width,
            global_width=self.encoder.global_width,
            detail_width=self.encoder.detail_width,
            grid=self.encoder.grid,
            concepts=concepts,
            text_MD=None if self.text is None else self.text.encode(concepts.names).float().cpu(),
            concept_frequency_M=data.concept_frequency(),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, _WEIGHTS))
            return ConceptModel(self.encoder, self.make_bottleneck(problem))

    def configure_model(self) -> None:
        """Lightning's hook: divide the model among the processes, under its ModelParallelStrategy.

        Raises:
            ValueError: A setting that does not go with that.
        """
        if self.device_mesh is not None:
            if self.compile_mode is not None:
                raise ValueError("compile does not go with ModelParallelStrategy; leave it out, or set trainer.strategy to ddp")
            distribute(self.model, self.trainer, self.device_mesh, expert_parallel=self.expert_parallel)

    def configure_callbacks(self) -> list[Any]:
        """Keep the best weights and, at the end, fit the head; count operations where throughput is watched."""
        kept = [KeptWeights(self.monitor, ema_decay=self.ema_decay)] if self.trainer.state.fn == "fit" else []
        watched = any(isinstance(callback, ThroughputMonitor) for callback in cast(Any, self.trainer).callbacks)
        return [*kept, *([FlopsPerBatch()] if watched else [])]

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """See `make_optimizer`; None if there is nothing to train by gradients."""
        if self._is_all_head:
            return None
        query_lr = query_rate(self.trainer, lr=self.lr, halve_every=self.lr_halve_every) if learns_places(self.model) else 0.0
        return make_optimizer(self.model, lr=self.lr, query_lr=query_lr, encoder_lr=self.encoder_lr, weight_decay=self.weight_decay)

    @property
    def _is_all_head(self) -> bool:
        bottleneck = self.model.bottleneck
        of_head = {id(p) for p in bottleneck.head.parameters()}
        return self.regime != "joint" and all(id(p) in of_head for p in bottleneck.parameters())

    def on_fit_start(self) -> None:
        """Check the schedule of experts; find the parts of a bottleneck that needs them, unless a checkpoint brought them."""
        if self.experts.layers:
            self.experts.check(max_steps=self.trainer.estimated_stepping_batches)
        bottleneck = self.model.bottleneck
        if isinstance(bottleneck, DotCBM) and not bool(bottleneck.found):
            prepare_parts(bottleneck, self.data, self.encoder, seed=self.seed, device=self.device)
            for value in bottleneck.buffers():  # processes may differ in the last digits
                value.copy_(self.trainer.strategy.broadcast(value))

    def on_train_start(self) -> None:
        """A bottleneck without a trainable concept part (a linear probe) goes straight to stage 2.

        One that scales its features (random concepts) learns their means and deviations from one pass over the training pictures.
        """
        if self.global_step == 0 and is_sharded(self.model):
            forget_made_up_moments(self.trainer.optimizers)
        if self._is_all_head:
            if any(isinstance(module, nn.BatchNorm1d) for module in self.model.bottleneck.modules()):
                self.model.bottleneck.train()
                with torch.no_grad():
                    for batch in self.data.train_dataloader():
                        self.model.forward_batch(batch.to(self.device))
                for value in self.model.bottleneck.buffers():
                    value.copy_(self.trainer.strategy.broadcast(value))  # each process saw its share
            rank_zero_info(f"{type(self.model.bottleneck).__name__} has nothing to train but its head: straight to the head")
            self.trainer.should_stop = True
        elif self.compile_mode is not None:
            share = -(-len(self.data.dataset("train")) // self.trainer.world_size)
            size = min(self.data.batch_size, share)
            self._compiled = CompiledStep(self.model, self._loss_terms(), mode=self.compile_mode, batch_size=size)

    def on_train_end(self) -> None:
        """Let go of compiled code and its memory."""
        self._compiled = None

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch: a function of its number and no scheduler's state, so a resumed run cannot lose it."""
        factor = rate_factor(self.current_epoch, halve_every=self.lr_halve_every)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.log("lr", self.lr * factor)
        self._means["train"].take()  # of an epoch that was stopped

    def on_train_batch_start(self, batch: ConceptBatch, batch_idx: int) -> None:
        """Draw dropout from (seed, epoch, batch, process).

        For each batch anew, because loaders and callbacks draw from the same generator, and not at the same moments in a
        resumed run.
        """
        del batch
        seed = mix_seed(self.seed, _DROPOUT, self.current_epoch, batch_idx, self.global_rank)
        # As torch.manual_seed does, which also leaves word for kinds of devices that nobody uses: a millisecond on a processor.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: ConceptBatch, batch_idx: int) -> Tensor:
        """The loss of a batch.

        Raises:
            NonFiniteError: It is NaN or infinite.
        """
        del batch_idx
        with self.experts.at_step(self.global_step):
            terms, residual = self._read(batch)
        terms |= self.experts.terms()
        check_losses(terms, epoch=self.current_epoch, step=self.global_step, names=batch.names, checkpoint=self._last_checkpoint())
        loss = torch.stack([self.loss_weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
        told = {"loss": loss} | {f"{name}_loss": term for name, term in terms.items()}
        if residual is not None:
            told["transport_residual"] = residual
        self._means["train"].add(told, len(batch))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: ConceptBatch, batch_idx: int) -> None:
        """Log the means of the epoch with its last batch, for validation and whoever watches epochs end."""
        del outputs, batch, batch_idx
        if self.trainer.is_last_batch:
            self._log_means("train")

    def on_train_epoch_end(self) -> None:
        """The same of an epoch that ended before its last batch."""
        self._log_means("train")

    def _log_means(self, split: str) -> None:
        for name, (mean, count) in self._means[split].take().items():
            shown = split == "train" and name == "loss"
            self.log(f"{split}/{name}", mean, prog_bar=shown, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)

    def _read(self, batch: ConceptBatch) -> tuple[dict[str, Tensor], Tensor | None]:
        """The terms of a training batch, and the mean residual of its transport."""
        if self._compiled is not None and len(batch) == self._compiled.batch_size:
            return self._compiled(self.model.features_of(batch), batch.concepts_BM, batch.label_B)
        output = self.model.forward_batch(batch)
        return self.losses(output, batch), None if output.residual_B is None else output.residual_B.mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: after a step of the optimizer the experts end theirs, before any moving mean is taken."""
        super().optimizer_step(*args, **kwargs)
        self.experts.end_step()

    def losses(self, output: ConceptOutput, batch: ConceptBatch) -> dict[str, Tensor]:
        """The unweighted terms: those of the bottleneck ("concept", "vop", "top"), and "class" in the joint regime."""
        return self._loss_terms()(output, batch.concepts_BM, batch.label_B)

    def _loss_terms(self) -> Callable[[ConceptOutput, Tensor, Tensor], dict[str, Tensor]]:
        return partial(
            _loss_terms,
            self.model.bottleneck,
            joint=self.regime == "joint",
            pos_weight_M=None if self._pos_weight_M is None else self._pos_weight_M.to(self.device),
            class_weight_K=None if self._class_weight_K is None else self._class_weight_K.to(self.device),
        )

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._means["val"].take()  # of a validation that was stopped
        self._evaluations = [Evaluation(self.model.concepts, places=False)]
        self._expert_figures = ExpertFigures(self.encoder)

    def validation_step(self, batch: ConceptBatch, batch_idx: int) -> None:
        """Count."""
        del batch_idx
        output = self.model.forward_batch(batch)
        terms = self.losses(output, batch)
        check_losses(terms, epoch=self.current_epoch, step=self.global_step, names=batch.names, checkpoint=self._last_checkpoint())
        self._means["val"].add({f"{name}_loss": term for name, term in terms.items()}, len(batch))
        self._evaluations[0].update(output, batch)
        self._expert_figures.update()

    def on_validation_epoch_end(self) -> None:
        """Log the figures; the accuracy only where the head is trained."""
        self._log_means("val")
        figures = self._evaluations[0].gather().compute()
        wanted = {"concept_auroc", "concept_error"}
        if self.regime == "joint" or self.head_fit is not None or self.trainer.state.fn != "fit":
            wanted.add("accuracy")
        for name in sorted(wanted & figures.keys()):
            self.log(f"val/{name}", figures[name], prog_bar=name != "concept_error", rank_zero_only=False, sync_dist=False)
        for name, value in self._expert_figures.compute().items():
            self.log(f"val/{name}", value, rank_zero_only=False, sync_dist=False)

    def on_test_epoch_start(self) -> None:
        """Start counting, split by split."""
        self._evaluations = [Evaluation(self.model.concepts) for _ in self.data.evaluate_splits]

    def test_step(self, batch: ConceptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count."""
        del batch_idx
        self._evaluations[dataloader_idx].update(self.model.forward_batch(batch), batch)

    def on_test_epoch_end(self) -> None:
        """Log all figures of all splits as `<split>/<figure>` (see `Evaluation.compute`)."""
        for split, evaluation in zip(self.data.evaluate_splits, self._evaluations):
            for name, value in evaluation.gather().compute().items():
                self.log(f"{split}/{name}", value, rank_zero_only=False, sync_dist=False)

    def predict_step(self, batch: ConceptBatch, batch_idx: int) -> ConceptOutput | None:
        """The output of a batch on the CPU, one row for each of `batch.names`; None if no picture of it could be decoded."""
        del batch_idx
        return self.model.forward_batch(batch).detach().to("cpu") if len(batch) else None

    def on_predict_end(self) -> None:
        """Name the pictures that were left out."""
        self.data.report_skipped()

    def finish(self) -> None:
        """Stage 2; `KeptWeights` calls it when stage 1 has ended and the best weights are in place."""
        head = self.model.bottleneck.head
        head.requires_grad_(True)
        if self.regime == "joint":
            return
        fit = solve_head(
            self.model,
            self.data,
            on_truth=self.regime == "independent",
            views=self.head_views,
            l2=None if self.head_l2 == "auto" else self.head_l2,
            nec=self.head_nec,
            condense=self._condense,
            class_weight_K=self._class_weight_K,
        )
        fit = self.trainer.strategy.broadcast(fit)  # processes may differ in the last digits
        with torch.no_grad():
            head.weight.copy_(fit.weight_KF)
            head.bias.copy_(fit.bias_K)
        self.head_fit = fit
        said = f", {100 * fit.val_accuracy:.1f} % in validation" if self.data.has_validation else ""
        strength = f"{'l2' if self.head_nec is None else 'strength'} = {fit.l2:g}"
        rank_zero_info(f"Head fitted with {strength}: class accuracy {100 * fit.train_accuracy:.1f} % in training{said}")
        figures = {"head/l2": fit.l2, "head/train_accuracy": fit.train_accuracy}
        if self.data.has_validation:
            figures["head/val_accuracy"] = fit.val_accuracy
        for logger in self.trainer.loggers:
            logger.log_metrics(figures, step=self.global_step)

    @property
    def _condense(self) -> Condense | None:
        return None if self.encoder.trainable else self.model.bottleneck.condense

    def learned_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model, without those of a frozen encoder; not copied."""
        state = self.model.state_dict(prefix="model.")
        if self.encoder.trainable:
            return state
        return {name: value for name, value in state.items() if not name.startswith("model.encoder.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen encoder's weights out, and say what the checkpoint is (`dotcbm.training.record`)."""
        kept = self.learned_state()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        checkpoint["dotcbm"] = make_record(self.model, fingerprint=self._fingerprint, regime=self.regime)
        checkpoint["dotcbm_tensors"] = record_tensors(self.model.bottleneck.problem)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs here.

        Raises:
            ValueError: Other concepts, another encoder, or another bottleneck; what differs is named.
        """
        check_record(checkpoint, model=self.model, fingerprint=self._fingerprint)
        if not self.encoder.trainable:
            frozen = self.model.encoder.state_dict(prefix="model.encoder.")
            checkpoint["state_dict"] = {**frozen, **checkpoint["state_dict"]}

    def _last_checkpoint(self) -> str | None:
        paths = [getattr(callback, "last_model_path", "") for callback in self.trainer.checkpoint_callbacks]
        return next((path for path in paths if path), None)


def _loss_terms(
    bottleneck: Bottleneck,
    output: ConceptOutput,
    concepts_BM: Tensor,
    label_B: Tensor,
    *,
    joint: bool,
    pos_weight_M: Tensor | None,
    class_weight_K: Tensor | None,
) -> dict[str, Tensor]:
    terms = bottleneck.losses(output, concepts_BM=concepts_BM, label_B=label_B, pos_weight_M=pos_weight_M)
    if joint:
        terms["class"] = F.cross_entropy(output.class_logit_BK, label_B, weight=class_weight_K)
    return terms
