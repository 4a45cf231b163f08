"""Label-free Gaussian maximum likelihood of a tilted pair: the centre and shape that classes share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from penult.head import Head

__all__ = ["tilted_gaussian"]

_ROWS = 1 << 14


def tilted_gaussian(
    weight: Tensor,
    posterior: Tensor,
    activations: Tensor,
    covariance_type: Literal["full", "spherical"],
    shrinkage: float,
) -> tuple[Tensor, Tensor]:
    r"""Soft-label maximum likelihood of p(h|y) = N(m + Σ w_y, Σ), in closed form.

    With T the covariance of the activations and C = Σ_y p_y (w_y − w̄)(w_y − w̄)', the maximum satisfies
    T = Σ + Σ C Σ, hence Σ = T^{1/2} X T^{1/2} where X has the eigenvectors of T^{1/2} C T^{1/2} and, for its
    eigenvalues e, the eigenvalues 2 / (1 + √(1 + 4e)); m = h̄ − Σ w̄.

    Args:
        weight: Rows w_y (K, d), float64.
        posterior: Mean class probabilities p (K,) over the activations.
        activations: Activations (N, d), unlabelled.
        covariance_type: ``"full"``, or ``"spherical"`` for Σ = σ² I.
        shrinkage: Share of T that is replaced by a multiple of the identity with the same trace.

    Returns:
        m (d,) and Σ (d, d), float64.
    """
    n, d = activations.shape
    mean = torch.zeros(d, dtype=torch.float64, device=weight.device)
    for block in activations.split(_ROWS):
        mean += block.to(mean).sum(0)
    mean /= n
    spread = torch.zeros(d, d, dtype=torch.float64, device=weight.device)
    for block in activations.split(_ROWS):
        centred = block.to(mean) - mean
        spread += centred.T @ centred
    spread /= n
    scale = spread.diagonal().mean()
    if not float(scale) > 0:
        raise ValueError(f"all {n} activations are equal, so no base can be fitted; pass more, varied activations")
    w_mean = posterior @ weight
    root_c = posterior.sqrt().unsqueeze(-1) * (weight - w_mean)
    if covariance_type == "spherical":
        e = scale * root_c.square().sum() / d
        covariance = torch.eye(d).to(spread) * (scale * 2 / (1 + (1 + 4 * e).sqrt()))
    else:
        eye = torch.eye(d).to(spread)
        values, vectors = torch.linalg.eigh((1 - shrinkage) * spread + shrinkage * scale * eye)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        pull = root_c @ root
        e, directions = torch.linalg.eigh(pull.T @ pull)
        inner = root @ directions
        covariance = inner * (2 / (1 + (1 + 4 * e.clamp_min(0)).sqrt())) @ inner.T
    return mean - covariance @ w_mean, covariance


def mean_posterior(head: Head, activations: Tensor) -> Tensor:
    """Mean class probabilities (K,) of a head over activations (N, d), float64."""
    total = torch.zeros(head.num_classes, dtype=torch.float64, device=head.weight.device)
    for block in activations.split(_ROWS):
        total += head(block.to(head.weight)).double().softmax(-1).sum(0)
    return total / activations.shape[0]
