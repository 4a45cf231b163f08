"""Gaussian base: class y is normal with mean m + Σ w_y, and all classes have the covariance Σ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from penult._checks import check_choice, check_finite, index_of
from penult.activations import Activations, _ActivationSource
from penult.bases._tilted_gaussian import CovarianceType, Shrinkage, check_shrinkage, tilted_gaussian
from penult.bases.base import Base, BaseInfo
from penult.head import Head
from penult.special import in_double

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Gaussian"]


class Gaussian(Base):
    r"""Gaussian measure N(m, Σ), whose tilts are Gaussian with the same covariance.

    .. math:: \log M(w) = w \cdot m + \tfrac12 w^\top \Sigma w, \qquad p(h|y) = N(m + \Sigma w_y,\; \Sigma) .

    The pair is the generative model of linear discriminant analysis, with the head in place of labels.

    Args:
        loc: Mean m (d,).
        covariance_matrix: Σ (d, d), symmetric and positive definite; or its diagonal (d,).

    Raises:
        ValueError: Shapes do not agree, a value is not finite, or Σ is not symmetric and positive definite.

    Example:
        >>> base = Gaussian(torch.zeros(2), torch.tensor([1.0, 4.0]))
        >>> base.log_mgf(torch.tensor([[1.0, 0.5]]))
        tensor([1.])
        >>> base.tilt(torch.tensor([1.0, 0.5])).mean
        tensor([1., 2.])
    """

    loc: Tensor
    covariance_matrix: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, covariance_matrix: Tensor) -> None:
        super().__init__()
        if loc.ndim != 1 or covariance_matrix.shape not in (loc.shape, (*loc.shape, *loc.shape)):
            raise ValueError(
                f"loc has shape {tuple(loc.shape)} and covariance_matrix {tuple(covariance_matrix.shape)}; expected "
                "(d,) and (d, d), or (d,) and (d,) for a diagonal covariance"
            )
        check_finite("loc", loc)
        check_finite("covariance_matrix", covariance_matrix)
        dtype = torch.promote_types(torch.promote_types(loc.dtype, covariance_matrix.dtype), torch.float32)
        self.register_buffer("loc", loc.detach().to(dtype))
        self.register_buffer("covariance_matrix", covariance_matrix.detach().to(dtype).contiguous())
        self.register_buffer("scale_tril", _cholesky(self.covariance_matrix), persistent=False)

    @classmethod
    def fit(
        cls,
        head: Head,
        activations: Tensor | Activations,
        covariance_type: CovarianceType = "full",
        shrinkage: Shrinkage = 0.02,
        group: ProcessGroup | None = None,
    ) -> Gaussian:
        """Fit the Gaussian by maximum likelihood to unlabelled activations, with soft labels from the head.

        The fit is in closed form, and its memory does not grow with the number of activations.

        Args:
            head: The head.
            activations: Activations (N, d), N ≥ 2, as a tensor or as `Activations`, which may be larger than memory.
            covariance_type: ``"full"``, ``"diag"`` or ``"spherical"``, as in scikit-learn.
            shrinkage: Fraction of the activations' covariance that is replaced by a multiple of the identity, or
                ``"oas"`` for the fraction of oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero 2010), which
                follows from the number of activations and their covariance.
            group: Processes of ``torch.distributed`` that share the work. Each makes the same call, reads its own part
                of ``activations``, and gets the same fit, equal to that of one process up to the rounding of sums.

        Raises:
            TypeError: ``activations`` is neither a floating tensor nor `Activations`, or an option is of a wrong type.
            ValueError: ``activations`` has too few rows or a wrong shape, is not finite or is constant; or an option is
                out of range.

        Example:
            >>> head = Head(torch.eye(3))
            >>> h = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
            >>> Gaussian.fit(head, h, covariance_type="diag").covariance_matrix.shape
            torch.Size([3])
        """
        check_choice("covariance_type", covariance_type, get_args(CovarianceType))
        shrinkage = check_shrinkage(shrinkage)
        source = _ActivationSource(activations, head, min_rows=2, group=group)
        loc, covariance = tilted_gaussian(head, source, covariance_type, shrinkage)
        base = cls(loc, covariance if covariance_type == "full" else covariance.diagonal())
        base.reference = source.digest
        return base.to(head.weight.device, torch.promote_types(head.weight.dtype, torch.float32))

    @property
    def info(self) -> BaseInfo:
        """Facts about this measure."""
        return BaseInfo(
            name="gaussian" if self.covariance_matrix.ndim == 2 else "diagonal gaussian",
            reference="Lebesgue measure",
            support="R^d",
            needs_data=True,
            exact_mgf=True,
            source="linear discriminant analysis, fitted without labels",
        )

    @property
    def in_features(self) -> int:
        """Dimension d of activations."""
        return self.loc.shape[0]

    def log_mgf(self, weight: Tensor) -> Tensor:
        """Return log M(w) = w·m + w'Σw / 2 for rows (*B, d): (*B,)."""
        self._check_features(weight, "weight")
        return weight @ self.loc.to(weight.dtype) + 0.5 * self._root(weight).square().sum(-1)

    def log_prob(self, h: Tensor) -> Tensor:
        """Return the log density of N(m, Σ) at h (*S, d): (*S,)."""
        self._check_features(h, "h")
        dtype = torch.promote_types(h.dtype, torch.float32)
        centred, scale = h.to(dtype) - self.loc.to(dtype), self.scale_tril.to(dtype)
        if scale.ndim == 1:
            z, log_det = centred / scale, scale.log().sum()
        else:
            flat = centred.reshape(-1, self.in_features)
            z = torch.linalg.solve_triangular(scale.T, flat, upper=True, left=False).reshape(centred.shape)
            log_det = scale.diagonal().log().sum()
        return -0.5 * z.square().sum(-1) - log_det - 0.5 * self.in_features * math.log(2 * math.pi)

    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample m + Σ w + L z, z standard normal, for each i of ``index`` (N,): (N, d)."""
        index = index_of(index)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scale = self.scale_tril.to(dtype)
        shape = (*index.shape, self.in_features)
        z = torch.randn(shape, dtype=dtype, device=weight.device, generator=generator)
        root = self._root(weight.to(dtype))
        if scale.ndim == 1:
            return self.loc.to(dtype) + scale * (root[index] + z)
        return self.loc.to(dtype) + (root[index] + z) @ scale.T

    def quadrature(self, nodes: int) -> tuple[Tensor, Tensor] | None:
        """Return a product rule over twelve standard deviations on either side, in dimension 3 or less."""
        d = self.in_features
        if d > 3:
            return None
        per_axis = max(2, round(nodes ** (2 / d))) if d > 1 else nodes
        step = 24 / per_axis
        line = (torch.arange(per_axis, dtype=torch.float64, device="cpu") + 0.5) * step - 12
        z = torch.cartesian_prod(*[line] * d).reshape(-1, d)
        scale = in_double(self.scale_tril).cpu()
        spread = z * scale if scale.ndim == 1 else z @ scale.T
        log_volume = (scale if scale.ndim == 1 else scale.diagonal()).log().sum() + d * math.log(step)
        points = (in_double(self.loc).cpu() + spread).to(self.loc)
        return points, log_volume.to(self.loc).expand(len(points))

    def extra_repr(self) -> str:
        """Return the shapes, for ``print``."""
        return f"loc={tuple(self.loc.shape)}, covariance_matrix={tuple(self.covariance_matrix.shape)}"

    def _apply(self, fn: Any, recurse: bool = True) -> Gaussian:
        super()._apply(fn, recurse)
        # A base that is read from a file computes the factor from the covariance, so that it is the same to the bit.
        self.scale_tril = _cholesky(self.covariance_matrix)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.scale_tril = _cholesky(self.covariance_matrix)

    def _root(self, weight: Tensor) -> Tensor:
        """Return L'w for rows (*B, d), whose squared norm is w'Σw."""
        scale = self.scale_tril.to(weight.dtype)
        return weight * scale if scale.ndim == 1 else weight @ scale


def _cholesky(covariance: Tensor) -> Tensor:
    """Return L (d, d) with L L' = Σ, or the standard deviations (d,) of a diagonal Σ."""
    if covariance.ndim == 1:
        if not bool((covariance > 0).all()):
            raise ValueError(
                f"the smallest entry of the diagonal covariance_matrix is {float(covariance.min())}; expected positive "
                "entries"
            )
        return covariance.sqrt()
    asymmetry = float((covariance - covariance.T).abs().max())
    if asymmetry > 1e-4 * float(covariance.abs().max()):
        raise ValueError(
            f"covariance_matrix differs from its transpose by {asymmetry:.2g}; expected a symmetric matrix"
        )
    scale, failed = torch.linalg.cholesky_ex(in_double(covariance))
    if int(failed):
        raise ValueError(
            f"covariance_matrix of shape {tuple(covariance.shape)} is not positive definite. Fit with a larger "
            "shrinkage, or with more activations"
        )
    root: Tensor = scale.to(covariance)
    return root
