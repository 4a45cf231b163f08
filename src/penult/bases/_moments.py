"""Label-free Gaussian maximum likelihood of a tilted pair: the centre and shape that classes share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from penult.head import Head

__all__ = ["tilted_gaussian"]

_ROWS = 1 << 14  # activations looked at at a time
_LOGITS = 1 << 24  # and logits


def tilted_gaussian(
    head: Head,
    posterior: Tensor,
    activations: Tensor,
    covariance_type: Literal["full", "spherical"],
    shrinkage: float,
    subspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Soft-label maximum likelihood of p(h|y) = N(m + Σ w_y, Σ), in closed form.

    With T the covariance of the activations and C = Σ_y p_y (w_y − w̄)(w_y − w̄)', the maximum satisfies
    T = Σ + Σ C Σ, hence Σ = T^{1/2} X T^{1/2} where X has the eigenvectors of T^{1/2} C T^{1/2} and, for its
    eigenvalues e, the eigenvalues 2 / (1 + √(1 + 4e)); m = h̄ − Σ w̄.

    Args:
        head: The head with the rows w_y.
        posterior: Mean class probabilities p (K,) over the activations.
        activations: Activations (N, d), unlabelled.
        covariance_type: ``"full"``, or ``"spherical"`` for Σ = σ² I.
        shrinkage: Share of T that is replaced by a multiple of the identity with the same trace.
        subspace: Orthonormal rows (q, d) on which rows and activations are read, or None for all of R^d.

    Returns:
        m (q,) and Σ (q, q), float64.

    Raises:
        ValueError: If all activations are equal.
    """
    w_mean, spread_w = _row_moments(head, posterior, subspace)
    work = activations.to(w_mean.device)
    n, d = len(work), len(w_mean)
    mean = torch.zeros_like(w_mean)
    for block in work.split(_ROWS):
        mean += _read(block, subspace).sum(0)
    mean /= n
    spread = torch.zeros_like(spread_w)
    for block in work.split(_ROWS):
        centred = _read(block, subspace) - mean
        spread += centred.T @ centred
    spread /= n
    scale = spread.diagonal().mean()
    if not float(scale) > 0:
        raise ValueError(f"all {n} activations are equal, so no base can be fitted; pass more, varied activations")
    if covariance_type == "spherical":
        e = scale * spread_w.trace() / d
        covariance = torch.eye(d).to(spread) * (scale * 2 / (1 + (1 + 4 * e).sqrt()))
    else:
        eye = torch.eye(d).to(spread)
        values, vectors = torch.linalg.eigh((1 - shrinkage) * spread + shrinkage * scale * eye)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        e, directions = torch.linalg.eigh(root @ spread_w @ root)
        inner = root @ directions
        covariance = inner * (2 / (1 + (1 + 4 * e.clamp_min(0)).sqrt())) @ inner.T
    return mean - covariance @ w_mean, covariance


def mean_posterior(head: Head, activations: Tensor) -> Tensor:
    """Mean class probabilities (K,) of a head over activations (N, d), float64."""
    total = torch.zeros(head.num_classes, dtype=torch.float64, device=head.weight.device)
    for block in activations.split(max(1, min(_ROWS, _LOGITS // head.num_classes))):
        total += head(block.to(head.weight)).double().softmax(-1).sum(0)
    return total / len(activations)


def _row_moments(head: Head, posterior: Tensor, subspace: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean w̄ and covariance C of the centered rows under class probabilities, without a second W."""
    p, total, square = posterior.double(), None, None
    for part, block in head.centered_blocks():
        rows = _read(block, subspace)
        weighted = p[part].unsqueeze(-1) * rows
        total = weighted.sum(0) if total is None else total + weighted.sum(0)
        square = weighted.T @ rows if square is None else square + weighted.T @ rows
    assert total is not None
    assert square is not None
    return total, square - torch.outer(total, total)


def _read(x: Tensor, subspace: Tensor | None) -> Tensor:
    return x.double() if subspace is None else x.double() @ subspace.T
