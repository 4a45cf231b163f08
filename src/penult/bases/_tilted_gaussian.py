"""Shrinkage of covariances, and the maximum likelihood fit, without labels, of the centre and covariance of a pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from penult._checks import check_between
from penult.activations import _ActivationSource
from penult.head import Head
from penult.special import in_double

__all__ = ["CovarianceType", "Shrinkage", "check_shrinkage", "shrunk", "tilted_gaussian"]

CovarianceType = Literal["full", "diag", "spherical"]
Shrinkage = float | Literal["oas"]


def tilted_gaussian(
    head: Head,
    source: _ActivationSource,
    covariance_type: CovarianceType,
    shrinkage: Shrinkage,
    subspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Fit p(h|y) = N(m + Σ w_y, Σ) by maximum likelihood with soft labels, in closed form.

    With p the mean class probabilities, T the covariance of the activations and C = Σ_y p_y (w_y − w̄)(w_y − w̄)',
    the maximum satisfies T = Σ + Σ C Σ, hence Σ = T^{1/2} X T^{1/2} where X has the eigenvectors of T^{1/2} C T^{1/2}
    and, for its eigenvalues e, the eigenvalues 2 / (1 + √(1 + 4e)); m = h̄ − Σ w̄. The diagonal case is the same for
    each entry, and the spherical case is the same for the means of the diagonals.

    Args:
        head: The head with the rows w_y.
        source: Activations (N, d), unlabelled.
        covariance_type: ``"full"``; ``"diag"`` for a diagonal Σ; ``"spherical"`` for Σ = σ² I.
        shrinkage: Fraction of T that is replaced by a multiple of the identity with the same trace, or ``"oas"``.
        subspace: Orthonormal rows (q, d) that rows and activations are projected to, or None for all of R^d.

    Returns:
        m (q,) and Σ (q, q), float64.

    Raises:
        ValueError: All activations are equal.
    """
    w_mean, spread_w = _row_moments(head, source.mean_posterior(), subspace)
    mean = _read(source.mean(), subspace)
    spread = torch.zeros_like(spread_w)
    for rows in source:
        centred = _read(rows, subspace) - mean
        spread += centred.T @ centred
    spread = source.processes.sum(spread) / len(source)
    scale = spread.diagonal().mean()
    if not float(scale) > 0:
        raise ValueError(
            f"all {len(source)} activations are equal, so that no base can be fitted; pass different activations"
        )
    d = len(w_mean)
    if covariance_type == "spherical":
        e = scale * spread_w.trace() / d
        covariance = torch.eye(d, device="cpu").to(spread) * (scale * 2 / (1 + (1 + 4 * e).sqrt()))
    elif covariance_type == "diag":
        variance = shrunk(spread, shrinkage, len(source)).diagonal()
        covariance = torch.diag(variance * 2 / (1 + (1 + 4 * variance * spread_w.diagonal()).sqrt()))
    else:
        values, vectors = torch.linalg.eigh(shrunk(spread, shrinkage, len(source)))
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        e, directions = torch.linalg.eigh(root @ spread_w @ root)
        inner = root @ directions
        covariance = inner * (2 / (1 + (1 + 4 * e.clamp_min(0)).sqrt())) @ inner.T
    return mean - covariance @ w_mean, covariance


def _row_moments(head: Head, posterior: Tensor, subspace: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean w̄ and covariance C of the centered rows under class probabilities; W is not copied."""
    p, total, square = in_double(posterior), None, None
    for part, block in head.centered_blocks():
        rows = _read(block, subspace)
        weighted = p[part].unsqueeze(-1) * rows
        total = weighted.sum(0) if total is None else total + weighted.sum(0)
        square = weighted.T @ rows if square is None else square + weighted.T @ rows
    assert total is not None
    assert square is not None
    return total, square - torch.outer(total, total)


def _read(x: Tensor, subspace: Tensor | None) -> Tensor:
    return in_double(x) if subspace is None else in_double(x) @ subspace.T


# --- shrinkage ----------------------------------------------------------------------------------------------


def check_shrinkage(shrinkage: Shrinkage) -> Shrinkage:
    """Return a shrinkage; raise unless it is a number from 0 to 1 or ``"oas"``."""
    if isinstance(shrinkage, str):
        if shrinkage != "oas":
            raise ValueError(f"shrinkage is {shrinkage!r}; expected a number from 0 to 1, or 'oas'")
        return "oas"
    return check_between("shrinkage", shrinkage, inclusive=True)


def shrunk(covariance: Tensor, shrinkage: Shrinkage, count: int) -> Tensor:
    r"""Return a covariance S (d, d) whose fraction ρ is replaced by a multiple of the identity with the same trace.

    .. math:: (1 - \rho)\, S + \rho\, \frac{\operatorname{tr} S}{d} I

    With ``"oas"`` ρ is that of oracle approximating shrinkage, which comes close to the smallest expected error for
    normal rows. As in scikit-learn, terms of order 1/d of the paper are left out:

    .. math:: \rho = \min\left(1,\ \frac{\operatorname{tr}(S^2) + \operatorname{tr}^2(S)}
              {(n + 1)\, (\operatorname{tr}(S^2) - \operatorname{tr}^2(S) / d)}\right).

    References:
        Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal
        Processing 2010, equation 23.

    Args:
        covariance: S, symmetric.
        shrinkage: ρ in [0, 1], or ``"oas"``.
        count: n, the number of independent rows that S is the mean square of.
    """
    d, trace = len(covariance), covariance.trace()
    if isinstance(shrinkage, str):
        squares = covariance.square().sum()
        # The excess is zero for a multiple of the identity, which is what any fraction of it shrinks to.
        excess = (count + 1) * (squares - trace.square() / d)
        numerator = squares + trace.square()
        shrinkage = float(numerator / excess) if float(excess) > float(numerator) else 1.0
    return (1 - shrinkage) * covariance + shrinkage * trace / d * torch.eye(d, device="cpu").to(covariance)
