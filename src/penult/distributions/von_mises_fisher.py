"""The von Mises-Fisher distribution on the unit sphere."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.autograd.function import Function, once_differentiable
from torch.distributions import Distribution, constraints, register_kl

from penult import special
from penult._checks import as_size, check_floating
from penult.distributions import _sampling
from penult.distributions.constraints import sphere
from penult.special import _validates_by_default

__all__ = ["VonMisesFisher"]


class VonMisesFisher(Distribution):
    r"""von Mises-Fisher distribution on the unit sphere of R^d, d ≥ 2.

    .. math:: p(x) = C_d(\kappa)\, e^{\kappa\,\mu\cdot x},\qquad
              \log C_d(\kappa) = -\log \mathrm{area}(S^{d-1}) - F_d(\kappa),

    a density with respect to the surface measure. Here F_d is :func:`penult.special.log_sphere_mgf`; its derivatives A
    (the mean cosine to μ) and V (the variance of the cosine) appear in the moments below. κ = 0 gives the uniform
    distribution. Densities, entropies and divergences are accurate for every dimension and concentration (see
    :mod:`penult.special`); ``rsample`` has unbiased pathwise gradients in both parameters (implicit
    reparameterisation).

    References:
        Mardia and Jupp, *Directional Statistics*, 2000, chapters 9 and 10.

    Args:
        loc: Mean directions μ (*B, d), unit vectors.
        concentration: Concentrations κ ≥ 0, (*B,); broadcast against the batch of ``loc``.
        validate_args: Whether to check values. Default: as ``Distribution.set_default_validate_args`` says; never
            inside ``torch.compile`` or ``torch.func`` transforms.

    Raises:
        ValueError: d < 2, the batch shapes do not broadcast, a ``loc`` is not a unit vector, or a concentration is
            negative, infinite or NaN.
        TypeError: A parameter is not a floating tensor.

    Example:
        >>> p = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(10.0))
        >>> x = p.sample((1000,), generator=torch.Generator().manual_seed(0))
        >>> x.shape, p.log_prob(x).shape
        (torch.Size([1000, 3]), torch.Size([1000]))
        >>> p.mean
        tensor([0.0000, 0.0000, 0.9000])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": sphere,
        "concentration": constraints.nonnegative,
    }
    support = sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None) -> None:
        check_floating("loc", loc, "(*B, d)")
        check_floating("concentration", concentration, "(*B,)")
        if loc.dim() < 1 or loc.shape[-1] < 2:
            raise ValueError(
                f"loc has shape {tuple(loc.shape)}; expected unit vectors (*B, d) with d >= 2. In one dimension the "
                "sphere is two points: use torch.distributions.Bernoulli"
            )
        try:
            batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        except RuntimeError as error:
            raise ValueError(
                f"loc {tuple(loc.shape)} and concentration {tuple(concentration.shape)} do not broadcast: "
                "expected (*B, d) and (*B,)"
            ) from error
        validate = _validates_by_default() if validate_args is None else validate_args
        if special.traced(loc, concentration):
            # Values are not available inside a transform.
            validate = False
        if validate:
            _validate(loc, concentration)
        self.loc = loc.expand(*batch, loc.shape[-1])
        self.concentration = concentration.expand(batch)
        super().__init__(batch, loc.shape[-1:], validate_args=validate)

    @classmethod
    def fit(cls, x: Tensor, weights: Tensor | None = None) -> VonMisesFisher:
        """Fit to unit vectors by maximum likelihood, along the first dimension.

        Args:
            x: Unit vectors (N, *B, d).
            weights: Non-negative weights (N,) or (N, *B). Default: equal weights.

        Returns:
            A distribution of batch shape (*B,).

        Raises:
            ValueError: There are no samples, a sample is not a unit vector, a weight is negative or not finite, the
                weights sum to zero, or all samples are equal, so that the concentration is infinite.
            TypeError: ``x`` is not a floating tensor.

        Example:
            >>> p = VonMisesFisher(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(50.0))
            >>> x = p.sample((20000,), generator=torch.Generator().manual_seed(0))
            >>> abs(float(VonMisesFisher.fit(x).concentration) / 50 - 1) < 0.03
            True
        """
        check_floating("x", x, "(N, *B, d)")
        if x.dim() < 2 or x.shape[0] == 0 or x.shape[-1] < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, ..., d) with N >= 1 samples and d >= 2")
        if not bool(sphere.check(x).all()):
            norms = torch.linalg.vector_norm(x, dim=-1)
            raise ValueError(
                f"x holds vectors of norm {float(norms.min()):.4g} to {float(norms.max()):.4g}; expected unit vectors. "
                "Normalise them first: torch.nn.functional.normalize(x, dim=-1)"
            )
        work = special.working_dtype(x.device)
        data = x.to(work)
        if weights is None:
            w = data.new_ones(x.shape[:-1])
        else:
            if weights.shape not in (x.shape[:1], x.shape[:-1]):
                raise ValueError(
                    f"weights has shape {tuple(weights.shape)}; expected {tuple(x.shape[:1])} or {tuple(x.shape[:-1])}"
                )
            w = weights.to(work)
            w = w.reshape(w.shape + (1,) * (x.dim() - 1 - w.dim())).expand(x.shape[:-1])
        total = w.sum(0)
        if not bool((w >= 0).all()) or not bool((total > 0).all()) or not bool(total.isfinite().all()):
            raise ValueError("weights must be finite and non-negative with a positive sum")
        share = (w / total).unsqueeze(-1)
        mean = (share * data).sum(0)
        resultant = torch.linalg.vector_norm(mean, dim=-1)
        # Where the mean is zero, the fit is the uniform distribution, and its direction is arbitrary.
        first_axis = torch.zeros_like(mean)
        first_axis[..., 0] = 1.0
        loc = torch.where(resultant.unsqueeze(-1) > 0, mean / resultant.unsqueeze(-1), first_axis)
        # 1 − R without cancellation.
        deficit = 0.5 * (share * (data - loc).square()).sum((0, -1))
        if bool((deficit <= 0).any()):
            raise ValueError("all samples coincide, so the concentration is infinite; pass at least two directions")
        kappa = special.concentration(x.shape[-1], resultant.clamp_max(1.0), deficit.clamp_max(1.0))
        return cls(torch.nn.functional.normalize(loc.to(x.dtype), dim=-1), kappa.to(x.dtype))

    def expand(self, batch_shape: Any, _instance: Any = None) -> VonMisesFisher:
        """Return a view of the distribution with a larger batch shape."""
        new: VonMisesFisher = self._get_checked_instance(VonMisesFisher, _instance)
        batch = as_size(batch_shape)
        new.loc = self.loc.expand(batch + self.event_shape)
        new.concentration = self.concentration.expand(batch)
        super(VonMisesFisher, new).__init__(batch, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """E[x] = A_d(κ) μ, shape (*B, d)."""
        return special.mean_resultant_length(self._dim, self.concentration).unsqueeze(-1) * self.loc

    @property
    def mode(self) -> Tensor:
        """μ, shape (*B, d); for κ = 0 every direction is a mode, and μ is one of them."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, V μ_i² + (A/κ)(1 − μ_i²), shape (*B, d)."""
        kappa = self.concentration.to(special.working_dtype(self.loc.device))
        safe = kappa.clamp_min(1e-30)
        across = (special.mean_resultant_length(self._dim, safe) / safe).unsqueeze(-1)
        along = special.cosine_variance(self._dim, kappa).unsqueeze(-1)
        square = self.loc.to(kappa.dtype).square()
        return (along * square + across * (1 - square)).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at unit vectors (*S, *B, d) with respect to the surface measure, shape (*S, *B).

        Computed from ‖x − μ‖²/2 = 1 − x·μ, which is accurate where x is close to μ.
        """
        if self._validate_args and not special.traced(value):
            self._validate_sample(value)
        kappa = self.concentration.to(special.working_dtype(self.loc.device))
        y = 0.5 * (value.to(kappa.dtype) - self.loc.to(kappa.dtype)).square().sum(-1)
        growth = special.log_sphere_mgf_deficit(self._dim, kappa)
        return (growth - kappa * y - special.log_sphere_area(self._dim)).to(
            torch.promote_types(value.dtype, self._dtype)
        )

    def entropy(self) -> Tensor:
        """Return the differential entropy with respect to the surface measure, log area + F − κ A, shape (*B,)."""
        kappa = self.concentration.to(special.working_dtype(self.loc.device))
        growth = special.log_sphere_mgf_deficit(self._dim, kappa)
        spread = kappa * special.mean_resultant_deficit(self._dim, kappa)
        return (special.log_sphere_area(self._dim) - growth + spread).to(self._dtype)

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Sample unit vectors of shape (*sample_shape, *B, d)."""
        with torch.no_grad():
            return self._sample(as_size(sample_shape), generator)[0].to(self._dtype)

    def rsample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Sample as :meth:`sample`, with pathwise gradients in ``loc`` (on the sphere) and ``concentration``.

        The gradients are of first order: a second backward pass through them is an error.
        """
        with torch.no_grad():
            x, y = self._sample(as_size(sample_shape), generator)
        pathwise: Tensor = _Pathwise.apply(self.loc, self.concentration, x, y)
        return pathwise.to(self._dtype)

    def _sample(self, sample_shape: Size, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Sample unit vectors, and return them with one minus their cosines to μ."""
        if not torch.compiler.is_compiling() and special.traced(self.loc, self.concentration):
            raise RuntimeError(
                "sampling does not work inside a torch.func transform: the number of rejections depends on values. "
                "Sample outside of it, with a batch of (loc, concentration)"
            )
        dtype = torch.promote_types(self.loc.dtype, torch.float32)
        kappa = self.concentration.detach().expand(sample_shape + self.batch_shape)
        y = _sampling.cosine_complement(self._dim, kappa, dtype, generator)
        with special.in_full(self.loc.device):
            return _sampling.around(self.loc.detach().to(dtype), y, generator), y

    @property
    def _dim(self) -> int:
        return self.loc.shape[-1]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.loc.dtype, self.concentration.dtype)


class _Pathwise(Function):
    """The sample as a function of its parameters, for fixed random numbers.

    A change of μ rotates the sample with μ; a change of κ moves its cosine by dt/dκ at a fixed quantile (Figurnov,
    Mohamed, Mnih, "Implicit Reparameterization Gradients", NeurIPS 2018).
    """

    @staticmethod
    def forward(loc: Tensor, kappa: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        loc, kappa, x, y = ctx.saved_tensors
        g, mu = grads[0], loc.to(x.dtype)
        along = (g * mu).sum(-1)
        grad_loc = grad_kappa = None
        if ctx.needs_input_grad[0]:
            turn = (1 - y).to(x.dtype).unsqueeze(-1) * g - along.unsqueeze(-1) * x
            turn = turn - (turn * mu).sum(-1, keepdim=True) * mu
            grad_loc = turn.sum_to_size(loc.shape).to(loc.dtype)
        if ctx.needs_input_grad[1]:
            k = kappa.to(y.dtype).expand(y.shape)
            shift = special.cosine_shift(x.shape[-1], k, y)
            slope = (along.to(y.dtype) - (1 - y) * (g * x).sum(-1)) / (y * (2 - y))
            grad_kappa = torch.where(shift > 0, shift * slope, 0.0).sum_to_size(kappa.shape).to(kappa.dtype)
        return grad_loc, grad_kappa, None, None


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_von_mises_fisher(p: VonMisesFisher, q: VonMisesFisher) -> Tensor:
    """Return KL(p‖q) = [F(κ_q) − F(κ_p) − A(κ_p)(κ_q − κ_p)] + A(κ_p) κ_q |μ_p − μ_q|²/2.

    The bracket is a Bregman divergence. It is computed as an integral of V if the concentrations are close, and
    otherwise as a difference of F or of κ − F, for the smaller rounding error.
    """
    if p.event_shape != q.event_shape:
        raise ValueError(f"the distributions are on different spheres: {p.event_shape} and {q.event_shape}")
    dim, work = p._dim, special.working_dtype(p.loc.device)
    kp, kq = torch.broadcast_tensors(p.concentration.to(work), q.concentration.to(work))
    mean, step = special.mean_resultant_length(dim, kp), kq - kp
    close = step.abs() <= 0.3 * kp
    near_step = torch.where(close, step, 0.0)
    near = sum(
        weight * (1 - s) * special.cosine_variance(dim, kp + s * near_step) for s, weight in special.gauss_legendre(8)
    )
    small = special.log_sphere_mgf(dim, kq) - special.log_sphere_mgf(dim, kp) - mean * step
    large = (
        special.log_sphere_mgf_deficit(dim, kp)
        - special.log_sphere_mgf_deficit(dim, kq)
        + special.mean_resultant_deficit(dim, kp) * step
    )
    far = torch.where(mean < 0.5, small, large)
    bracket = torch.where(close, near_step * near_step * near, far)
    half_square_distance = 0.5 * (p.loc.to(work) - q.loc.to(work)).square().sum(-1)
    divergence: Tensor = bracket + mean * kq * half_square_distance
    return divergence.to(torch.promote_types(p._dtype, q._dtype))


def _validate(loc: Tensor, concentration: Tensor) -> None:
    if not bool((concentration >= 0).all()) or not bool(concentration.isfinite().all()):
        bad = concentration[~((concentration >= 0) & concentration.isfinite())].flatten()[0]
        raise ValueError(
            f"concentration has the value {float(bad):.6g} in a tensor of shape {tuple(concentration.shape)}; expected "
            "finite values of at least 0 (0 is the uniform distribution)"
        )
    if not bool(sphere.check(loc).all()):
        norms = torch.linalg.vector_norm(loc, dim=-1)
        worst = norms.flatten()[(norms.flatten() - 1).abs().nan_to_num(torch.inf).argmax()]
        raise ValueError(
            f"loc holds a vector of norm {float(worst):.6g} in a tensor of shape {tuple(loc.shape)}; expected unit "
            "vectors. Normalise them: torch.nn.functional.normalize(loc, dim=-1)"
        )
