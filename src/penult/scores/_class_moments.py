"""Means of classes, the covariance that they share, and distances to them in its deviations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penult.activations import Activations
from penult.scores._blocks import check_integers, labelled_blocks
from penult.special import in_double

__all__ = ["class_moments", "labels_of", "least_distance", "whitener_of"]


def labels_of(activations: Tensor | Activations, labels: Tensor | None) -> Tensor:
    """Labels (N,) that are given, or those of `Activations`.

    Raises:
        TypeError: They are no integers.
        ValueError: There are none.
    """
    if labels is None and isinstance(activations, Activations):
        labels = activations.labels
    if labels is None:
        raise ValueError(
            "class means need labels (N,), and there are none; the head's predictions will do: labels=acts.predicted"
        )
    check_integers(labels)
    return labels


def class_moments(activations: Tensor | Activations, labels: Tensor, shrinkage: float) -> tuple[Tensor, ...]:
    """Means (K, d) of classes that have rows, covariance within classes, mean (d,) and covariance of all."""
    classes, index = labels.unique(return_inverse=True)
    sums: Any = None
    for rows, y in labelled_blocks(activations, index):
        wide = in_double(rows)
        if sums is None:
            sums = wide.new_zeros(len(classes), rows.shape[1])
        sums.index_add_(0, y.to(wide.device), wide)
    counts = index.bincount(minlength=len(classes)).to(sums)
    means, mean = sums / counts.unsqueeze(-1), sums.sum(0) / counts.sum()
    within = sums.new_zeros(sums.shape[1], sums.shape[1])
    for rows, y in labelled_blocks(activations, index):
        apart = in_double(rows) - means[y.to(means.device)]
        within += apart.T @ apart
    apart = means - mean
    total = (within + (apart * counts.unsqueeze(-1)).T @ apart) / counts.sum()
    found = means, _shrunk(within / counts.sum(), shrinkage), mean, _shrunk(total, shrinkage)
    return tuple(part.to(rows) for part in found)


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1]; got {shrinkage}")
    d = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * covariance.trace() / d * torch.eye(d).to(covariance)


def whitener_of(covariance: Tensor) -> Tensor:
    """L⁻ᵀ (d, d) of Σ = LL', so that ‖x'L⁻ᵀ‖² is the squared distance."""
    root, failed = torch.linalg.cholesky_ex(in_double(covariance.detach()))
    if int(failed):
        raise ValueError(
            f"the covariance of shape {tuple(covariance.shape)} is not positive definite; give more activations than "
            "dimensions, or a shrinkage above 0"
        )
    eye = torch.eye(len(root)).to(root)
    inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
    return inverse.T.contiguous().to(covariance)


def least_distance(h: Tensor, means: Tensor, whitener: Tensor) -> Tensor:
    """Least squared distance (B,) of rows (B, d) to means (K, d)."""
    middle = means.mean(0)  # near to all, so that products lose few digits
    rows = (h - middle.to(h.dtype)) @ whitener.to(h.dtype)
    centres = ((means - middle) @ whitener).to(h.dtype)
    nearest = (centres.square().sum(-1) - 2 * rows @ centres.T).argmin(-1)
    # Anew, since products lose digits where means are many deviations apart.
    apart: Tensor = (h - means.to(h.dtype)[nearest]) @ whitener.to(h.dtype)
    return apart.square().sum(-1)
