"""The Fréchet distance between the normal laws of two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penult._checks import check_finite

__all__ = ["Normal", "frechet_distance"]


@dataclass(frozen=True)
class Normal:
    """Mean (d,) and a root R (r, d) of the covariance Σ = RᵀR, in float64.

    The root is that of the QR decomposition of the centred rows. Σ itself is never formed: its small eigenvalues would
    be rounded away, and a singular one, of fewer rows than dimensions, needs no care this way.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Normal:
        """Of rows (N, d), N ≥ 2, with the unbiased covariance."""
        wide = rows.double()
        mean = wide.mean(0)
        root = torch.linalg.qr((wide - mean) / (len(wide) - 1) ** 0.5, mode="r").R
        return cls(mean, root)

    def distance(self, other: Normal) -> float:
        """See `frechet_distance`."""
        # tr (Σ1 Σ2)^½ is the sum of the singular values of R1 R2ᵀ: the same as of the eigenvalues' roots of
        # Σ1^½ Σ2 Σ1^½, without the roots, which would make 1e-8 of a rounding error of 1e-16.
        shared = torch.linalg.svdvals(self.root @ other.root.T).sum()
        spread = self.root.square().sum() + other.root.square().sum() - 2 * shared
        return float((self.mean - other.mean).square().sum() + spread.clamp_min(0.0))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    r"""The Fréchet distance, squared as is the custom, between the normal laws fitted to two sets of features.

    .. math:: \lVert m_1 - m_2 \rVert^2 + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2
              - 2 (\Sigma_1 \Sigma_2)^{1/2}\bigr)

    In float64, and never negative. It is biased upwards for few rows, so that it is to be read against that of as many
    real ones.

    References:
        Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.
        Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", 2017.

    Args:
        x: Rows (N, d), N ≥ 2.
        y: Rows (M, d), M ≥ 2.

    Raises:
        ValueError: The shapes do not fit, there are fewer than two rows, or numbers are not finite.

    Example:
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(frechet_distance(x, x + 1), 6)
        4.0
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"x and y must be rows (N, d) and (M, d), N, M >= 2; got {tuple(x.shape)}, {tuple(y.shape)}")
    for name, rows in (("x", x), ("y", y)):
        check_finite(name, rows)
    return Normal.of(x).distance(Normal.of(y))
