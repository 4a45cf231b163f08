"""A normalizing flow for activations: one spline for each coordinate over a Gaussian mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

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
from penult.distributions.principal_mixture import PrincipalMixture
from penult.special import traced, working_dtype

__all__ = ["NormalizingFlow"]


class NormalizingFlow(nn.Module):
    r"""A spline flow over a Gaussian mixture, optionally rectified: a law of activations with a density.

    .. math:: x_i = a_i + s_i\,T_i^{-1}(z_i),\qquad z \sim \text{PrincipalMixture},

    with a monotone rational-quadratic spline T_i for each coordinate, and :math:`h = \max(x, 0)` in place of x when
    ``rectified``. The splines take the skewness and the edges of single coordinates, the mixture the clusters and
    the correlations. It has the interface of a `PrincipalMixture` and is a module: it moves, and its state is
    tensors of floats. All of them are buffers.

    Flows of more layers over a normal base (masked autoregressive, coupling) reach the same likelihood, but put mass
    between the clusters, where a two-sample test finds it.

    It needs zuko: ``pip install "penult[flow]"``.

    References:
        Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows", 2019.

    Args:
        loc: Centres a (d,).
        scale: Scales s > 0 (d,).
        knots: Widths, heights and slopes of the splines, unconstrained, (d, 3·bins − 1); zeros are the identity.
        base: The law of z.
        rectified: Whether negative coordinates are set to zero.

    Raises:
        ImportError: If zuko is not installed.
        TypeError: If ``base`` is no `PrincipalMixture`, or the dtypes differ.
        ValueError: If shapes do not agree, the base is rectified, or a value is out of range or not finite.

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
        zuko()  # here, rather than at the first draw
        if not isinstance(base, PrincipalMixture):
            raise TypeError(f"base must be a PrincipalMixture, got {type(base).__name__}")
        given = {"loc": loc, "scale": scale, "knots": knots}
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.dtype != base.loc.dtype:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a tensor of the base's dtype {base.loc.dtype}, got {kind}")
        d = base.event_shape[0]
        if loc.shape != (d,) or scale.shape != (d,) or knots.dim() != 2 or len(knots) != d or knots.shape[1] % 3 != 2:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
            raise ValueError(
                f"the shapes do not agree: {shapes}; expected loc ({d},), scale ({d},), knots ({d}, 3 bins - 1)"
            )
        if not all(bool(value.isfinite().all()) for value in given.values()) or not bool((scale > 0).all()):
            raise ValueError("loc, scale and knots must be finite, and scale positive")
        if base.rectified or base.batch_shape:
            raise ValueError("base must be neither rectified nor expanded; pass rectified=True to the flow itself")
        self.rectified = bool(rectified)
        for name, value in given.items():
            self.register_buffer(name, value.detach().clone())
        for name in PARTS:
            self.register_buffer(f"base_{name}", getattr(base, name).detach().clone())

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

        Three steps: each spline by the likelihood of its coordinate under a standard normal; the mixture by
        `PrincipalMixture.fit` in the coordinates that they give, and in those of no splines; then the better of the
        two by the likelihood of splines and mixture together (AdamW, a cosine schedule, clipped gradients). One row
        in ten, at most 4096, is held out, and chooses at each step; if the last gains nothing, the mixture is fitted
        again to all rows. With fewer than 100 rows there is nothing to choose by, and the splines are the identity.

        Expectation maximisation passes over all activations, so that they need not fit in memory; the other steps
        use a random sample of at most 2²⁴ numbers, kept in memory. The fit is by likelihood: where rows hold exact
        zeros, as after a ReLU, fit the rows before it with ``rectified``.

        Args:
            activations: Rows (N, d), or something that can be iterated more than once and gives rows (n, d). For a
                rectified law these are the rows *before* the rectification, the pre-activations.
            components: How many components of the mixture, at most.
            dims: How many principal components of the splines' coordinates the mixture has its own covariances in,
                at most; None for all. Fewer than d leave an isotropic residual across them.
            rectified: Whether the law is rectified; the fit is the same.
            seed: Seed of the sample, the start and the order of rows. The global random state is not touched.
            bins: Of each spline.
            iterations: Steps of the splines; 0 leaves them the identity.
            epochs: Passes of the last step over the sample; 0 leaves it out.
            progress: Called with the steps done and their number, after each.

        Returns:
            A flow of the dtype of the rows, at least float32, on their device.

        Raises:
            ImportError: If zuko is not installed.
            TypeError: If ``activations`` gives no floating tensors, or can be iterated only once.
            ValueError: If a shape is wrong, rows hold NaN or infinity, all rows are equal, there are fewer than two,
                passes differ in their number of rows, or a number is out of range.
        """
        loc, scale, knots, base = fit_flow(activations, components, dims, seed, bins, iterations, epochs, progress)
        return cls(loc, scale, knots, base, rectified)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NormalizingFlow:
        """The flow whose :meth:`config` and ``state_dict`` these are.

        Raises:
            ValueError: If they belong to no flow, or not to each other.
        """
        wanted = {"loc", "scale", "knots", *(f"base_{name}" for name in PARTS)}
        if set(tensors) != wanted or not isinstance(config.get("rectified"), bool):
            raise ValueError(
                f"not the state of a NormalizingFlow: it has {', '.join(sorted(wanted))} and config 'rectified', "
                f"got {', '.join(sorted(tensors)) or 'no tensors'} and config {dict(config)!r}"
            )
        base = mixture_of((tensors[f"base_{name}"] for name in PARTS), validate_args=True)
        new = cls(tensors["loc"], tensors["scale"], tensors["knots"], base, config["rectified"])
        if new.config() != dict(config):
            raise ValueError(f"config {dict(config)!r} and tensors do not belong together; these make {new.config()!r}")
        return new

    def config(self) -> dict[str, Any]:
        """What makes this flow again, with its ``state_dict``, by :meth:`from_config`; for JSON."""
        (m, d), c = self.base_components.shape, len(self.base_logits)
        spline = {"bins": self._bins, "bound": BOUND, "slope": SLOPE}
        return {"features": d, "components": c, "dims": m, **spline, "rectified": self.rectified}

    @property
    def base(self) -> PrincipalMixture:
        """The law of z; it shares the buffers."""
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
    def num_parameters(self) -> int:
        """How many floats the law takes, with triangles counted as triangles."""
        return self.loc.numel() + self.scale.numel() + self.knots.numel() + self.base.num_parameters

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at (*S, d), shape (*S); computed in at least float32.

        Raises:
            ValueError: If there is no density (see :attr:`has_density`), or values are of a wrong shape or not
                finite.
        """
        if not self.has_density:
            why = (
                "a rectified law has atoms at zero; the density of the pre-activations is that of the same "
                "parameters with rectified=False"
                if self.rectified
                else "it was fitted to rows that lie in a plane"
            )
            raise ValueError(f"this NormalizingFlow has no density, and so no log_prob: {why}")
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
        """Draw activations of shape (*sample_shape, d), from ``generator`` or torch's default."""
        shape, d = Size(sample_shape), len(self.loc)
        _, _, _, base = self._cast(torch.promote_types(self.loc.dtype, torch.float32))
        z = base.sample((shape.numel(),), generator=generator)
        # the inverse is a root of a quadratic, whose discriminant single precision can make negative
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
        law = mixture_of(getattr(self, f"base_{name}").to(dtype) for name in PARTS)
        return self.loc.to(dtype), self.scale.to(dtype), self.knots.to(dtype), law
