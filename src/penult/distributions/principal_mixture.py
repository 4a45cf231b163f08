"""A Gaussian mixture in the principal components of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from penult._checks import as_size, check_floating
from penult.distributions._mixture_fit import by_maximisation, by_posterior
from penult.distributions._positive import positive_moments, rectified_moments, square, unsquare
from penult.special import _validates_by_default, in_full, traced, working_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PrincipalMixture", "check_parameters", "check_values"]

# --- Checks of the parameters -------------------------------------------------------------------------------

_SHAPES = {
    "loc": "(d,)",
    "components": "(m, d)",
    "logits": "(C,)",
    "means": "(C, m)",
    "scale_tril": "(C, m, m)",
    "residual_scale": "()",
    "softness": "(d,)",
}


def check_parameters(parameters: dict[str, Tensor]) -> None:
    """Raise a TypeError unless all are floating tensors of one dtype, a ValueError unless their shapes agree."""
    for name, value in parameters.items():
        check_floating(name, value, _SHAPES[name])
    if len({value.dtype for value in parameters.values()}) > 1:
        dtypes = ", ".join(f"{name} {value.dtype}" for name, value in parameters.items())
        raise TypeError(f"the dtypes of the parameters are {dtypes}; expected one dtype")
    m, d = parameters["components"].shape if parameters["components"].dim() == 2 else (0, 0)
    c = len(parameters["logits"]) if parameters["logits"].dim() == 1 else 0
    expected = {
        "loc": (d,),
        "components": (m, d),
        "logits": (c,),
        "means": (c, m),
        "scale_tril": (c, m, m),
        "residual_scale": (),
        "softness": (d,),
    }
    if not 1 <= m <= d or c < 1 or any(tuple(value.shape) != expected[name] for name, value in parameters.items()):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in parameters.items())
        raise ValueError(
            f"the shapes do not agree: {shapes}; expected loc (d,), components (m, d), logits (C,), means (C, m), "
            "scale_tril (C, m, m), residual_scale () and softness (d,) with 1 <= m <= d and C >= 1"
        )


def check_values(parameters: dict[str, Tensor]) -> None:
    """Raise unless parameters are finite, a weight and all softnesses are positive, and components orthonormal.

    The constraints of torch.distributions check the other properties.
    """
    for name, value in parameters.items():
        if not bool((value.isfinite() | (value.isneginf() if name == "logits" else False)).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    if not bool((parameters["logits"] > -math.inf).any()):
        raise ValueError("logits are all -inf; expected a finite one for at least one component")
    if "softness" in parameters and not bool((parameters["softness"] > 0).all()):
        smallest = float(parameters["softness"].min())
        raise ValueError(f"softness has the value {smallest:.4g}; expected positive values, or None")
    plane = parameters["components"].detach().to(working_dtype(parameters["components"].device))
    error = float((plane @ plane.mT - torch.eye(len(plane), dtype=plane.dtype, device=plane.device)).abs().max())
    tolerance = max(1e-6, 20 * torch.finfo(parameters["components"].dtype).eps)
    if error > tolerance:
        raise ValueError(
            f"the products of the rows of components differ from the identity by {error:.4g}; expected orthonormal "
            "rows. torch.linalg.qr(components.mT).Q.mT spans the same plane"
        )


# --- The distribution ---------------------------------------------------------------------------------------

# Number of elements that log_prob processes at a time.
_ELEMENTS = 1 << 21


class PrincipalMixture(Distribution):
    r"""Gaussian mixture in m principal components plus isotropic noise in the other directions.

    Optionally rectified or positive.

    .. math:: x = \mu + V^\top u + s\,(I - V^\top V)\,\varepsilon,\qquad
              u \sim \sum_c \pi_c\, N(m_c, L_c L_c^\top),\quad \varepsilon \sim N(0, I_d),

    and h = x; or :math:`h = \max(x, 0)` if ``rectified``, with exact zeros; or, with a ``softness`` b,

    .. math:: h = \tfrac14 \bigl(x + \sqrt{x^2 + 4b}\bigr)^2 > 0, \qquad x = \sqrt h - b / \sqrt h ,

    for rows that are positive, as after ReLU and average pooling: nearly a square root, which removes most of their
    skewness, and smooth down to zero. It needs far fewer numbers than a bank of activations: 38 500 for 16 components
    in 64 dimensions. With m = d there is no residual, and ``residual_scale`` is ignored.

    A density exists unless the distribution is rectified (it then has atoms at zero) or s = 0 with m < d (it then lies
    in a plane): see :attr:`has_density`.

    References:
        Tipping and Bishop, "Mixtures of Probabilistic Principal Component Analysers", 1999; here all components share
        one plane.

    Args:
        loc: Centre μ (d,).
        components: Orthonormal rows V (m, d), m ≤ d.
        logits: Log weights of the mixture (C,), up to a constant; −∞ removes a component.
        means: Means m_c in the plane (C, m), relative to ``loc``.
        scale_tril: Lower Cholesky factors L_c of the covariances in the plane (C, m, m).
        residual_scale: Standard deviation s ≥ 0 across the plane, ().
        rectified: Whether negative coordinates are set to zero.
        softness: b > 0 (d,) for a positive distribution, or None.
        validate_args: Whether to check values, as in torch.distributions.

    Raises:
        ValueError: Shapes do not agree, rows of ``components`` are not orthonormal, a factor is not lower triangular
            with a positive diagonal, ``residual_scale`` is negative, ``softness`` is not positive or is given for a
            rectified distribution, or a value is not finite.
        TypeError: A parameter is not a floating tensor, or the dtypes differ.

    Example:
        >>> p = PrincipalMixture(
        ...     torch.zeros(3), torch.eye(2, 3), torch.zeros(2), 4 * torch.eye(2), torch.eye(2).repeat(2, 1, 1),
        ...     torch.tensor(0.5),
        ... )
        >>> p
        PrincipalMixture(2 components in 2 of 3 dimensions, 22 floats)
        >>> p.mean, p.variance
        (tensor([2., 2., 0.]), tensor([5.0000, 5.0000, 0.2500]))
        >>> p.sample((4,), generator=torch.Generator().manual_seed(0)).shape, p.log_prob(torch.zeros(5, 3)).shape
        (torch.Size([4, 3]), torch.Size([5]))
    """

    # softness is not listed, because it may be None.
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real_vector,
        "components": constraints.independent(constraints.real, 2),
        "logits": constraints.independent(constraints.less_than(math.inf), 1),
        "means": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.independent(constraints.lower_cholesky, 1),
        "residual_scale": constraints.nonnegative,
    }
    has_rsample = False

    def __init__(
        self,
        loc: Tensor,
        components: Tensor,
        logits: Tensor,
        means: Tensor,
        scale_tril: Tensor,
        residual_scale: Tensor,
        rectified: bool = False,
        softness: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        parameters = {
            "loc": loc,
            "components": components,
            "logits": logits,
            "means": means,
            "scale_tril": scale_tril,
            "residual_scale": residual_scale,
        }
        if softness is not None:
            parameters["softness"] = softness
        check_parameters(parameters)
        validate = _validates_by_default() if validate_args is None else validate_args
        if validate:
            check_values(parameters)
        self.loc = loc
        self.components = components
        self.logits = logits
        self.means = means
        self.scale_tril = scale_tril
        self.residual_scale = residual_scale
        self.rectified = bool(rectified)
        self.softness = softness
        if self.rectified and softness is not None:
            raise ValueError("rectified is True and softness is given; expected at most one")
        super().__init__(Size(), loc.shape, validate_args=validate)

    @classmethod
    def fit(
        cls,
        activations: Tensor | Iterable[Tensor],
        components: int = 100,
        dims: int = 24,
        rectified: bool = False,
        positive: bool = False,
        seed: int = 0,
        iterations: int = 100,
        tolerance: float = 1e-3,
        group: ProcessGroup | None = None,
    ) -> PrincipalMixture:
        """Fit to activations, without labels, by expectation maximisation in their principal components.

        All steps are sums over batches, in float64, so that the activations need not fit in memory: two passes for the
        principal components, then one for each update, unless the projections are small enough to keep. The start is
        k-means on at most 16 384 rows. The covariances have an inverse-Wishart prior with the weight of m/2 rows; its
        covariance is the pooled covariance within the clusters of the start. There is at most one component for 20
        rows. Both numbers were chosen by the likelihood of held-out MNIST activations. Components that end with less
        than half a row are removed.

        Args:
            activations: Rows (N, d), or an iterable of rows (n, d) that can be iterated more than once. For a rectified
                distribution these are the rows *before* the rectification, the pre-activations.
            components: Number of components C, at most.
            dims: Number of principal components m, at most; fewer if d or the rank of the rows is smaller. If the rows
                lie in a plane of at most this dimension, the residual scale is 0, and there is no density unless m = d.
            rectified: Whether the distribution is rectified; the fit is the same.
            positive: Whether the distribution is positive, with a softness of a hundredth of each coordinate's mean.
                Rows must not be negative, and values below a thousandth of the mean are raised to it.
            seed: Seed of the start. The global random state is not changed.
            iterations: Number of updates, at most.
            tolerance: Gain of the mean log likelihood, per row and with the prior, below which the updates end.
            group: Processes of ``torch.distributed`` that share the work. Each gives its own rows, as a tensor or in at
                least one, possibly empty, batch; all get the same distribution.

        Returns:
            A distribution of the dtype of the rows, at least float32, on their device.

        Raises:
            TypeError: ``activations`` gives no floating tensors or can be iterated only once, or a number has a wrong
                type.
            ValueError: A shape is wrong, rows hold NaN or infinity, all rows are equal, there are fewer than two,
                passes differ in their number of rows, or a number is out of range.

        Example:
            >>> rows = torch.cat([torch.randn(500, 8), torch.randn(500, 8) + 6.0])
            >>> p = PrincipalMixture.fit(rows, components=2, dims=3)
            >>> p, bool((p.mean - rows.mean(0)).abs().max() < 1e-4)
            (PrincipalMixture(2 components in 3 of 8 dimensions, 53 floats), True)
        """
        fitted = by_maximisation(activations, components, dims, rectified, positive, seed, iterations, tolerance, group)
        return cls(**fitted._asdict(), rectified=rectified)

    @classmethod
    def from_posterior(
        cls,
        activations: Tensor | Iterable[Tensor],
        posterior: Callable[[Tensor], Tensor],
        dims: int = 24,
        rectified: bool = False,
        positive: bool = False,
        group: ProcessGroup | None = None,
    ) -> PrincipalMixture:
        """Fit one component for each class, in closed form, from class probabilities instead of labels.

        Weight, mean and covariance of a component are those of the rows, weighted by the probability of its class.
        The covariances have the prior of :meth:`fit`, with the pooled covariance within classes, so that the covariance
        of a class of few rows is not singular. Classes that hold less than 1e-6 of a row are removed.

        Args:
            activations: Rows (N, d) or batches of them, as for :meth:`fit`; they are read in three passes.
            posterior: Function that returns class probabilities (n, C) of rows (n, d), such as
                ``lambda h: head(h).softmax(-1)``. For a rectified distribution the rows are the pre-activations.
            dims: Number of principal components m, at most.
            rectified: Whether the distribution is rectified.
            positive: Whether the distribution is positive, as for :meth:`fit`; ``posterior`` gets the rows h.
            group: Processes of ``torch.distributed`` that share the work, as for :meth:`fit`.

        Returns:
            A distribution of the dtype of the rows, at least float32, on their device.

        Raises:
            TypeError: As for :meth:`fit`.
            ValueError: As for :meth:`fit`, or the probabilities have a wrong shape.

        Example:
            >>> rows = torch.cat([torch.randn(500, 8), torch.randn(500, 8) + 6.0])
            >>> p = PrincipalMixture.from_posterior(rows, lambda h: torch.eye(2)[(h.mean(-1) > 3).long()], dims=3)
            >>> p, p.logits.exp()
            (PrincipalMixture(2 components in 3 of 8 dimensions, 53 floats), tensor([0.5000, 0.5000]))
        """
        fitted = by_posterior(activations, posterior, dims, rectified, positive, group)
        return cls(**fitted._asdict(), rectified=rectified)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrincipalMixture:
        """Return the same distribution with a batch shape; the parameters are shared and keep their shapes."""
        new: PrincipalMixture = self._get_checked_instance(PrincipalMixture, _instance)
        batch = as_size(batch_shape)
        # Raises the same errors as the distributions of torch.
        torch.empty(self.batch_shape, device="meta").expand(batch)
        for name in (*self.arg_constraints, "rectified", "softness"):
            setattr(new, name, getattr(self, name))
        super(PrincipalMixture, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Real vectors; the nonnegative orthant if rectified, the positive orthant with a softness."""
        if self.softness is not None:
            return constraints.independent(constraints.positive, 1)
        if self.rectified:
            return constraints.independent(constraints.nonnegative, 1)
        return constraints.real_vector

    @property
    def has_density(self) -> bool:
        """Whether there is a density with respect to Lebesgue measure, so that :meth:`log_prob` works."""
        return not self.rectified and (self._full or bool(self.residual_scale > 0))

    @property
    def num_parameters(self) -> int:
        """Number of free floats; of a triangular matrix only the triangle counts. 38 481 for C = 16, m = d = 64."""
        (m, d), c = self.components.shape, len(self.logits)
        return d + m * d + c * (1 + m + m * (m + 1) // 2) + 1 + (0 if self.softness is None else d)

    @property
    def mean(self) -> Tensor:
        """E[h], shape (*B, d); in closed form, or by the trapezoidal rule for a positive distribution."""
        weight, centre, _ = self._moments()
        return self._expanded(weight @ centre)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, shape (*B, d): the variance within components plus that of their means."""
        weight, centre, variance = self._moments()
        return self._expanded(weight @ (variance + (centre - weight @ centre).square()))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at (*S, *B, d), shape (*S, *B), computed in at least float32.

        For a positive distribution it is −∞ where a coordinate is not positive.

        Raises:
            ValueError: There is no density (see :attr:`has_density`), or values have a wrong shape or are not finite.
        """
        if self.rectified or (not traced(value) and not self.has_density):
            why = (
                "a rectified distribution has atoms at zero; the density of the pre-activations is that of the same "
                "parameters with rectified=False"
                if self.rectified
                else "residual_scale is 0, so all samples lie in a plane, as the rows that it was fitted to "
                "(units that are always 0, or fewer rows than dimensions); set a positive residual_scale"
            )
            raise ValueError(f"this PrincipalMixture has no density, so log_prob is not defined: {why}")
        if self._validate_args and not traced(value):
            self._validate_sample(value)
        dtype = torch.promote_types(torch.promote_types(value.dtype, self.loc.dtype), torch.float32)
        loc, plane, means, tril = (part.to(dtype) for part in (self.loc, self.components, self.means, self.scale_tril))
        m, d = plane.shape
        eye = torch.eye(m, dtype=dtype, device=loc.device)
        whiten = torch.linalg.solve_triangular(tril, eye, upper=False)
        constant = (
            self.logits.to(dtype).log_softmax(-1)
            - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            - 0.5 * d * math.log(2 * math.pi)
        )
        if not self._full:
            constant = constant - (d - m) * self.residual_scale.to(dtype).log()
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        parts = []
        for rows in value.to(dtype).expand(shape).reshape(-1, d).split(max(1, _ELEMENTS // (len(means) * m + d))):
            x, slope = (rows, None) if self.softness is None else unsquare(rows, self.softness.to(dtype))
            with in_full(loc.device):
                deviation = x - loc
                u = deviation @ plane.mT
                z = (u - means.unsqueeze(-2)) @ whiten.mT  # (C, n, m)
                part = (constant - 0.5 * z.square().sum(-1).mT).logsumexp(-1)
                if not self._full:
                    residual = (deviation - u @ plane) / self.residual_scale.to(dtype)
                    part = part - 0.5 * residual.square().sum(-1)
            parts.append(part if slope is None else part + slope)
        return torch.cat(parts).reshape(shape[:-1]).to(torch.promote_types(value.dtype, self.loc.dtype))

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Sample activations of shape (*sample_shape, *B, d), with ``generator`` or torch's default generator."""
        shape = self._extended_shape(as_size(sample_shape))
        with torch.no_grad(), in_full(self.loc.device):
            return self._sample_rows(shape[:-1].numel(), generator).to(self.loc.dtype).reshape(shape)

    def _sample_rows(self, count: int, generator: torch.Generator | None) -> Tensor:
        dtype, device = torch.promote_types(self.loc.dtype, torch.float32), self.loc.device
        loc, plane, means, tril = (part.to(dtype) for part in (self.loc, self.components, self.means, self.scale_tril))
        m, d = plane.shape
        if count == 0:
            return loc.new_empty(0, d)
        weight = self.logits.to(dtype).softmax(-1)
        component = torch.multinomial(weight, count, replacement=True, generator=generator)
        order = component.argsort(stable=True)
        z = torch.randn(count, m, dtype=dtype, device=device, generator=generator)
        u = torch.empty_like(z)
        counts = component.bincount(minlength=len(weight)).tolist()
        # One product for each component, since indexing the factors would copy one for each sample.
        for c, (normals, row_index) in enumerate(zip(z.split(counts), order.split(counts), strict=True)):
            if len(row_index):
                u[row_index] = torch.addmm(means[c], normals, tril[c].mT)
        if self._full or not bool(self.residual_scale > 0):
            x = torch.addmm(loc, u, plane)
        else:
            x = torch.randn(count, d, dtype=dtype, device=device, generator=generator)
            x.mul_(self.residual_scale.to(dtype))
            u.addmm_(x, plane.mT, alpha=-1)
            x.addmm_(u, plane).add_(loc)
        if self.softness is not None:
            return square(x, self.softness.to(dtype))
        return x.clamp_(min=0) if self.rectified else x

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights (C,), and the mean and variance of each coordinate of h in each component (C, d)."""
        weight, centre, variance = self._moments_of_x()
        if self.rectified:
            return weight, *rectified_moments(centre, variance)
        if self.softness is None:
            return weight, centre, variance
        return weight, *positive_moments(centre, variance, self.softness)

    def _moments_of_x(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights (C,), and the mean and variance of each coordinate of x in each component (C, d)."""
        dtype = working_dtype(self.loc.device)
        plane = self.components.to(dtype)
        centre = self.loc.to(dtype) + self.means.to(dtype) @ plane
        variance = torch.stack([(factor.mT @ plane).square().sum(0) for factor in self.scale_tril.to(dtype)])
        if not self._full:
            variance = variance + self.residual_scale.to(dtype).square() * (1 - plane.square().sum(0)).clamp_min(0)
        return self.logits.to(dtype).softmax(-1), centre, variance

    def _expanded(self, moment: Tensor) -> Tensor:
        return moment.to(self.loc.dtype).expand(self.batch_shape + self.event_shape)

    @property
    def _full(self) -> bool:
        return self.components.shape[0] == self.components.shape[1]

    def __repr__(self) -> str:
        (m, d), c = self.components.shape, len(self.logits)
        batch = f", batch {tuple(self.batch_shape)}" if self.batch_shape else ""
        size = f"{self.num_parameters:,}".replace(",", " ")
        return (
            f"PrincipalMixture({c} component{'s' * (c != 1)} in {m} of {d} dimensions, {size} floats"
            f"{', rectified' * self.rectified}{', positive' * (self.softness is not None)}{batch})"
        )
