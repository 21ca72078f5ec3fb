"""DOT-CBM as published: patches are transported straight onto concepts. `DotCBM` is what we recommend; this is what it is measured against.

Xie et al., "Discovering Fine-Grained Visual-Concept Relations by Disentangled Optimal Transport Concept Bottleneck Models",
CVPR 2025 (arXiv 2505.07209). Patches and concepts are adapted into one space; the plan that moves the patches' mass theta
onto the concepts' mass gamma at least cosine cost, with entropy eps, says which concept is read from which patch.

Departures from the paper, each with its reason:

1. Readout. The printed score (equation 12) cannot leave sigmoid(1) by more than 2 gamma_j / N; see `dotcbm.models.readout`.
   Default: `value`; `paper` stays selectable.
2. gamma. As printed (17, 18) it sums to M - 1; renormalised (`eq18`) it is uniform within 1 %. See `dotcbm.transport.priors`.
3. theta. As printed (4, 16), the softmax of raw dot products saturates on one patch; here the saliency is standardised,
   has a temperature, and is the patch's feature norm by default: with pooled features in place of a
   CLS token, the cosine to them points at the background as often as not.
4. Orthogonality. As printed (6, 7) it rewards negative cosines; see `dotcbm.losses.orthogonality`.
5. Mass. Balanced transport gives every concept its mass in every picture, present or not, and makes every patch give all
   of its own. A null concept takes the share that has no counterpart.
6. eps and the number of iterations are not in the paper: settings here, and the residual is reported.
"""

from __future__ import annotations

from torch import Tensor, nn

from dotcbm.losses import OrthogonalityForm, orthogonality
from dotcbm.models.adapters import AdapterKind, make_adapter
from dotcbm.models.base import Bottleneck
from dotcbm.models.concept_embedding import ConceptEmbedding
from dotcbm.models.readout import BiasStart, Readout, ReadoutKind
from dotcbm.structures import ConceptOutput, PatchFeatures, Problem
from dotcbm.transport.cost import add_null, cosine_similarity
from dotcbm.transport.priors import ConceptPrior, PatchPrior, concept_prior, patch_prior
from dotcbm.transport.sinkhorn import Solver, sinkhorn

__all__ = ["PublishedDotCBM"]

_TOLERANCE = 1e-4  # of the concepts' marginal, L1


def _gamma(problem: Problem, kind: ConceptPrior, *, temperature: float) -> Tensor:
    return concept_prior(kind, problem.concepts, temperature=temperature)


class PublishedDotCBM(Bottleneck):
    """Adapters, cosine cost, transport plan, readout, linear head."""

    gamma_M: Tensor

    def __init__(
        self,
        problem: Problem,
        *,
        dim: int = 256,
        adapter: AdapterKind = "mlp",
        dropout: float = 0.4,
        patch_prior: PatchPrior = "norm",
        patch_temperature: float = 0.5,
        concept_prior: ConceptPrior = "uniform",
        concept_temperature: float = 1.0,
        null_concept: float = 0.5,
        eps: float = 0.1,
        iterations: int = 30,
        solver: Solver = "auto",
        readout: ReadoutKind = "value",
        readout_scale: float = 10.0,
        readout_bias: BiasStart = "zero",
        orthogonality_form: OrthogonalityForm = "squared",
    ) -> None:
        """Args:
        problem: What the data and the encoder fix.
        dim: Width D of the shared space.
        adapter: See `make_adapter`; the paper's is "mlp".
        dropout: In the adapters.
        patch_prior: Where theta comes from; see `dotcbm.transport.priors.patch_prior`.
        patch_temperature: Of theta's softmax, on standardised saliency; smaller is sharper.
        concept_prior: Where gamma comes from; see `dotcbm.transport.priors.concept_prior`.
        concept_temperature: Of gamma's softmax.
        null_concept: Share of the patches' mass that need not go to any concept, in [0, 1).
        eps: Entropy of the plan, on costs in [0, 2].
        iterations: Most Sinkhorn iterations; each picture stops on its own, whatever is beside it, and the residual is in the output.
        solver: See `sinkhorn`.
        readout: See `dotcbm.models.readout`.
        readout_scale: Of the cosine readout's alpha at the start.
        readout_bias: Where the readout's biases start.
        orthogonality_form: See `dotcbm.losses.orthogonality`.

        Raises:
            ValueError: A share outside [0, 1), eps or iterations not positive.
        """
        super().__init__(
            problem,
            settings={
                "dim": dim,
                "adapter": adapter,
                "dropout": dropout,
                "patch_prior": patch_prior,
                "patch_temperature": patch_temperature,
                "concept_prior": concept_prior,
                "concept_temperature": concept_temperature,
                "null_concept": null_concept,
                "eps": eps,
                "iterations": iterations,
                "solver": solver,
                "readout": readout,
                "readout_scale": readout_scale,
                "readout_bias": readout_bias,
                "orthogonality_form": orthogonality_form,
            },
        )
        if not 0 <= null_concept < 1:
            raise ValueError(f"null_concept must lie in [0, 1), got {null_concept}: it is the share of mass that finds no counterpart")
        if eps <= 0 or iterations < 1:
            raise ValueError(f"eps and iterations must be positive, got eps={eps} and iterations={iterations}")
        num_concepts = problem.concepts.num_concepts
        self.patch_prior: PatchPrior = patch_prior
        self.patch_temperature = patch_temperature
        self.null_concept = null_concept
        self.eps = eps
        self.iterations = iterations
        self.solver: Solver = solver
        self.orthogonality_form: OrthogonalityForm = orthogonality_form
        self.patch_adapter = make_adapter(adapter, width_in=problem.patch_width, width_out=dim, dropout=dropout)
        self.concept = ConceptEmbedding(problem, dim=dim, adapter=adapter, dropout=dropout)
        # `concept_prior` the setting hides the function of that name here.
        self.register_buffer("gamma_M", _gamma(problem, concept_prior, temperature=concept_temperature))
        self.readout = Readout(
            readout,
            problem,
            width=problem.patch_width,
            scale=readout_scale,
            bias=readout_bias,
        )
        self.head = nn.Linear(num_concepts, problem.concepts.num_classes)

    def forward(self, features: PatchFeatures) -> ConceptOutput:
        """See `Bottleneck.forward`."""
        theta_BN = patch_prior(
            self.patch_prior,
            features.to(dtype=self.head.weight.dtype),
            temperature=self.patch_temperature,
            external_BN=features.saliency_BN if self.patch_prior == "external" else None,
        )
        return self.transported(features, theta_BN)

    def transported(self, features: PatchFeatures, theta_BN: Tensor) -> ConceptOutput:
        """`forward` with a patch prior from outside.

        Args:
            features: See `Bottleneck.forward`.
            theta_BN: (B, N) sums to 1.
        """
        patch_BND = features.patch_BND.to(self.head.weight.dtype)
        adapted_BND = self.patch_adapter(patch_BND)
        concept_MD = self.concept()
        cosine_BNM = cosine_similarity(adapted_BND, concept_MD)
        num_patches, num_concepts = cosine_BNM.shape[1:]
        cost, theta, gamma = 1 - cosine_BNM, theta_BN, self.gamma_M.expand(patch_BND.shape[0], -1)
        if self.null_concept:
            # Balanced plans do not depend on what a null concept alone costs.
            cost, theta, gamma = add_null(cost, theta, gamma, null_concept_mass=self.null_concept, null_patch_mass=0.0, null_cost=1.0)
        transport = sinkhorn(
            cost,
            theta,
            gamma,
            eps=self.eps,
            max_iter=self.iterations,
            tol=_TOLERANCE,
            solver=self.solver,
            check=False,
        )
        plan_BNM = transport.plan_BNM[:, :num_patches, :num_concepts]
        mass_BM = gamma[:, :num_concepts]
        weight_BNM = plan_BNM / mass_BM[:, None, :].clamp(min=1e-12)
        logit_BM, evidence_BNM = self.readout(
            weight_BNM,
            cosine_BNM=cosine_BNM,
            feature_BND=patch_BND,
            mass_BM=mass_BM,
        )
        return ConceptOutput(
            concept_logit_BM=logit_BM,
            class_logit_BK=self.classify(logit_BM),
            grid=features.grid,
            evidence_BNM=evidence_BNM,
            plan_BNM=plan_BNM,
            theta_BN=theta_BN,
            gamma_BM=mass_BM,
            residual_B=transport.residual_B,
            losses={
                "vop": orthogonality(adapted_BND, theta_BN, form=self.orthogonality_form),
                "top": orthogonality(concept_MD, form=self.orthogonality_form),
            }
            if self.training
            else {},
        )
