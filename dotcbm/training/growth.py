"""A larger model from a checkpoint of training, to be trained on; see `dotcbm.moe.growth`.

Weights, moving means of weights and, if asked for, the moments of Adam grow by one plan. Counters of epochs and steps go on unless they
are set back. The best weights so far were the small model's: the large one keeps its own record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

import dotcbm
from dotcbm.encoders.image import ImageEncoder
from dotcbm.encoders.vit_moe_growth import GrownViTMoE, Growth, grow_vit_moe
from dotcbm.models.concept_model import ConceptModel
from dotcbm.moe.growth import Plan, grow_moments, grow_tensors

__all__ = ["OptimizerGrowth", "grow_checkpoint", "grow_model"]

OptimizerGrowth = Literal["drop", "duplicate"]
_ENCODER = "model.encoder."


def grow_model(model: ConceptModel, growth: Growth) -> tuple[ConceptModel, dict[str, Any]]:
    """A finished model with a larger encoder.

    Args:
        model: Not changed; the large one shares its bottleneck.
        growth: What is wanted.

    Returns:
        The large model in eval mode, and the manifest.

    Raises:
        ValueError: An encoder without experts, or a growth that is not possible.
    """
    small = model.encoder
    grown = grow_vit_moe(small.settings, small.blueprint, small.state_dict(), growth)
    encoder = _encoder(grown, grow_tensors(small.state_dict(), grown.plan, alpha=growth.alpha, seed=growth.seed))
    large = ConceptModel(encoder, model.bottleneck).eval()
    large.edits = model.edits
    return large, _manifest(grown, growth, before=small.fingerprint(any_budget=True), after=encoder.fingerprint(any_budget=True))


def grow_checkpoint(
    checkpoint: Mapping[str, Any], growth: Growth, *, optimizer: OptimizerGrowth = "drop", restart: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint of a larger model.

    Args:
        checkpoint: As `dotcbm fit` wrote it, with a trained encoder; not changed.
        growth: What is wanted.
        optimizer: "drop" starts Adam's moments anew (the paper's), "duplicate" copies them with the weights.
        restart: Set the counters of epochs and steps back to 0.

    Returns:
        A checkpoint for `dotcbm fit --ckpt_path`, and the manifest. The checkpoint lists what it was grown by under ["dotcbm"]["growth"].

    Raises:
        ValueError: No checkpoint of dotcbm, a frozen encoder, one without experts, or a growth that is not possible.
    """
    about = checkpoint.get("dotcbm")
    if about is None:
        raise ValueError("this checkpoint was not written by dotcbm: it has no key 'dotcbm'")
    told = about["encoder"]
    if told["frozen"]:
        raise ValueError(
            "the checkpoint does not hold its encoder, which was frozen; grow the run's folder `model`, or train with trainable: true"
        )
    if optimizer not in ("drop", "duplicate"):
        raise ValueError(f"optimizer is {optimizer!r}; choose 'drop' or 'duplicate'")
    state: dict[str, Tensor] = checkpoint["state_dict"]
    small_state = {name.removeprefix(_ENCODER): value for name, value in state.items() if name.startswith(_ENCODER)}
    grown = grow_vit_moe(told["settings"], told["blueprint"], small_state, growth)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        small = ImageEncoder(**told["settings"], blueprint=told["blueprint"])
        small.load_state_dict(small_state)
        large = _encoder(grown, grow_tensors(small_state, grown.plan, alpha=growth.alpha, seed=growth.seed))
    before, after = small.fingerprint(any_budget=True), large.fingerprint(any_budget=True)
    manifest = _manifest(grown, growth, before=before, after=after)
    manifest |= {"optimizer": optimizer, "counters": "set back" if restart else "go on"}
    made = dict(checkpoint)
    made["state_dict"] = _grow_state(state, grown, growth)
    made["optimizer_states"] = [
        _grow_optimizer(entry, small, large, grown.plan, optimizer=optimizer) for entry in checkpoint.get("optimizer_states", [])
    ]
    made["callbacks"] = {key: _grow_callback(value, grown, growth) for key, value in checkpoint.get("callbacks", {}).items()}
    if restart:
        made.pop("loops", None)
        made |= {"epoch": 0, "global_step": 0}
    short = {name: value for name, value in manifest.items() if name != "tensors"}
    encoder = {**told, "settings": grown.settings, "blueprint": grown.blueprint, "fingerprint": after}
    made["dotcbm"] = {**about, "encoder": encoder, "growth": [*about.get("growth", []), short]}
    return made, manifest


def _grow_state(state: Mapping[str, Tensor], grown: GrownViTMoE, growth: Growth) -> dict[str, Tensor]:
    """Weights of a whole model: the encoder's grow, the others are taken over."""
    small = {name.removeprefix(_ENCODER): value for name, value in state.items() if name.startswith(_ENCODER)}
    large = grow_tensors(small, grown.plan, alpha=growth.alpha, seed=growth.seed)
    rest = {name: value for name, value in state.items() if not name.startswith(_ENCODER)}
    return rest | {_ENCODER + name: value for name, value in large.items()}


def _encoder(grown: GrownViTMoE, state: Mapping[str, Tensor]) -> ImageEncoder:
    with torch.random.fork_rng(devices=[]):
        encoder = ImageEncoder(**grown.settings, blueprint=grown.blueprint)
    encoder.load_state_dict(state)
    return encoder


def _manifest(grown: GrownViTMoE, growth: Growth, *, before: str, after: str) -> dict[str, Any]:
    """JSON values."""
    told: dict[str, Any] = {
        "format": 1,
        "version": dotcbm.__version__,
        "growth": asdict(growth),
        "exact": growth.exact,
        "small": {"fingerprint": before},
        "large": {"fingerprint": after},
        "blocks": list(grown.order),
        "layers_of_experts": list(grown.layers),
        "encoder": grown.settings,
        "tensors": {name: origin.to_dict() for name, origin in grown.plan.items()},
    }
    return json.loads(json.dumps(told))


def _grow_optimizer(
    entry: Mapping[str, Any], small: ImageEncoder, large: ImageEncoder, plan: Plan, *, optimizer: OptimizerGrowth
) -> dict[str, Any]:
    """The state of AdamW, whose last group are the encoder's parameters in their order (`ConceptTask.configure_optimizers`)."""
    *others, own = entry["param_groups"]
    old = [name for name, parameter in small.named_parameters() if parameter.requires_grad]
    new = [name for name, parameter in large.named_parameters() if parameter.requires_grad]
    if len(own["params"]) != len(old):
        raise ValueError(
            f"the optimizer trains {len(own['params'])} tensors of the encoder, which has {len(old)}; it is no checkpoint of this encoder"
        )
    first = own["params"][0]
    groups = [*others, {**own, "params": list(range(first, first + len(new)))}]
    if optimizer == "drop":
        return {**entry, "state": {}, "param_groups": groups}
    state = {number: value for number, value in entry["state"].items() if number < first}
    moments = {name: entry["state"][number] for name, number in zip(old, own["params"]) if number in entry["state"]}
    grown = grow_moments(moments, plan)
    state |= {first + place: grown[name] for place, name in enumerate(new) if name in grown}
    return {**entry, "state": state, "param_groups": groups}


def _grow_callback(value: Any, grown: GrownViTMoE, growth: Growth) -> Any:
    """Of `KeptWeights`: its mean grows, its best are forgotten. Others are taken over."""
    if not isinstance(value, Mapping) or not {"best", "best_epoch", "best_state", "mean"} <= set(value):
        return value
    mean = _grow_state(value["mean"], grown, growth) if value["mean"] else {}
    return {**value, "best": float("-inf"), "best_epoch": None, "best_state": {}, "mean": mean}
