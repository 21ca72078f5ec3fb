"""What predicted concepts say beyond what the concepts mean.

    CTL_i   max(0, I(p_i; y) / H(y) - I(a_i; y) / H(y))                          about the class
    ICL_ij  max(0, I(p_i; p_j) / S - I(a_i; a_j) / sqrt(H(a_i) H(a_j)))           about another concept
    OIS     2 / M |AUC of a_j from p_i  -  AUC of a_j from a_i|_F                 about another concept, as a classifier finds it
    NIS     mean over b of the AUC of a_j from all p_i with |corr(p_i, a_j)| <= b    about another concept, spread over many

p are predicted and a true concepts, y the class. CTL and ICL: Parisini et al., "Leakage and interpretability in concept-based
models", 2025; S = psi(n) - psi(k + 1) is what the estimator gives for a variable and its copy, their code's normaliser. OIS and
NIS: Espinosa Zarlenga et al., "Towards robust metrics for concept representation evaluation", AAAI 2023. Without leakage they are
0, 0, 0 and, for concepts that are independent, 0.5.

All are biased on few pictures. The control is the same figure after each predicted concept was shuffled among the pictures of
equal truth (`shuffle_within_truth`): what it says of its concept stays, anything else is gone. What exceeds it is leakage.

Departures. OIS: the AUC of a predictor from one concept uses nearest neighbours of that concept's value, not a trained MLP: there
are M^2 of them. NIS: predictions are not put through a softmax over concepts, which are no alternatives, and the integral is
divided by the range of b, so that chance is 0.5. Both hold out a fifth of the pictures, drawn by the seed, as the authors do.
ICL: pairs are drawn where there are many.

In this file N counts the pictures of a split; M concepts, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dotcbm.metrics.concepts import concept_auroc
from dotcbm.metrics.information import discrete_entropy, discrete_information, ksg_information, ross_information, separate_ties
from dotcbm.metrics.standardize import standardize

__all__ = [
    "LeakageFigures",
    "concept_task_leakage",
    "interconcept_leakage",
    "measure_leakage",
    "niche_impurity",
    "oracle_impurity",
    "shuffle_within_truth",
]

_HELD_OUT = 0.2  # of both impurity scores' code
_NICHES = torch.arange(0.0, 0.975, 0.05)  # b of NIS, as its code steps
_EPOCHS = 300  # of the NIS network; on birds NIS is 0.85, 0.89, 0.90 after 100, 150, 300


@dataclass(frozen=True)
class LeakageFigures:
    """All scores, each with its control: the same after `shuffle_within_truth`.

    Attributes:
        ctl_M, ctl_control_M: (M,) in [0, 1]; NaN where undefined.
        icl, icl_control: Means over the pairs.
        num_pairs: Pairs drawn for ICL that are defined.
        ois, ois_control: In [0, 1].
        nis, nis_control: In [0, 1], 0.5 by chance.
        num_pictures: N.
    """

    ctl_M: Tensor
    ctl_control_M: Tensor
    icl: float
    icl_control: float
    num_pairs: int
    ois: float
    ois_control: float
    nis: float
    nis_control: float
    num_pictures: int


def measure_leakage(concept_NM: Tensor, truth_NM: Tensor, label_N: Tensor, *, num_pairs: int = 1000, seed: int = 0) -> LeakageFigures:
    """Every score of this file beside its control; see the functions for arguments and errors."""
    shuffled_NM = shuffle_within_truth(concept_NM, truth_NM, seed=seed)
    icl_MM, icl_control_MM = (interconcept_leakage(p_NM, truth_NM, num_pairs=num_pairs, seed=seed) for p_NM in (concept_NM, shuffled_NM))
    return LeakageFigures(
        ctl_M=concept_task_leakage(concept_NM, truth_NM, label_N, seed=seed),
        ctl_control_M=concept_task_leakage(shuffled_NM, truth_NM, label_N, seed=seed),
        icl=float(icl_MM.nanmean()),
        icl_control=float(icl_control_MM.nanmean()),
        num_pairs=int((~icl_MM.isnan()).sum()) // 2,
        ois=oracle_impurity(concept_NM, truth_NM, seed=seed),
        ois_control=oracle_impurity(shuffled_NM, truth_NM, seed=seed),
        nis=niche_impurity(concept_NM, truth_NM, seed=seed),
        nis_control=niche_impurity(shuffled_NM, truth_NM, seed=seed),
        num_pictures=len(concept_NM),
    )


def shuffle_within_truth(concept_NM: Tensor, truth_NM: Tensor, *, seed: int = 0) -> Tensor:
    """Each concept's predictions, permuted among the pictures with the same true value of it (unknown counts as one).

    Returns:
        (N, M) predictions that know their own concept as well as before, and nothing else.
    """
    _check(concept_NM, truth_NM)
    generator = torch.Generator().manual_seed(seed)
    shuffled_NM = concept_NM.clone()
    for j in range(concept_NM.shape[1]):
        truth_N = truth_NM[:, j]
        for rows_N in (truth_N == 0, truth_N == 1, truth_N.isnan()):
            rows_n = rows_N.nonzero()[:, 0]
            shuffled_NM[rows_n, j] = concept_NM[rows_n[torch.randperm(len(rows_n), generator=generator).to(rows_n.device)], j]
    return shuffled_NM


def concept_task_leakage(concept_NM: Tensor, truth_NM: Tensor, label_N: Tensor, *, k: int = 3, seed: int = 0) -> Tensor:
    """CTL of each concept.

    Args:
        concept_NM: (N, M) predicted probabilities or logits.
        truth_NM: (N, M) in {0, 1, NaN}; a concept is measured on the pictures where it is known.
        label_N: (N,) classes; pictures of a class that is seen once are left out.
        k: Neighbours of the estimator.
        seed: Of the noise that separates equal predictions.

    Returns:
        (M,) float64 in [0, 1] and, by the estimator's error, a little above; NaN where fewer than two classes are left.

    Raises:
        ValueError: Shapes differ, a prediction is not finite, or truth besides 0, 1 and NaN.
    """
    _check(concept_NM, truth_NM)
    if len(label_N) != len(concept_NM):
        raise ValueError(f"{len(label_N)} labels for {len(concept_NM)} pictures; give one for each")
    value_NM = separate_ties(concept_NM, seed=seed)
    truth_NM, label_N = truth_NM.detach().cpu(), label_N.detach().cpu()
    leakage_M = torch.full((concept_NM.shape[1],), torch.nan, dtype=torch.float64)
    # Concepts that are known on the same pictures are estimated together.
    known_XN, set_M = (~truth_NM.isnan()).T.unique(dim=0, return_inverse=True)
    for x, known_N in enumerate(known_XN):
        columns = (set_M == x).nonzero()[:, 0]
        rows_n = known_N.nonzero()[:, 0]
        label_n, count_K = label_N[rows_n].unique(return_inverse=True, return_counts=True)[1:]
        rows_n = rows_n[count_K[label_n] > 1]
        label_n, count_K = label_N[rows_n].unique(return_inverse=True, return_counts=True)[1:]
        if len(count_K) < 2:
            continue
        said_X = ross_information(value_NM[rows_n][:, columns], label_n, k=k)
        positive_nX = truth_NM[rows_n][:, columns].double()
        positive_XK = positive_nX.T @ F.one_hot(label_n).double()
        meant_X = discrete_information(torch.stack([positive_XK, count_K - positive_XK], 1))
        leakage_M[columns] = ((said_X - meant_X) / discrete_entropy(count_K)).clamp(min=0)
    return leakage_M


def interconcept_leakage(concept_NM: Tensor, truth_NM: Tensor, *, num_pairs: int | None = 1000, k: int = 3, seed: int = 0) -> Tensor:
    """ICL of pairs of concepts.

    Args:
        concept_NM, truth_NM, k: As `concept_task_leakage`; a pair is measured on the pictures where both are known.
        num_pairs: Unordered pairs drawn without replacement among those of concepts that vary; None takes all. 1,000 pairs of
            2,000 pictures take 3 s on one core.
        seed: Of the pairs and of the noise.

    Returns:
        (M, M) float64, symmetric; NaN for pairs that were not drawn or are undefined, and on the diagonal.

    Raises:
        ValueError: As `concept_task_leakage`.
        ModuleNotFoundError: SciPy is missing.
    """
    _check(concept_NM, truth_NM)
    truth_NM = truth_NM.detach().cpu()
    value_NM = separate_ties(concept_NM, seed=seed)
    m = truth_NM.shape[1]
    varies_M = (truth_NM == 0).any(0) & (truth_NM == 1).any(0)
    pair_X2 = torch.combinations(varies_M.nonzero()[:, 0])
    if num_pairs is not None and len(pair_X2) > num_pairs:
        pair_X2 = pair_X2[torch.randperm(len(pair_X2), generator=torch.Generator().manual_seed(seed))[:num_pairs]]
    leakage_MM = torch.full((m, m), torch.nan, dtype=torch.float64)
    for i, j in pair_X2.tolist():
        known_N = ~(truth_NM[:, i].isnan() | truth_NM[:, j].isnan())
        code_n = (2 * truth_NM[known_N, i] + truth_NM[known_N, j]).long()
        joint_122 = code_n.bincount(minlength=4).view(1, 2, 2)
        entropy = float(discrete_entropy(joint_122.sum(2)) * discrete_entropy(joint_122.sum(1)))
        if len(code_n) <= k + 1 or entropy == 0:
            continue
        largest = float(torch.special.digamma(torch.tensor([len(code_n), k + 1], dtype=torch.float64)).diff().neg())
        said = ksg_information(value_NM[known_N, i], value_NM[known_N, j], k=k) / largest
        meant = float(discrete_information(joint_122)) / math.sqrt(entropy)
        leakage_MM[i, j] = leakage_MM[j, i] = max(0.0, said - meant)
    return leakage_MM


def oracle_impurity(concept_NM: Tensor, truth_NM: Tensor, *, seed: int = 0) -> float:
    """OIS: how far the predictions' table of AUCs is from the one of the true concepts.

    Args:
        concept_NM, truth_NM: As `concept_task_leakage`. Pictures with an unknown concept do not count where it is the source or the
            target, for the predictions as for the truth.
        seed: Of the pictures that are held out.

    Returns:
        In [0, 1]: twice the root of the mean squared difference over the pairs that are defined; NaN if there are none.

    Raises:
        ValueError: As `concept_task_leakage`, or fewer than 5 pictures.
    """
    _check(concept_NM, truth_NM)
    train_n, test_n = _split(len(concept_NM), seed=seed)
    truth_NM = truth_NM.detach().cpu().double()
    said_MM, meant_MM = (
        _purity(source_NM[train_n], truth_NM[train_n], source_NM[test_n], truth_NM[test_n])
        for source_NM in (concept_NM.detach().cpu().double(), truth_NM)
    )
    return 2 * float((said_MM - meant_MM).square().nanmean().sqrt())


def niche_impurity(concept_NM: Tensor, truth_NM: Tensor, *, seed: int = 0) -> float:
    """NIS: how well a concept is predicted by the concepts that are little correlated with it.

    A network (two hidden layers of 20, the authors') learns all true concepts from all predicted ones. On held-out pictures it then
    predicts concept j with the inputs of j's niche, |corr(p_i, a_j)| > b, replaced by their means, for b = 0, 0.05 ... 0.95.

    Args:
        concept_NM, truth_NM: As `concept_task_leakage`; unknown truth is left out.
        seed: Of the held-out pictures and of the network.

    Returns:
        In [0, 1], 0.5 by chance: the AUC, mean over the concepts that vary in the held-out pictures and over b (trapezoids); NaN if
        none varies.

    Raises:
        ValueError: As `oracle_impurity`.
    """
    _check(concept_NM, truth_NM)
    train_n, test_n = _split(len(concept_NM), seed=seed)
    value_NM = concept_NM.detach().cpu().double()
    _, mean_M, deviation_M = standardize(value_NM[train_n])
    z_NM = ((value_NM - mean_M) / deviation_M).float()  # 0 stands for an input's mean
    truth_NM = truth_NM.detach().cpu().float()
    network = _train_network(z_NM[train_n], truth_NM[train_n], seed=seed)
    correlation_MM = _correlation(z_NM[train_n], truth_NM[train_n])
    target_nM = truth_NM[test_n]
    varies_M = (target_nM == 0).any(0) & (target_nM == 1).any(0)
    z_nM = z_NM[test_n]
    score_bnM = torch.zeros(len(_NICHES), len(test_n), z_nM.shape[1])
    for j in varies_M.nonzero()[:, 0].tolist():
        outside_bM = correlation_MM[:, j].abs() <= _NICHES[:, None]
        masked = (z_nM * outside_bM[:, None, :]).flatten(0, 1)
        score_bnM[:, :, j] = network(masked)[:, j].view(len(_NICHES), -1).detach()
    auc_b = torch.stack([concept_auroc(score_nM, target_nM).nanmean() for score_nM in score_bnM])
    return float(torch.trapezoid(auc_b, _NICHES.double()) / (_NICHES[-1] - _NICHES[0]))


def _purity(source_nM: Tensor, truth_nM: Tensor, source_mM: Tensor, truth_mM: Tensor) -> Tensor:
    """(M, M) AUC of target j from source i: learned on n pictures, measured on m.

    The score of a picture is the target's mean over the sqrt(n) training pictures nearest in rank, or over all of equal value. Only
    pictures where the truth of the source is known count.
    """
    num = source_nM.shape[1]
    auc_MM = torch.empty(num, num, dtype=torch.float64)
    for i in range(num):
        rows_n, rows_m = ~truth_nM[:, i].isnan(), ~truth_mM[:, i].isnan()
        source_n, target_nM = source_nM[rows_n, i], truth_nM[rows_n]
        source_m, target_mM = source_mM[rows_m, i].contiguous(), truth_mM[rows_m]
        if not len(source_n) or not len(source_m):
            auc_MM[i] = torch.nan
            continue
        half = max(math.isqrt(len(source_n)), 1) / 2
        sorted_n, order_n = source_n.sort()
        low_m = torch.searchsorted(sorted_n, source_m, right=False)
        high_m = torch.searchsorted(sorted_n, source_m, right=True)
        centre_m = (low_m + high_m) / 2
        low_m = torch.minimum(low_m, (centre_m - half).floor().long()).clamp(min=0)
        high_m = torch.maximum(high_m, (centre_m + half).ceil().long()).clamp(max=len(source_n))
        sums = [F.pad(c_nM[order_n].double().cumsum(0), (0, 0, 1, 0)) for c_nM in (target_nM.nan_to_num(0.0), ~target_nM.isnan())]
        positive_mM, known_mM = (total[high_m] - total[low_m] for total in sums)
        auc_MM[i] = concept_auroc(positive_mM / known_mM.clamp(min=1), target_mM)
    return auc_MM


def _train_network(z_nM: Tensor, truth_nM: Tensor, *, seed: int) -> nn.Sequential:
    """The network of `niche_impurity`, with Adam, batches of 200 and weight decay as scikit-learn's MLPClassifier sets them."""
    num = z_nM.shape[1]
    known_nM = ~truth_nM.isnan()
    filled_nM = truth_nM.nan_to_num(0.0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(num, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, num))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4 / min(200, len(z_nM)))
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(z_nM)).split(200):
                loss_nM = F.binary_cross_entropy_with_logits(network(z_nM[rows]), filled_nM[rows], reduction="none")
                loss = (loss_nM * known_nM[rows]).sum() / len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.requires_grad_(False)


def _correlation(z_nM: Tensor, truth_nM: Tensor) -> Tensor:
    """(M, M) of prediction i with truth j over the pictures where j is known; 0 where one of them is constant."""
    known_nM = (~truth_nM.isnan()).double()
    z_nM, a_nM = z_nM.double(), truth_nM.double().nan_to_num(0.0)
    count_M = known_nM.sum(0).clamp(min=1)
    mean_z_MM, mean_a_M = z_nM.T @ known_nM / count_M, a_nM.sum(0) / count_M
    covariance_MM = z_nM.T @ a_nM / count_M - mean_z_MM * mean_a_M
    variance_MM = (z_nM.square().T @ known_nM / count_M - mean_z_MM.square()) * (mean_a_M - mean_a_M.square())
    return torch.where(variance_MM > 1e-12, covariance_MM / variance_MM.clamp(min=1e-12).sqrt(), 0.0).float()


def _split(num: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to learn from and rows held out."""
    if num < 5:
        raise ValueError(f"{num} pictures leave none to hold out; impurity scores need 5 at least, and hundreds to mean something")
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    held = max(round(_HELD_OUT * num), 1)
    return order[held:], order[:held]


def _check(concept_NM: Tensor, truth_NM: Tensor) -> None:
    if concept_NM.ndim != 2 or concept_NM.shape != truth_NM.shape or not concept_NM.numel():
        raise ValueError(
            f"predictions have shape {tuple(concept_NM.shape)} and truth {tuple(truth_NM.shape)}; "
            "both must be (pictures, concepts), one of each at least"
        )
    if not concept_NM.isfinite().all():
        row, concept = (~concept_NM.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"the prediction of picture {row}, concept {concept} is {concept_NM[row, concept].item()}; predictions must be finite"
        )
    strange_NM = ~truth_NM.isnan() & (truth_NM != 0) & (truth_NM != 1)
    if strange_NM.any():
        row, concept = strange_NM.nonzero()[0].tolist()
        raise ValueError(
            f"the truth of picture {row}, concept {concept} is {truth_NM[row, concept].item():g}; it must be 0, 1 or NaN (unknown): "
            "cut soft labels at a threshold first"
        )
