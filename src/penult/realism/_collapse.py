"""How head and class means stand to each other: neural collapse, and the tilt identity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult.head import Head
from penult.realism._result import Collapse, TiltIdentity
from penult.realism._rows import Labelled

__all__ = ["collapse"]


@torch.no_grad()
def collapse(head: Head, held: Labelled) -> tuple[Collapse, TiltIdentity]:
    """Neural-collapse figures and tilt identity of labelled activations, as sums over one pass, in float64."""
    rows = head.centered_weight().cpu().double()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    bias = head.full_bias.cpu().double()
    moments = _Moments(rows)
    for h, y in held:
        moments.update(h.cpu().double(), y.cpu())
    seen = moments.count > 0
    means, w = moments.means()[seen], rows[seen]
    share = (moments.count[seen] / moments.count.sum()).unsqueeze(-1)
    middle = means.mean(0)
    cosines = _off_diagonal_cosines(rows)
    row_norms = moments.norm[seen] / moments.count[seen]
    figures = Collapse(
        weight_norm_min=float(norms.min()),
        weight_norm_max=float(norms.max()),
        weight_norm_cv=float(norms.std(correction=0) / norms.mean()),
        bias_max=float((bias - bias.mean()).abs().max()),
        mean_weight_norm=float(torch.linalg.vector_norm(head.mean_row.double())),
        weight_cosine_mean=cosines[0],
        weight_cosine_sd=cosines[1],
        weight_cosine_ideal=-1 / (head.num_classes - 1),
        mean_alignment_raw=float(torch.cosine_similarity(means, w, dim=-1).mean()),
        mean_alignment_centered=float(torch.cosine_similarity(means - middle, w, dim=-1).mean()),
        class_norm_min=float(row_norms.min()),
        class_norm_max=float(row_norms.max()),
        trace_within=moments.within(),
        trace_between=float((share * (means - (share * means).sum(0)).square()).sum()),
        classes=int(seen.sum()),
    )
    w = w - w.mean(0)
    square = float(w.square().sum())
    if square == 0 or figures.trace_within is None:
        return figures, TiltIdentity(None, None, None)
    offset = float(((means - middle) * w).sum()) / square
    variance = moments.within_along(w) / square
    return figures, TiltIdentity(offset, variance, offset / variance if variance > 0 else None)


class _Moments:
    """Class sums of activations, and what within-class variances need."""

    def __init__(self, rows: Tensor) -> None:
        k, d = rows.shape
        self.count = torch.zeros(k, dtype=torch.float64)
        self.norm = torch.zeros(k, dtype=torch.float64)
        self._sum = torch.zeros(k, d, dtype=torch.float64)
        self._product = torch.zeros(d, d, dtype=torch.float64)
        self._origin: Tensor | None = None  # near the mean, so that little cancels

    def update(self, h: Tensor, y: Tensor) -> None:
        if self._origin is None:
            self._origin = h.mean(0)
        self.count.index_add_(0, y, torch.ones(len(y), dtype=torch.float64))
        self.norm.index_add_(0, y, torch.linalg.vector_norm(h, dim=-1))
        h = h - self._origin
        self._sum.index_add_(0, y, h)
        self._product += h.T @ h

    def means(self) -> Tensor:
        assert self._origin is not None
        return self._sum / self.count.clamp_min(1).unsqueeze(-1) + self._origin

    def _freedom(self) -> float:
        return float(self.count.sum() - (self.count > 0).sum())

    def within(self) -> float | None:
        """Trace of the within-class covariance; None where no class has two rows."""
        if self._freedom() < 1:
            return None
        between = (self._sum.square().sum(-1) / self.count.clamp_min(1)).sum()
        return max(float(self._product.trace() - between) / self._freedom(), 0.0)

    def within_along(self, w: Tensor) -> float:
        """Σ_i w_i' S w_i over rows (n, d), for the within-class covariance S."""
        total = ((w @ self._product) * w).sum()
        means = self._sum / self.count.clamp_min(1).sqrt().unsqueeze(-1)
        return max(float(total - (means @ w.T).square().sum()) / self._freedom(), 0.0)


def _off_diagonal_cosines(rows: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the cosines between different rows (K, d)."""
    unit = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-300)
    k = len(unit)
    total = square = 0.0
    for block in unit.split(1024):
        gram = block @ unit.T
        total, square = total + float(gram.sum()), square + float(gram.square().sum())
    pairs = k * (k - 1)
    own = unit.square().sum(-1)
    mean = (total - float(own.sum())) / pairs
    return mean, math.sqrt(max((square - float(own.square().sum())) / pairs - mean * mean, 0.0))
