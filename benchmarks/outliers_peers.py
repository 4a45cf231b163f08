"""Outlier scores of other authors, label-free, after the formulas of their papers.

`PEERS` maps a name to a function of a head (``weight`` (K, d), ``bias`` (K,)) and reference activations (N, d) that
returns a score of activations: (B, d) -> (B,), higher for outliers. Predictions of the head stand in for labels.
Hyperparameters are those that the papers use most; nothing is tuned to outliers.

Scores that scale or prune activations (ASH, SCALE) were made for activations after a ReLU; on others the sums are
taken of the positive parts.

References:
    msp: Hendrycks and Gimpel 2017. Max logit: Hendrycks et al. 2022. Energy: Liu et al. 2020. GEN: Liu et al. 2023.
    ViM: Wang et al. 2022. KNN: Sun et al. 2022. Mahalanobis: Lee et al. 2018; relative: Ren et al. 2021; ++: Mueller
    and Hein 2025. NNGuide: Park et al. 2023. fDBD: Liu and Qin 2024. CoP: Fang et al. 2024. CADRef and
    CARef: Ling et al. 2025. NECO: Ben Ammar et al. 2024. SCALE: Xu et al. 2024. ASH: Djurisic et al. 2023.
    ReAct: Sun et al. 2021. SHE: Zhang et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import penult
from penult.scores import Mahalanobis, RelativeMahalanobis, ViM

__all__ = ["PEERS", "Peer"]

Score = Callable[[Tensor], Tensor]
Peer = Callable[[Tensor, Tensor, Tensor], Score]

NEIGHBOURS = 20
GUIDES = 10
GEN_POWER, GEN_SHARE = 0.1, 0.1
VARIANCE = 0.9
CLIP = 0.9
PRUNED, SCALED = 0.9, 0.85


def _logits(weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    return h @ weight.T + bias


def _class_means(weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """Return means (K, d) by prediction; those of classes that are never predicted are the mean of all rows."""
    index = _logits(weight, bias, rows).argmax(-1)
    counts = torch.bincount(index, minlength=len(weight))
    sums = torch.zeros_like(weight).index_add_(0, index, rows)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], rows.mean(0))


def msp(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """log(1 - max softmax) - log(max softmax), which has the order of msp and no ties near 1."""

    def score(h: Tensor) -> Tensor:
        logs = _logits(weight, bias, h).double().log_softmax(-1)
        top, index = logs.max(-1)
        return logs.scatter(-1, index[:, None], -torch.inf).logsumexp(-1) - top

    return score


def max_logit(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Negative largest logit."""
    return lambda h: -_logits(weight, bias, h).amax(-1)


def energy(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Negative log-sum-exp of the logits."""
    return lambda h: -_logits(weight, bias, h).logsumexp(-1)


def gen(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Sum of (p (1 - p))^0.1 over the M largest p; M = K for K <= 10, else a tenth of K and at least 10."""
    count = min(len(weight), max(10, round(GEN_SHARE * len(weight))))

    def score(h: Tensor) -> Tensor:
        top = _logits(weight, bias, h).double().softmax(-1).topk(count).values
        return (top * (1 - top)).clamp(min=0).pow(GEN_POWER).sum(-1)

    return score


def knn(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Distance of h/|h| to its 20th nearest of the rows."""
    bank = torch.nn.functional.normalize(rows)
    count = min(NEIGHBOURS, len(bank))
    return lambda h: (2 - 2 * torch.nn.functional.normalize(h) @ bank.T).kthvalue(count).values


def maha_var(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """MahaVar++: standardised smallest distance minus standardised deviation of the distances over classes."""
    unit = torch.nn.functional.normalize(rows).double()
    index = _logits(weight, bias, rows).argmax(-1)
    names, index = index.unique(return_inverse=True)
    counts = torch.bincount(index)
    means = torch.zeros(len(names), unit.shape[1], dtype=unit.dtype, device="cpu").index_add_(0, index, unit)
    means /= counts[:, None]
    residual = unit - means[index]
    covariance = residual.T @ residual / len(unit)
    covariance = _oas(covariance, len(unit))
    factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
    whitened = means @ factor

    def distances(h: Tensor) -> tuple[Tensor, Tensor]:
        squared = torch.cdist(torch.nn.functional.normalize(h).double() @ factor, whitened).square()
        spread = squared.std(-1, correction=0) if squared.shape[1] > 1 else torch.zeros(len(h), device="cpu")
        return squared.amin(-1), spread

    center, spread = distances(rows)

    def score(h: Tensor) -> Tensor:
        low, deviation = distances(h)
        standard = (low - center.mean()) / center.std()
        return standard - (deviation - spread.mean()) / spread.std().clamp(min=1e-12)

    return score


def _oas(covariance: Tensor, count: int) -> Tensor:
    """Shrink a covariance (Chen et al. 2010)."""
    d = len(covariance)
    trace, square = covariance.trace(), covariance.square().sum()
    top = (1 - 2 / d) * square + trace.square()
    bottom = (count + 1 - 2 / d) * (square - trace.square() / d)
    share = float((top / bottom).clamp(max=1))
    return (1 - share) * covariance + share * trace / d * torch.eye(d, dtype=covariance.dtype, device="cpu")


def nnguide(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Energy times the mean of the 10 largest cosines with rows, each times its row's energy."""
    bank = torch.nn.functional.normalize(rows) * _logits(weight, bias, rows).logsumexp(-1)[:, None]
    count = min(GUIDES, len(bank))

    def score(h: Tensor) -> Tensor:
        guide = (torch.nn.functional.normalize(h) @ bank.T).topk(count).values.mean(-1)
        return -guide * _logits(weight, bias, h).logsumexp(-1)

    return score


def fdbd(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Negative mean distance to the decision boundaries, over the distance to the mean row."""
    center = rows.mean(0)
    gaps = torch.cdist(weight, weight)

    def score(h: Tensor) -> Tensor:
        logits = _logits(weight, bias, h)
        top, index = logits.max(-1)
        distance = (top[:, None] - logits) / gaps[index].masked_fill(gaps[index] == 0, torch.inf)
        return -distance.sum(-1) / (len(weight) - 1) / torch.linalg.vector_norm(h - center, dim=-1)

    return score


def _components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) of rows and the leading principal axes (d, r) with 90 % of the variance."""
    center = rows.mean(0)
    centered = (rows - center).double()
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    shares = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    count = int((shares < VARIANCE).sum()) + 1
    return center, vectors.flip(1)[:, :count].to(rows.dtype)


def cop(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Reconstruction error of h/|h| by principal axes."""
    center, axes = _components(torch.nn.functional.normalize(rows))

    def score(h: Tensor) -> Tensor:
        centered = torch.nn.functional.normalize(h) - center
        return torch.linalg.vector_norm(centered - centered @ axes @ axes.T, dim=-1)

    return score


def caref(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """CARef: 1-norm of the deviation from the mean of the predicted class, over the 1-norm of h."""
    means = _class_means(weight, bias, rows)

    def score(h: Tensor) -> Tensor:
        deviation = h - means[_logits(weight, bias, h).argmax(-1)]
        return deviation.abs().sum(-1) / h.abs().sum(-1)

    return score


def cadref(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """CADRef with GEN: CARef split by the signs of the predicted class's weights.

    The part along the weights is divided by the logit score of h (1 / `gen`), the other by its mean over rows.
    """
    means, doubt = _class_means(weight, bias, rows), gen(weight, bias, rows)
    mean_certainty = doubt(rows).reciprocal().mean()

    def score(h: Tensor) -> Tensor:
        index = _logits(weight, bias, h).argmax(-1)
        deviation = (h - means[index]) * weight[index].sign()
        along, against = (part.clamp(min=0).sum(-1) / h.abs().sum(-1) for part in (deviation, -deviation))
        return along * doubt(h) + against / mean_certainty

    return score


def neco(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Negative share of the centred norm in the principal axes, times the largest logit."""
    center, axes = _components(rows)

    def score(h: Tensor) -> Tensor:
        centered = h - center
        inside = torch.linalg.vector_norm(centered @ axes, dim=-1)
        return -inside / torch.linalg.vector_norm(centered, dim=-1) * _logits(weight, bias, h).amax(-1)

    return score


def scale(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Energy of exp(s1 / s2) h, where s1 sums h and s2 its entries above the 85 % quantile."""

    def score(h: Tensor) -> Tensor:
        positive = h.clamp(min=0)
        limit = h.quantile(SCALED, dim=-1, keepdim=True)
        top = positive.where(h >= limit, 0).sum(-1, keepdim=True).clamp(min=1e-9)
        factor = (positive.sum(-1, keepdim=True) / top).clamp(max=20).exp()
        return -_logits(weight, bias, h * factor).logsumexp(-1)

    return score


def ash(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """ASH-S: energy of the entries of h above the 90 % quantile, times exp(s1 / s2), the sums before and after."""

    def score(h: Tensor) -> Tensor:
        positive = h.clamp(min=0)
        limit = h.quantile(PRUNED, dim=-1, keepdim=True)
        pruned = positive.where(h >= limit, 0)
        top = pruned.sum(-1, keepdim=True).clamp(min=1e-9)
        factor = (positive.sum(-1, keepdim=True) / top).clamp(max=20).exp()
        return -_logits(weight, bias, pruned * factor).logsumexp(-1)

    return score


def react(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Energy of activations clipped at the 90 % quantile of all entries of the rows."""
    values = rows.flatten()
    limit = float(values[:: max(1, len(values) // 1_000_000)].quantile(CLIP))
    return lambda h: -_logits(weight, bias, h.clamp(max=limit)).logsumexp(-1)


def she(weight: Tensor, bias: Tensor, rows: Tensor) -> Score:
    """Negative inner product with the mean of the predicted class."""
    means = _class_means(weight, bias, rows)
    return lambda h: -(h * means[_logits(weight, bias, h).argmax(-1)]).sum(-1)


def _head(weight: Tensor, bias: Tensor) -> penult.Head:
    return penult.Head(weight, bias)


PEERS: dict[str, Peer] = {
    "msp": msp,
    "max logit": max_logit,
    "energy": energy,
    "GEN": gen,
    "ViM": lambda weight, bias, rows: ViM.fit(_head(weight, bias), rows),
    "KNN": knn,
    "Mahalanobis": lambda weight, bias, rows: Mahalanobis.fit(rows, head=_head(weight, bias)),
    "relative Mahalanobis": lambda weight, bias, rows: RelativeMahalanobis.fit(rows, head=_head(weight, bias)),
    "Mahalanobis++": lambda weight, bias, rows: Mahalanobis.fit(rows, head=_head(weight, bias), normalize=True),
    "MahaVar++": maha_var,
    "NNGuide": nnguide,
    "fDBD": fdbd,
    "CoP": cop,
    "CARef": caref,
    "CADRef": cadref,
    "NECO": neco,
    "SCALE": scale,
    "ASH": ash,
    "ReAct": react,
    "SHE": she,
}
"""Label-free scores by name."""
