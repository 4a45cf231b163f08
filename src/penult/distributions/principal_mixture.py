"""A Gaussian mixture in the principal components of activations, as a citizen of torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from penult.distributions._mixture_fit import by_maximisation, by_posterior
from penult.distributions._positive import positive_moments, rectified_moments, square, unsquare
from penult.special import in_full, traced, working_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PrincipalMixture", "check_parameters", "check_values"]

# --- What the parameters of a principal mixture have to be, and what is said of others ----------------------


def check_parameters(given: dict[str, Tensor]) -> None:
    """Raise unless all are floating tensors of one dtype, by a TypeError, and their shapes agree, by a ValueError."""
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating tensor, got {kind}; use torch.tensor(..., dtype=...)")
    if len({value.dtype for value in given.values()}) > 1:
        kinds = ", ".join(f"{name} {value.dtype}" for name, value in given.items())
        raise TypeError(f"the parameters must have one dtype, got {kinds}")
    m, d = given["components"].shape if given["components"].dim() == 2 else (0, 0)
    c = len(given["logits"]) if given["logits"].dim() == 1 else 0
    expected = {
        "loc": (d,),
        "components": (m, d),
        "logits": (c,),
        "means": (c, m),
        "scale_tril": (c, m, m),
        "residual_scale": (),
        "softness": (d,),
    }
    if not 1 <= m <= d or c < 1 or any(tuple(value.shape) != expected[name] for name, value in given.items()):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise ValueError(
            f"the shapes do not agree: {shapes}; expected loc (d,), components (m, d), logits (C,), means (C, m), "
            "scale_tril (C, m, m), residual_scale () and softness (d,) with 1 <= m <= d and C >= 1"
        )


def check_values(given: dict[str, Tensor]) -> None:
    """Raise unless they are finite, some component has a weight, the softness is positive and the plane orthonormal.

    The rest is said by the constraints of torch.distributions.
    """
    for name, value in given.items():
        if not bool((value.isfinite() | (value.isneginf() if name == "logits" else False)).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    if not bool((given["logits"] > -math.inf).any()):
        raise ValueError("logits leave every component out: all are -inf")
    if "softness" in given and not bool((given["softness"] > 0).all()):
        raise ValueError(f"softness must be positive, or None; its least is {float(given['softness'].min()):.4g}")
    plane = given["components"].detach().to(working_dtype(given["components"].device))
    error = float((plane @ plane.mT - torch.eye(len(plane), dtype=plane.dtype, device=plane.device)).abs().max())
    tolerance = max(1e-6, 20 * torch.finfo(given["components"].dtype).eps)
    if error > tolerance:
        raise ValueError(
            f"components must have orthonormal rows; their products differ from the identity by {error:.4g}: "
            "torch.linalg.qr(components.mT).Q.mT spans the same plane"
        )


_ELEMENTS = 1 << 21  # handled at a time by log_prob


class PrincipalMixture(Distribution):
    r"""Gaussian mixture in m principal components plus isotropic noise across them; optionally rectified or positive.

    .. math:: x = \mu + V^\top u + s\,(I - V^\top V)\,\varepsilon,\qquad
              u \sim \sum_c \pi_c\, N(m_c, L_c L_c^\top),\quad \varepsilon \sim N(0, I_d),

    and h = x; or :math:`h = \max(x, 0)` when ``rectified``, with exact zeros; or, with a ``softness`` b,

    .. math:: h = \tfrac14 \bigl(x + \sqrt{x^2 + 4b}\bigr)^2 > 0, \qquad x = \sqrt h - b / \sqrt h ,

    for rows that are positive, as after ReLU and average pooling: nearly a square root, which takes most of their
    skewness, and smooth down to zero. It stands for a bank of activations with far fewer numbers: 38 500 for 16
    components in 64 dimensions. With m = d nothing is left across, and ``residual_scale`` is ignored.

    A density exists unless the law is rectified (which puts atoms on zero) or s = 0 with m < d (which keeps it to
    a plane): see :attr:`has_density`.

    References:
        Tipping and Bishop, "Mixtures of Probabilistic Principal Component Analysers", 1999, of which this is the
        case of one plane shared by all components.

    Args:
        loc: The centre μ (d,).
        components: Orthonormal rows V (m, d), m ≤ d.
        logits: Log weights of the mixture (C,), up to a constant; −∞ leaves a component out.
        means: Means m_c in the plane (C, m), relative to ``loc``.
        scale_tril: Lower Cholesky factors L_c of the covariances in the plane (C, m, m).
        residual_scale: Standard deviation s ≥ 0 across the plane, ().
        rectified: Whether negative coordinates are set to zero.
        softness: b > 0 (d,), for a positive law; None for none.
        validate_args: Whether to check values, as in torch.distributions.

    Raises:
        ValueError: If shapes do not agree, rows of ``components`` are not orthonormal, a factor is not lower
            triangular with a positive diagonal, ``residual_scale`` is negative, ``softness`` not positive or given
            for a rectified law, or a value is not finite.
        TypeError: If a parameter is not a floating tensor, or their dtypes differ.

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

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real_vector,
        "components": constraints.independent(constraints.real, 2),
        "logits": constraints.independent(constraints.less_than(math.inf), 1),
        "means": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.independent(constraints.lower_cholesky, 1),
        "residual_scale": constraints.nonnegative,
    }  # and softness, which may be None
    has_rsample = False
    _validate_args = __debug__  # torch.compile switches validation off on torch's own base class, for good

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
        given = {
            "loc": loc,
            "components": components,
            "logits": logits,
            "means": means,
            "scale_tril": scale_tril,
            "residual_scale": residual_scale,
        }
        if softness is not None:
            given["softness"] = softness
        check_parameters(given)
        validate = self._validate_args if validate_args is None else validate_args
        if validate:
            check_values(given)
        self.loc = loc
        self.components = components
        self.logits = logits
        self.means = means
        self.scale_tril = scale_tril
        self.residual_scale = residual_scale
        self.rectified = bool(rectified)
        self.softness = softness
        if self.rectified and softness is not None:
            raise ValueError("a law is rectified, or positive by its softness, not both")
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
        """Fit to activations, without labels: principal components, then expectation maximisation in them.

        Everything is a sum over batches, in float64, so that the activations need not fit in memory: two passes
        for the principal components, then one for each update, unless the projections are small enough to keep.
        It starts from k-means on at most 16 384 rows. The covariances have an inverse-Wishart prior, worth m/2 rows
        of the covariance within the clusters of the start, pooled, and there is at most one component for 20 rows:
        both by the likelihood of held-out MNIST activations. A component that ends with less than half a row is
        left out.

        Args:
            activations: Rows (N, d), or something that can be iterated more than once and gives rows (n, d). For a
                rectified law these are the rows *before* the rectification, the pre-activations.
            components: How many components C, at most.
            dims: How many principal components m, at most; fewer where d or the rank of the rows is smaller. Rows
                that lie in a plane of at most so many dimensions leave a residual scale of 0, and so no density
                unless m = d.
            rectified: Whether the law is rectified; the fit is the same.
            positive: Whether the law is positive, with a softness of a hundredth of each coordinate's mean; rows
                must not be negative, and what is below a thousandth of the mean is moved there.
            seed: Seed of the start. The global random state is not touched.
            iterations: Updates, at most.
            tolerance: Gain of the mean log likelihood, per row and with the prior, below which the updates end.
            group: Processes of ``torch.distributed`` that share the work. Each gives rows of its own, as a tensor or in
                at least one batch, be it of no row; all get the same law.

        Returns:
            A distribution of the dtype of the rows, at least float32, on their device.

        Raises:
            TypeError: If ``activations`` gives no floating tensors, or can be iterated only once.
            ValueError: If a shape is wrong, rows hold NaN or infinity, all rows are equal, there are fewer than two,
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
        """One component a class, from class probabilities in place of labels; in closed form.

        Weight, mean and covariance of a component are those of the rows, weighted by the probability of its class.
        The covariances have the prior of :meth:`fit`, with that within classes, pooled, so that a class of few rows
        is round rather than flat. Classes that hold less than 1e-6 of a row are left out.

        Args:
            activations: Rows (N, d) or batches of them, as for :meth:`fit`; two passes for the principal components,
                and one more.
            posterior: Gives class probabilities (n, C) of rows (n, d), as ``lambda h: head(h).softmax(-1)``. For a
                rectified law the rows are the pre-activations.
            dims: How many principal components m, at most.
            rectified: Whether the law is rectified.
            positive: Whether the law is positive, as for :meth:`fit`; the rows that ``posterior`` gets are h.
            group: Processes of ``torch.distributed`` that share the work, as for :meth:`fit`.

        Returns:
            A distribution of the dtype of the rows, at least float32, on their device.

        Raises:
            TypeError: If ``activations`` gives no floating tensors, or can be iterated only once.
            ValueError: As for :meth:`fit`, or if the probabilities have a wrong shape.

        Example:
            >>> rows = torch.cat([torch.randn(500, 8), torch.randn(500, 8) + 6.0])
            >>> p = PrincipalMixture.from_posterior(rows, lambda h: torch.eye(2)[(h.mean(-1) > 3).long()], dims=3)
            >>> p, p.logits.exp()
            (PrincipalMixture(2 components in 3 of 8 dimensions, 53 floats), tensor([0.5000, 0.5000]))
        """
        fitted = by_posterior(activations, posterior, dims, rectified, positive, group)
        return cls(**fitted._asdict(), rectified=rectified)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrincipalMixture:
        """The same law with a batch shape; its parameters are shared and keep their shapes."""
        new: PrincipalMixture = self._get_checked_instance(PrincipalMixture, _instance)
        batch = Size(batch_shape)
        torch.empty(self.batch_shape, device="meta").expand(batch)  # raises where torch's own distributions do
        for name in (*self.arg_constraints, "rectified", "softness"):
            setattr(new, name, getattr(self, name))
        super(PrincipalMixture, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Real vectors; the nonnegative orthant when rectified, the positive one with a softness."""
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
        """How many floats the law takes, with triangles counted as triangles: 38 481 for C = 16, m = d = 64."""
        (m, d), c = self.components.shape, len(self.logits)
        return d + m * d + c * (1 + m + m * (m + 1) // 2) + 1 + (0 if self.softness is None else d)

    @property
    def mean(self) -> Tensor:
        """E[h], shape (*B, d); of a rectified law in closed form, of a positive one by the trapezoidal rule."""
        weight, centre, _ = self._moments()
        return self._spread(weight @ centre)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, shape (*B, d): within the components, plus that of their means."""
        weight, centre, variance = self._moments()
        return self._spread(weight @ (variance + (centre - weight @ centre).square()))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at (*S, *B, d), shape (*S, *B); computed in at least float32.

        Of a positive law it is −∞ where a coordinate is not positive.

        Raises:
            ValueError: If there is no density (see :attr:`has_density`), or values are of a wrong shape or not
                finite.
        """
        if self.rectified or (not traced(value) and not self.has_density):
            why = (
                "a rectified law has atoms at zero; pre-activations have one, that of the same parameters with "
                "rectified=False"
                if self.rectified
                else "residual_scale is 0, so that all draws lie in a plane, as the rows that it was fitted to did "
                "(units that are always 0, or fewer rows than dimensions); give it a positive one"
            )
            raise ValueError(f"this PrincipalMixture has no density, and so no log_prob: {why}")
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
                off = x - loc
                u = off @ plane.mT
                z = (u - means.unsqueeze(-2)) @ whiten.mT  # (C, n, m)
                part = (constant - 0.5 * z.square().sum(-1).mT).logsumexp(-1)
                if not self._full:
                    rest = (off - u @ plane) / self.residual_scale.to(dtype)
                    part = part - 0.5 * rest.square().sum(-1)
            parts.append(part if slope is None else part + slope)
        return torch.cat(parts).reshape(shape[:-1]).to(torch.promote_types(value.dtype, self.loc.dtype))

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw activations of shape (*sample_shape, *B, d), from ``generator`` or torch's default."""
        shape = self._extended_shape(Size(sample_shape))
        with torch.no_grad(), in_full(self.loc.device):
            return self._draw(shape[:-1].numel(), generator).to(self.loc.dtype).reshape(shape)

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        dtype, device = torch.promote_types(self.loc.dtype, torch.float32), self.loc.device
        loc, plane, means, tril = (part.to(dtype) for part in (self.loc, self.components, self.means, self.scale_tril))
        m, d = plane.shape
        if count == 0:
            return loc.new_empty(0, d)
        weight = self.logits.to(dtype).softmax(-1)
        which = torch.multinomial(weight, count, replacement=True, generator=generator)
        order = which.argsort(stable=True)
        z = torch.randn(count, m, dtype=dtype, device=device, generator=generator)
        u = torch.empty_like(z)
        counts = which.bincount(minlength=len(weight)).tolist()
        for c, (some, places) in enumerate(zip(z.split(counts), order.split(counts), strict=True)):
            if len(places):  # one product for each component, where a gather would copy a factor for each draw
                u[places] = torch.addmm(means[c], some, tril[c].mT)
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
        """Weights (C,), and mean and variance of each coordinate of h in each component (C, d)."""
        weight, centre, variance = self._coordinates()
        if self.rectified:
            return weight, *rectified_moments(centre, variance)
        if self.softness is None:
            return weight, centre, variance
        return weight, *positive_moments(centre, variance, self.softness)

    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (C,), and mean and variance of each coordinate of x in each component (C, d)."""
        dtype = working_dtype(self.loc.device)
        plane = self.components.to(dtype)
        centre = self.loc.to(dtype) + self.means.to(dtype) @ plane
        variance = torch.stack([(factor.mT @ plane).square().sum(0) for factor in self.scale_tril.to(dtype)])
        if not self._full:
            variance = variance + self.residual_scale.to(dtype).square() * (1 - plane.square().sum(0)).clamp_min(0)
        return self.logits.to(dtype).softmax(-1), centre, variance

    def _spread(self, moment: Tensor) -> Tensor:
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
