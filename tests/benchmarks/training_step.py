"""Transport's share of a training step on live features, and of an epoch on cached ones.

B pictures, N patches, M concepts, D shared width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dotcbm.data.copy_ahead import copied_ahead
from dotcbm.structures import PatchFeatures
from dotcbm.transport.cost import cosine_similarity
from dotcbm.transport.priors import patch_prior
from dotcbm.transport.sinkhorn import concept_scores

from .problems import Inputs
from .rivals import ours_name, pot_batch, solve_ours
from .tables import Table, milliseconds, number
from .timing import NUM_SETS, Samples, interleave

__all__ = ["CachedEpoch", "LiveStep", "StepRow", "cached_epoch", "epoch_table", "live_steps", "step_table"]

# (cosine, theta, gamma) to (B, M), the sums over patches of plan * cosine.
Transport = Callable[[Tensor, Tensor, Tensor], Tensor]

FIXED_PLAN = "fixed plan"
ADAPTERS_ALONE = "reading and adapters alone"
SHARED_WIDTH = 256
TEXT_WIDTH = 512
# An encoder without training gives flat costs, which meet any tolerance at once. So nobody stops early here, and ours does not accelerate:
# everyone makes the passes that trained-like costs take at eps 0.05 (see `problems`).
PASSES = 20


@dataclass(frozen=True)
class LiveStep:
    """Sizes of the step on live features."""

    encoder: str = "vit_base_patch16_224"
    image: int = 224
    num_images: int = 256
    num_concepts: int = 312


@dataclass(frozen=True)
class CachedEpoch:
    """Sizes of the epoch on cached features."""

    num_images: int = 6000
    num_patches: int = 196
    width: int = 768
    batch: int = 256
    num_concepts: int = 112


@dataclass(frozen=True)
class StepRow:
    """One variant of a step or an epoch.

    Attributes:
        encoder: "frozen", "trained", or "cached".
        variant: Which transport.
        samples: Its times.
        against: Its time over that of the baseline of the same round (fixed plan, or reading and adapters alone): the median.
    """

    encoder: str
    variant: str
    samples: Samples
    against: float


class Head(nn.Module):
    """DOT-CBM above the encoder, at its smallest: two linear adapters, cosine cost, transport, and the cosine readout."""

    text_MD: Tensor
    gamma_M: Tensor

    def __init__(self, patch_width: int, num_concepts: int) -> None:
        super().__init__()
        self.patch_adapter = nn.Linear(patch_width, SHARED_WIDTH)
        self.concept_adapter = nn.Linear(TEXT_WIDTH, SHARED_WIDTH)
        self.scale_M = nn.Parameter(torch.full((num_concepts,), 10.0))
        self.bias_M = nn.Parameter(torch.zeros(num_concepts))
        self.register_buffer("text_MD", torch.randn(num_concepts, TEXT_WIDTH))
        self.register_buffer("gamma_M", torch.full((num_concepts,), 1 / num_concepts))

    def adapted(self, patch_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, N, D) and concepts (M, D) in the shared space."""
        return self.patch_adapter(patch_BND), self.concept_adapter(self.text_MD)

    def forward(self, patch_BND: Tensor, transport: Transport) -> Tensor:
        """(B, M) concept logits."""
        B, N, _ = patch_BND.shape
        features = PatchFeatures(patch_BND, patch_BND[:, 0], (1, N))  # the norm prior reads neither global token nor grid
        theta_BN = patch_prior("norm", features, temperature=0.5)
        cosine_BNM = cosine_similarity(*self.adapted(patch_BND))
        return self.scale_M * transport(cosine_BNM, theta_BN, self.gamma_M.expand(B, -1)) / self.gamma_M + self.bias_M


def live_steps(sizes: LiveStep, *, eps: float, device: torch.device, repeats: int) -> list[StepRow]:
    """Forward, backward and optimiser step under bfloat16 autocast, with the encoder frozen and trained."""
    import timm

    with _seeded(device):
        encoder: Any = timm.create_model(sizes.encoder, pretrained=False, num_classes=0, img_size=sizes.image).to(device)
        num_patches = encoder.patch_embed.num_patches
        head = Head(encoder.num_features, sizes.num_concepts).to(device)
        images = [torch.randn(sizes.num_images, 3, sizes.image, sizes.image, device=device) for _ in range(NUM_SETS)]
        target_BM = torch.rand(sizes.num_images, sizes.num_concepts, device=device).round()
    transports = _transports((sizes.num_images, num_patches, sizes.num_concepts), eps, device)

    def step(transport: Transport, trained: bool, optimiser: torch.optim.Optimizer, index: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(trained):
                patch_BND = encoder.forward_features(images[index])[:, encoder.num_prefix_tokens :]
            logit_BM = head(patch_BND, transport)
            loss = F.binary_cross_entropy_with_logits(logit_BM, target_BM)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    rows: list[StepRow] = []
    for state, parameters in (("frozen", [*head.parameters()]), ("trained", [*head.parameters(), *encoder.parameters()])):
        optimiser = _optimiser(parameters, device)
        calls = {name: partial(step, transport, state == "trained", optimiser) for name, transport in transports.items()}
        rows += _rows(state, interleave(calls, device=device, repeats=repeats), baseline=FIXED_PLAN)
    return rows


def cached_epoch(sizes: CachedEpoch, *, eps: float, device: torch.device, repeats: int) -> list[StepRow]:
    """One epoch over float16 features in (on CUDA pinned) host memory, read in slices, against reading and adapters alone.

    All rows copy a slice to the GPU while they compute on the one before.
    """
    with _seeded(device):
        feature_BND = torch.empty(sizes.num_images, sizes.num_patches, sizes.width, dtype=torch.float16, pin_memory=device.type == "cuda")
        block_BND = torch.randn(min(sizes.batch, sizes.num_images), *feature_BND.shape[1:]).half()
        for part in feature_BND.split(len(block_BND)):
            part.copy_(block_BND[: len(part)])
        head = Head(sizes.width, sizes.num_concepts).to(device)
        target_BM = torch.rand(sizes.num_images, sizes.num_concepts, device=device).round()
        given_BND = torch.randn(sizes.batch, sizes.num_patches, SHARED_WIDTH, device=device, dtype=torch.bfloat16)
        given_MD = torch.randn(sizes.num_concepts, SHARED_WIDTH, device=device, dtype=torch.bfloat16)
    transports = _transports((sizes.batch, sizes.num_patches, sizes.num_concepts), eps, device)

    def epoch(transport: Transport | None, run: Callable[..., Tensor], optimiser: torch.optim.Optimizer, index: int) -> None:
        slices = copied_ahead(feature_BND.split(sizes.batch), device)
        for patch_BND, wanted_BM in zip(slices, target_BM.split(sizes.batch), strict=True):
            with torch.autocast(device.type, torch.bfloat16):
                if transport is None:
                    # Adapters alone have no loss: their backward pass starts from given gradients.
                    ends, gradients = head.adapted(patch_BND), (given_BND[: len(patch_BND)], given_MD)
                else:
                    ends, gradients = F.binary_cross_entropy_with_logits(run(patch_BND, transport), wanted_BM), None
            torch.autograd.backward(ends, gradients)
            optimiser.step()
            optimiser.zero_grad()

    optimiser = _optimiser([*head.parameters()], device)
    calls = {ADAPTERS_ALONE: partial(epoch, None, head, optimiser)}
    calls |= {name: partial(epoch, transport, head, optimiser) for name, transport in transports.items()}
    if device.type == "cuda":  # in Triton's interpreter nothing is compiled
        name = f"{ours_name('triton')}, scores alone"
        for mode, said in (("default", "torch.compile"), ("reduce-overhead", "torch.compile with CUDA graphs")):
            call = partial(epoch, transports[name], torch.compile(head, mode=mode), optimiser)
            try:
                call(0)
            except Exception as error:  # the other rows are worth having without it
                print(f"{said}: {type(error).__name__}: {error}")
                continue
            calls[f"{name}, {said}"] = call
    samples = interleave(calls, device=device, repeats=repeats)
    return _rows("cached", samples, baseline=ADAPTERS_ALONE)


def step_table(title: str, rows: Sequence[StepRow]) -> Table:
    """Times, and transport's share of the step."""
    lines = [
        [x.encoder, x.variant, milliseconds(x.samples), number(x.samples.wall_median), f"{100 * (1 - 1 / x.against):.1f} %"] for x in rows
    ]
    note = (
        f"Forward, backward and optimiser step under bfloat16 autocast; cosine and transport in float32, {PASSES} passes. The share of "
        "transport is the time that the same step spends less with a fixed plan in its place; the median over rounds."
    )
    return Table(title, ["encoder", "transport", "step, ms", "wall, ms", "share of transport"], lines, note)


def epoch_table(title: str, rows: Sequence[StepRow]) -> Table:
    """Times, and the ratio to reading and adapters alone."""
    lines = [[x.variant, milliseconds(x.samples), number(x.samples.wall_median), f"{number(x.against)}x"] for x in rows]
    note = f"All read the cache and run both adapters, forward and backward, and the optimiser; transport makes {PASSES} passes."
    return Table(title, ["transport", "epoch, ms", "wall, ms", "to reading and adapters alone"], lines, note)


def _transports(shape: tuple[int, int, int], eps: float, device: torch.device) -> dict[str, Transport]:
    _, N, M = shape
    plan_BNM = torch.full(shape, 1 / (N * M), device=device)
    solver: Literal["torch", "triton"] = "triton" if device.type == "cuda" else "torch"

    def fixed(cosine_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor) -> Tensor:
        del theta_BN, gamma_BM
        return (plan_BNM[: len(cosine_BNM)] * cosine_BNM).sum(1)

    def ours(cosine_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor) -> Tensor:
        return (solve_ours(_inputs(1 - cosine_BNM, theta_BN, gamma_BM), eps, PASSES, None, solver=solver)[0] * cosine_BNM).sum(1)

    def scores(cosine_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor) -> Tensor:
        return concept_scores(1 - cosine_BNM, theta_BN, gamma_BM, eps=eps, max_iter=PASSES, tol=None, solver=solver, check=False).score_BM

    def pot(cosine_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return (pot_batch(_inputs(1 - cosine_BNM, theta_BN, gamma_BM), eps, PASSES, None)[0] * cosine_BNM).sum(1)

    return {FIXED_PLAN: fixed, ours_name(solver): ours, f"{ours_name(solver)}, scores alone": scores, "POT solve_batch, autodiff": pot}


def _inputs(cost_BNM: Tensor, theta_BN: Tensor, gamma_BM: Tensor) -> Inputs:
    empty = cost_BNM.new_empty(0)
    return Inputs(cost_BNM, theta_BN, gamma_BM, weight_BNM=empty, patch_BND=empty, concept_MD=empty)


def _rows(encoder: str, samples: dict[str, Samples], *, baseline: str) -> list[StepRow]:
    base = np.array(samples[baseline].device)
    return [StepRow(encoder, name, x, float(np.median(np.array(x.device) / base))) for name, x in samples.items()]


def _optimiser(parameters: Sequence[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time inside; the generators go on after it as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
