"""A normalizing flow for activations: one spline for each coordinate over a Gaussian mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from penult._checks import as_size, described
from penult.distributions._flow_fit import (
    BOUND,
    ELEMENTS,
    PARTS,
    SLOPE,
    Progress,
    fit_flow,
    log_density,
    mixture_of,
    splines,
    zuko,
)
from penult.distributions._positive import transformed_moments
from penult.distributions.principal_mixture import PrincipalMixture
from penult.special import traced, working_dtype

__all__ = ["NormalizingFlow"]


class NormalizingFlow(nn.Module):
    r"""A spline flow over a Gaussian mixture, optionally rectified.

    .. math:: x_i = a_i + s_i\,T_i^{-1}(z_i),\qquad z \sim \text{PrincipalMixture},

    with a monotone rational-quadratic spline T_i for each coordinate, and :math:`h = \max(x, 0)` instead of x when
    ``rectified``. The splines model the skewness and the edges of single coordinates, the mixture models the clusters
    and the correlations. It is a module whose tensors are buffers, with the sampling, density and moments of a
    `PrincipalMixture`; it has no batch shape.

    Flows of more layers over a normal base (masked autoregressive, coupling) reach the same likelihood, but put mass
    between the clusters, which a two-sample test detects.

    It needs zuko: ``pip install "penult[flow]"``.

    References:
        Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows", 2019.

    Args:
        loc: Centres a (d,).
        scale: Scales s > 0 (d,).
        knots: Widths, heights and slopes of the splines, unconstrained, (d, 3·bins − 1); zeros are the identity.
        base: Distribution of z.
        rectified: Whether negative coordinates are set to zero.

    Raises:
        ImportError: zuko is not installed.
        TypeError: ``base`` is not a `PrincipalMixture`, or the dtypes differ.
        ValueError: Shapes do not agree, the base is rectified, or a value is out of range or not finite.

    Example:
        >>> rows = torch.cat([torch.randn(300, 4), torch.randn(300, 4) + 5.0]).exp()
        >>> p = NormalizingFlow.fit(rows, components=2, iterations=50, epochs=2)
        >>> p
        NormalizingFlow(2 components in 4 of 4 dimensions, 8 bins, 151 floats)
        >>> p.sample((3,), generator=torch.Generator().manual_seed(0)).shape, p.log_prob(rows).shape
        (torch.Size([3, 4]), torch.Size([600]))
    """

    loc: Tensor
    scale: Tensor
    knots: Tensor
    base_components: Tensor
    base_logits: Tensor

    def __init__(
        self, loc: Tensor, scale: Tensor, knots: Tensor, base: PrincipalMixture, rectified: bool = False
    ) -> None:
        super().__init__()
        # A missing package is reported here and not only by the first call of sample or log_prob.
        zuko()
        if not isinstance(base, PrincipalMixture):
            raise TypeError(f"base is {described(base)}; expected a PrincipalMixture")
        parameters = {"loc": loc, "scale": scale, "knots": knots}
        for name, value in parameters.items():
            if not isinstance(value, Tensor) or value.dtype != base.loc.dtype:
                raise TypeError(f"{name} is {described(value)}; expected a {base.loc.dtype} tensor, as base")
        d = base.event_shape[0]
        if loc.shape != (d,) or scale.shape != (d,) or knots.dim() != 2 or len(knots) != d or knots.shape[1] % 3 != 2:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in parameters.items())
            raise ValueError(
                f"the shapes do not agree: {shapes}; expected loc ({d},), scale ({d},), knots ({d}, 3 bins - 1)"
            )
        if not all(bool(value.isfinite().all()) for value in parameters.values()) or not bool((scale > 0).all()):
            raise ValueError("loc, scale and knots must be finite, and scale positive")
        if base.rectified or base.batch_shape:
            raise ValueError("base must be neither rectified nor expanded; pass rectified=True to the flow itself")
        self.rectified = bool(rectified)
        for name, value in parameters.items():
            self.register_buffer(name, _copy(value))
        for name in PARTS:
            self.register_buffer(f"base_{name}", _copy(getattr(base, name)))

    @classmethod
    def fit(
        cls,
        activations: Tensor | Iterable[Tensor],
        components: int = 12,
        dims: int | None = 64,
        rectified: bool = False,
        seed: int = 0,
        bins: int = 8,
        iterations: int = 300,
        epochs: int = 40,
        progress: Progress | None = None,
    ) -> NormalizingFlow:
        """Fit to activations, without labels.

        There are three steps. First, each spline is fitted by the likelihood of its coordinate under a standard
        normal. Second, the mixture is fitted by `PrincipalMixture.fit`, in the coordinates of these splines and in
        those without splines. Third, the better of the two is fitted by the common likelihood of splines and mixture
        (AdamW, a cosine schedule, clipped gradients). One row in ten, at most 4096, is held out to select the best
        result of each step. If the last step gains nothing, the mixture is fitted again to all rows. With fewer than
        100 rows nothing is selected, and the splines are the identity.

        Expectation maximisation passes over all activations, so that they need not fit in memory. The other steps
        use a random sample of at most 2²⁴ numbers, kept in memory. The fit is by likelihood, so rows with exact zeros,
        as after a ReLU, do not suit it: fit the rows before the ReLU with ``rectified``.

        Args:
            activations: Rows (N, d), or an iterable of rows (n, d) that can be iterated more than once. For a rectified
                distribution these are the rows *before* the rectification, the pre-activations.
            components: Number of components of the mixture, at most.
            dims: Number of principal components, in the coordinates of the splines, in which the components have their
                own covariances, at most; None for all. With fewer than d, the residual is isotropic.
            rectified: Whether the distribution is rectified; the fit is the same.
            seed: Seed of the sample, the start and the order of rows. The global random state is not changed.
            bins: Number of bins of each spline.
            iterations: Number of steps of the splines; 0 leaves them the identity.
            epochs: Number of passes of the last step over the sample; 0 skips it.
            progress: Called after each step with the number of steps done and their total.

        Returns:
            A flow of the dtype of the rows, at least float32, on their device.

        Raises:
            ImportError: zuko is not installed.
            TypeError: ``activations`` gives no floating tensors or can be iterated only once, or a number is not an
                integer.
            ValueError: A shape is wrong, rows hold NaN or infinity, all rows are equal, there are fewer than two,
                passes differ in their number of rows, or a number is out of range.
        """
        loc, scale, knots, base = fit_flow(activations, components, dims, seed, bins, iterations, epochs, progress)
        return cls(loc, scale, knots, base, rectified)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NormalizingFlow:
        """Rebuild a flow from its :meth:`config` and ``state_dict``.

        Raises:
            ValueError: They are not those of a flow, or do not belong together.
        """
        names = {"loc", "scale", "knots", *(f"base_{name}" for name in PARTS)}
        if set(tensors) != names or not isinstance(config.get("rectified"), bool):
            raise ValueError(
                f"not the state of a NormalizingFlow: the tensors are {', '.join(sorted(tensors)) or 'none'} and the "
                f"config is {dict(config)!r}; expected {', '.join(sorted(names))} and a config with 'rectified'"
            )
        base = mixture_of((tensors[f"base_{name}"] for name in PARTS), validate_args=True)
        new = cls(tensors["loc"], tensors["scale"], tensors["knots"], base, config["rectified"])
        if new.config() != dict(config):
            raise ValueError(
                f"config {dict(config)!r} and tensors do not belong together; the config of these tensors is "
                f"{new.config()!r}"
            )
        return new

    def config(self) -> dict[str, Any]:
        """Return JSON facts from which, together with the ``state_dict``, :meth:`from_config` rebuilds this flow."""
        (m, d), c = self.base_components.shape, len(self.base_logits)
        spline = {"bins": self._bins, "bound": BOUND, "slope": SLOPE}
        return {"features": d, "components": c, "dims": m, **spline, "rectified": self.rectified}

    @property
    def base(self) -> PrincipalMixture:
        """The distribution of z, which shares the buffers."""
        return mixture_of(getattr(self, f"base_{name}") for name in PARTS)

    @property
    def batch_shape(self) -> Size:
        """Always empty."""
        return Size()

    @property
    def event_shape(self) -> Size:
        """(d,)."""
        return self.loc.shape

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors, or the nonnegative orthant when rectified."""
        if self.rectified:
            return constraints.independent(constraints.nonnegative, 1)
        return constraints.real_vector

    @property
    def has_density(self) -> bool:
        """Whether there is a density with respect to Lebesgue measure, so that :meth:`log_prob` works."""
        return not self.rectified and self.base.has_density

    @property
    def mean(self) -> Tensor:
        """E[h], shape (d,), by the trapezoidal rule in each component of the mixture."""
        weight, centre, _ = self._moments()
        return (weight @ centre).to(self.loc.dtype)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, shape (d,): the variance within components plus that of their means."""
        weight, centre, variance = self._moments()
        return (weight @ (variance + (centre - weight @ centre).square())).to(self.loc.dtype)

    def expand(self, batch_shape: Any) -> NormalizingFlow:
        """Return this flow, which has no batch shape.

        Raises:
            NotImplementedError: ``batch_shape`` is not empty.
        """
        if batch := as_size(batch_shape):
            raise NotImplementedError(
                f"batch_shape is {tuple(batch)}; expected (), since a NormalizingFlow has no batch shape. Sample with "
                "sample((n,)) instead"
            )
        return self

    @torch.no_grad()
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights (C,), and the mean and variance of each coordinate of h in each component (C, d)."""
        loc, scale, knots, base = self._cast(working_dtype(self.loc.device))
        weight, centre, variance = base._moments_of_x()
        inverse = splines(knots).inv

        def transform(z: Tensor) -> Tensor:
            x: Tensor = loc + scale * inverse(z)
            return x.clamp_min(0) if self.rectified else x

        return weight, *transformed_moments(centre, variance, transform)

    @property
    def num_parameters(self) -> int:
        """Number of free floats of the distribution; of a triangular matrix only the triangle counts."""
        return self.loc.numel() + self.scale.numel() + self.knots.numel() + self.base.num_parameters

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at (*S, d), shape (*S), computed in at least float32.

        Raises:
            ValueError: There is no density (see :attr:`has_density`), or values have a wrong shape or are not finite.
        """
        if not self.has_density:
            why = (
                "a rectified distribution has atoms at zero; the density of the pre-activations is that of the same "
                "parameters with rectified=False"
                if self.rectified
                else "it was fitted to rows that lie in a plane"
            )
            raise ValueError(f"this NormalizingFlow has no density, so log_prob is not defined: {why}")
        d = len(self.loc)
        if value.dim() < 1 or value.shape[-1] != d:
            raise ValueError(f"value has shape {tuple(value.shape)}; expected (..., {d})")
        if not traced(value) and not bool(value.isfinite().all()):
            raise ValueError("value holds NaN or infinity")
        dtype = torch.promote_types(torch.promote_types(value.dtype, self.loc.dtype), torch.float32)
        loc, scale, knots, base = self._cast(dtype)
        parts = []
        for rows in value.to(dtype).reshape(-1, d).split(max(1, ELEMENTS // d)):
            parts.append(log_density((rows - loc) / scale, knots, base))
        density = torch.cat(parts) - scale.log().sum()
        return density.reshape(value.shape[:-1]).to(torch.promote_types(value.dtype, self.loc.dtype))

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Sample activations of shape (*sample_shape, d), with ``generator`` or torch's default generator."""
        shape, d = as_size(sample_shape), len(self.loc)
        _, _, _, base = self._cast(torch.promote_types(self.loc.dtype, torch.float32))
        z = base.sample((shape.numel(),), generator=generator)
        # The inverse is a root of a quadratic, whose discriminant could round to a negative number in float32.
        loc, scale, knots, _ = self._cast(working_dtype(self.loc.device))
        inverse = splines(knots).inv
        parts = [loc + scale * inverse(rows.to(loc)) for rows in z.split(max(1, ELEMENTS // d))]
        x = torch.cat(parts).to(self.loc.dtype)
        return (x.clamp_(min=0) if self.rectified else x).reshape(shape + self.event_shape)

    def extra_repr(self) -> str:  # noqa: D102
        (m, d), c = self.base_components.shape, len(self.base_logits)
        size = f"{self.num_parameters:,}".replace(",", " ")
        return (
            f"{c} component{'s' * (c != 1)} in {m} of {d} dimensions, {self._bins} bins, {size} floats"
            f"{', rectified' * self.rectified}"
        )

    @property
    def _bins(self) -> int:
        return (self.knots.shape[1] + 1) // 3

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, PrincipalMixture]:
        base = mixture_of(getattr(self, f"base_{name}").to(dtype) for name in PARTS)
        return self.loc.to(dtype), self.scale.to(dtype), self.knots.to(dtype), base


def _copy(tensor: Tensor) -> Tensor:
    # Products of tensors with other strides, which files do not keep, are rounded in another way.
    return tensor.detach().clone(memory_format=torch.contiguous_format)
