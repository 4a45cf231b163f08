"""Sphere base: von Mises-Fisher activations, in the space of activations or in a chart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from penult import special
from penult._checks import check_between, check_choice, check_integer, index_of
from penult.activations import Activations, _ActivationSource
from penult.bases._chart import Chart
from penult.bases._implied_radius import implied_radius, unit
from penult.bases._radial import direction_log_prob, radial_table
from penult.bases._sphere_fit import Shape, check_trim, fit_sphere, typical_rows
from penult.bases._tilted_gaussian import Shrinkage, check_shrinkage
from penult.bases.base import Base, BaseInfo
from penult.distributions import _around, _cosine_complement
from penult.head import Head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Sphere"]

# Number of (row, radius) pairs evaluated at a time.
_PAIRS = 1 << 20


class Sphere(Base):
    r"""Uniform measure on concentric spheres ‖u‖ = r in a chart h = loc + U'L u.

    Its tilts are von Mises-Fisher in u, with the mean direction of w' = L'U w and the concentration κ = r ‖w'‖. With
    the weights ω_r of the radii r and F_m = :func:`penult.special.log_sphere_mgf` in dimension m,

    .. math:: M(w) &= e^{w \cdot loc} \sum_r \omega_r e^{F_m(r \|w'\|)}, \\
              \log p(h|w) &= w' \cdot u - \log \sum_r \omega_r e^{F_m(r\|w'\|)}
              - \log \mathrm{area}(S^{m-1}) - (m-1) \log r .

    Densities refer to ω(dr) × the surface measure of radius r in the chart's m dimensions. They are evaluated for every
    h at its own radius, which need not be one of the radii, and ignore the part of h outside the subspace.
    ``Sphere(radius)`` is the base of Seo, Lee and Kwak ("On The Distribution of Penultimate Activations of
    Classification Networks", UAI 2021). In one dimension the sphere is two points.

    Args:
        radius: Radii (R,) or a number, positive.
        loc: Centre (d,); its part outside the subspace is the class-independent mean. Default: zero.
        scale_tril: Lower triangular L (m, m) with positive diagonal. Default: the identity.
        subspace: Orthonormal rows U (m, d). Default: the whole space.
        log_weights: Log weights log ω (R,), which need not be normalised. Default: equal weights.

    Raises:
        ValueError: Shapes do not agree, a radius is not positive and finite, the rows of ``subspace`` are not
            orthonormal, or ``scale_tril`` is not lower triangular with a positive diagonal.

    Example:
        >>> base = Sphere(2.0)
        >>> base.log_mgf(torch.tensor([[0.0, 0.0, 1.5]]))  # log(sinh 3 / 3)
        tensor([1.2058])
        >>> base.tilt(torch.tensor([0.0, 0.0, 1.5])).sample((4,)).norm(dim=-1)
        tensor([2., 2., 2., 2.])
    """

    radius: Tensor
    log_weights: Tensor
    loc: Tensor | None
    scale_tril: Tensor | None
    subspace: Tensor | None

    def __init__(
        self,
        radius: Tensor | float,
        loc: Tensor | None = None,
        scale_tril: Tensor | None = None,
        subspace: Tensor | None = None,
        log_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        radius = radius if isinstance(radius, Tensor) else torch.as_tensor(radius, device="cpu")
        radius = radius.to(torch.promote_types(radius.dtype, torch.float32)).reshape(-1)
        if log_weights is None:
            log_weights = torch.zeros_like(radius)
        if radius.numel() == 0 or not bool(((radius > 0) & radius.isfinite()).all()):
            raise ValueError(f"radius is {radius.tolist()[:8]}; expected positive, finite numbers (R,)")
        if log_weights.shape != radius.shape or not bool(log_weights.logsumexp(-1).isfinite()):
            raise ValueError(
                f"log_weights has shape {tuple(log_weights.shape)}; expected {tuple(radius.shape)}, as radius has, "
                "and a finite sum of the weights"
            )
        self.register_buffer("radius", radius)
        self.register_buffer("log_weights", log_weights.log_softmax(-1))
        for name, part in Chart.of(loc, scale_tril, subspace)._asdict().items():
            self.register_buffer(name, part)

    # --- construction ---------------------------------------------------------------------------------------

    @classmethod
    def from_head(cls, head: Head, confidence: float = 0.95, ambient: bool = False) -> Sphere:
        """Make the sphere that a head implies without any data.

        At its radius the mean over classes of E[max_k p(k|h)], h ~ p(h|y), equals ``confidence``. It is found by
        bisection, with the same random numbers at each step. The sphere lies in span(W), the only part of the space
        that the softmax depends on. A head does not determine the true norm of activations, which can be far from this
        radius, in particular in high dimension. Use :meth:`fit` if you have at least one batch of activations.

        Args:
            head: The head.
            confidence: Mean confidence at the radius, between that of the biases alone and 1. The accuracy of the model
                is a good choice.
            ambient: Put the sphere in all of R^d and not in span(W). For a head with a folded norm layer this is the
                true support, and the radius is that of the norm layer.

        Raises:
            TypeError: ``confidence`` is not a number.
            ValueError: ``confidence`` cannot be reached, or two rows of the head are equal.

        Example:
            >>> head = Head(4 * torch.eye(3))
            >>> base = Sphere.from_head(head, confidence=0.9)
            >>> base.subspace.shape
            torch.Size([2, 3])
        """
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        if ambient and head.norm is not None:
            radius = torch.tensor([head.radius], dtype=dtype, device=head.weight.device)
            hyperplane = _zero_sum_basis(head.in_features).to(radius) if head.norm == "layer" else None
            return cls(radius, subspace=hyperplane)
        confidence = check_between("confidence", confidence)
        subspace = None if ambient else head.span().to(dtype)
        implied = torch.tensor([implied_radius(head, subspace, confidence)], dtype=dtype, device=head.weight.device)
        return cls(implied, subspace=subspace)

    @classmethod
    def fit(
        cls,
        head: Head,
        activations: Tensor | Activations,
        shape: Shape = "round",
        ambient: bool = True,
        shrinkage: Shrinkage = 0.02,
        radii: int = 256,
        trim: float = 0.0,
        group: ProcessGroup | None = None,
    ) -> Sphere:
        r"""Fit a sphere to unlabelled activations.

        Its radii r are quantiles of the observed distribution p(r) of radii, with weights
        ω(r) ∝ p(r) / Σ_y exp(b'_y + F(r ‖w'_y‖)), so that the radii of the pair have the observed distribution. Here
        w'_y and b'_y are the rows and biases of the head in the chart.

        Args:
            head: The head; its soft labels replace labels.
            activations: Activations (N, d), N ≥ 2, as a tensor or as `Activations`, which may be larger than memory.
            shape: ``"round"`` (around the origin), ``"centered"`` (around the centre of the label-free spherical
                Gaussian fit) or ``"elliptic"`` (centre and covariance of the full Gaussian fit).
            ambient: Whether the sphere lies in all of R^d, or in span(W) with the class-independent mean outside it.
            shrinkage: Fraction of the covariance that is replaced by a multiple of the identity (elliptic only), or
                ``"oas"`` for the fraction of oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero 2010), which
                follows from the number of activations and their covariance.
            radii: Largest number of radii.
            trim: Fraction of the activations that the fit leaves out (elliptic only): those with the least likely
                directions under the fit itself, which starts with the more likely half and grows. 0.2 protects outlier
                scores if one activation in ten is an outlier. The guide on outliers shows the cost if there are none.
            group: Processes of ``torch.distributed`` that share the work. Each makes the same call, reads its own part
                of ``activations``, and gets the same fit, equal to that of one process up to the rounding of sums.

        Raises:
            TypeError: ``activations`` is neither a floating tensor nor `Activations`, or an option is of a wrong type.
            ValueError: ``activations`` has too few rows or a wrong shape, is not finite or is constant; or an option is
                out of range.

        Example:
            >>> head = Head(torch.eye(3))
            >>> h = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
            >>> Sphere.fit(head, h, shape="elliptic", radii=64).radius.shape
            torch.Size([64])
        """
        check_choice("shape", shape, get_args(Shape))
        shrinkage, radii = check_shrinkage(shrinkage), check_integer("radii", radii)
        check_trim(trim)
        if trim and shape != "elliptic":
            raise ValueError(f"trim is {trim} with shape={shape!r}; expected shape='elliptic', or trim=0")
        source = _ActivationSource(activations, head, min_rows=2, group=group)
        dtype = torch.promote_types(head.weight.dtype, torch.float32)

        if trim:
            source = typical_rows(head, source, trim, shrinkage, ambient)
        chart, radius, log_weights = fit_sphere(head, source, shape, ambient, shrinkage, radii)
        base = cls(radius, log_weights=log_weights, **chart._asdict()).to(head.weight.device, dtype)
        base.reference = source.digest
        return base

    # --- methods of every base ------------------------------------------------------------------------------

    @property
    def info(self) -> BaseInfo:
        """Facts about this measure."""
        kind = "elliptic sphere" if self.scale_tril is not None else "sphere"
        space = "the subspace" if self.subspace is not None else "R^d"
        return BaseInfo(
            name=kind,
            reference="radial law x surface measure of the chart",
            support=f"{self.radius.numel()} concentric {kind}s in {space}",
            needs_data=False,
            exact_mgf=True,
            source="Seo, Lee, Kwak, UAI 2021; Mardia and Jupp, Directional Statistics, 2000",
        )

    @property
    def in_features(self) -> int | None:
        """Dimension d of activations; None for a sphere without a chart, which accepts any d ≥ 1."""
        return self._chart.in_features()

    def log_mgf(self, weight: Tensor) -> Tensor:
        """Return log M(w) for rows (*B, d): (*B,)."""
        self._check_features(weight, "weight")
        rows = weight.reshape(-1, weight.shape[-1])
        step = max(1, _PAIRS // self.radius.numel())
        parts = []
        for block in rows.split(step):
            pulled, offset = self._chart.pull(block)
            norms = torch.linalg.vector_norm(pulled, dim=-1)
            parts.append(offset + self._log_radial(norms, block.shape[-1])[0])
        result = torch.cat(parts) if parts else rows.new_zeros(0)
        return result.reshape(weight.shape[:-1]).to(weight.dtype)

    def log_prob(self, h: Tensor) -> Tensor:
        """Return log m(h) = −log area − (m − 1) log r at the radius of h, (*S, d) → (*S,)."""
        m = self._chart.dim() or h.shape[-1]
        u = self.read(h)
        # Squares could overflow in the dtype of u.
        r = torch.linalg.vector_norm(u, dim=-1, dtype=special.working_dtype(u.device))
        return (-special.log_sphere_area(m) - ((m - 1) * r.log() if m > 1 else torch.zeros_like(r))).to(u.dtype)

    def project(self, h: Tensor) -> Tensor:
        """Return h without its deviation from ``loc`` outside the subspace, (*S, d)."""
        return self._chart.project(h)

    def read(self, h: Tensor) -> Tensor:
        """Return chart coordinates u = L⁻¹U(h − loc) of activations (*S, d): (*S, m)."""
        self._check_features(h, "h")
        return self._chart.read(h)

    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample for each i of ``index`` (N,) a radius, then a von Mises-Fisher direction around L'U weight[i]."""
        index = index_of(index)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        pulled, _ = self._chart.pull(weight.to(dtype))
        norms, mean = torch.linalg.vector_norm(pulled, dim=-1), unit(pulled)
        radius = self.radius.to(dtype)
        if radius.numel() == 1:
            r = radius.expand(index.shape)
        else:
            # The cumulative weights of row b, plus b, form one sorted table in which b + uniform is looked up.
            share = self._log_radial(norms, weight.shape[-1])[1].softmax(-1)
            table = share.cumsum(-1).clamp_max(1) + torch.arange(len(share), device=index.device).unsqueeze(-1)
            key = index + torch.rand(index.shape, dtype=table.dtype, device=index.device, generator=generator)
            r = radius[
                (torch.searchsorted(table.reshape(-1), key) - index * radius.numel()).clamp(0, radius.numel() - 1)
            ]
        one_row = len(weight) == 1
        y = _cosine_complement(mean.shape[-1], r * (norms if one_row else norms[index]), dtype, generator)
        u = _around(mean[0] if one_row else mean[index], y, generator) * r.unsqueeze(-1)
        return self._chart.push(u).to(weight.dtype)

    def radial_law(self, weight: Tensor) -> Tensor:
        """Return the probability (B, R) of each radius r under the tilts by rows w (B, d), ∝ ω_r exp(F(r ‖L'U w‖))."""
        self._check_features(weight, "weight")
        return self._log_radial(self._norms(weight), weight.shape[-1])[1].softmax(-1).to(weight.dtype)

    def seen(self, head: Head) -> tuple[int, Tensor, Tensor]:
        """Return m, and the row norms ‖L'U w_y‖ (K,) and biases b_y + w_y·loc (K,) of a centered head in the chart."""
        return self._chart.seen(head)

    def seen_dim(self, head: Head) -> int:
        """Return the dimension m of the chart, or d of a head if there is no chart."""
        return self._chart.dim() or head.in_features

    def radial_table(self, head: Head) -> Tensor:
        """Return a table of the total mass of a head's classes by radius, for :meth:`direction_log_prob`."""
        return radial_table(*self.seen(head))

    def direction_log_prob(self, head: Head, h: Tensor, table: Tensor) -> Tensor:
        r"""Return the log density of the direction of u at its radius, log p(u / r | r), (*S, d) → (*S,).

        .. math:: \log p(u / r | r) = \log \sum_y e^{w_y \cdot h + b_y} - \log \sum_y e^{b'_y + F_m(r \|w'_y\|)}
                  - \log \mathrm{area}(S^{m-1})

        The density refers to the surface measure of the unit sphere in the chart, and does not depend on the radii of
        the base. The rows w'_y and biases b'_y are those of the head in the chart.

        Args:
            head: The head of the pair.
            h: Activations (*S, d), as :meth:`project` returns them.
            table: From :meth:`radial_table`.
        """
        return direction_log_prob(head, h, self.read(h), table)

    def kappa(self, weight: Tensor) -> Tensor:
        """Return the concentration κ = r ‖L'U w‖ of the tilts by rows (B, d) at each radius, (B, R)."""
        self._check_features(weight, "weight")
        return self._norms(weight).unsqueeze(-1) * self.radius.to(weight.dtype)

    def cosine(self, h: Tensor, weight: Tensor) -> Tensor:
        """Return the cosine of activations to rows in the chart, u·w' / (‖u‖ ‖w'‖): (N, d), (N, d) → (N,)."""
        self._check_features(weight, "weight")
        pulled, _ = self._chart.pull(weight)
        u = self.read(special.in_range(h))
        cosine: Tensor = torch.cosine_similarity(u, pulled.to(u.dtype), dim=-1)
        return cosine.to(torch.promote_types(h.dtype, torch.float32))

    def quadrature(self, nodes: int) -> tuple[Tensor, Tensor] | None:
        """Return a product rule on the spheres of all radii, in chart dimension 3 or less."""
        m = self._chart.dim()
        if m is None or m > 3:
            return None
        turn = 2 * math.pi * torch.arange(nodes, dtype=torch.float64, device="cpu") / nodes
        circle = torch.stack([turn.cos(), turn.sin()], dim=-1)
        if m == 1:
            unit, log_area = torch.tensor([[1.0], [-1.0]], device="cpu").double(), torch.zeros(2, device="cpu").double()
        elif m == 2:
            unit, log_area = (
                circle,
                torch.full((nodes,), math.log(2 * math.pi / nodes), dtype=torch.float64, device="cpu"),
            )
        else:
            x, weight = (
                torch.tensor(a, dtype=torch.float64, device="cpu")
                for a in zip(*special.gauss_legendre(nodes), strict=True)
            )
            t = (2 * x - 1).unsqueeze(-1).expand(-1, nodes).unsqueeze(-1)
            ring = circle.expand(nodes, nodes, 2) * (1 - t * t).sqrt()
            unit = torch.cat([t, ring], dim=-1).reshape(-1, 3)
            log_area = (2 * weight * 2 * math.pi / nodes).log().repeat_interleave(nodes)
        radius, log_weights = self.radius.cpu().double(), self.log_weights.cpu().double()
        points = unit * radius[:, None, None]
        logs = log_area + (log_weights + (m - 1) * radius.log()).unsqueeze(-1)
        device = self.radius.device
        h = self._chart.push(points.reshape(-1, m).to(self.radius))
        return h, logs.reshape(-1).to(device, special.working_dtype(device))

    def extra_repr(self) -> str:
        """Return radii and chart, for ``print``."""
        low, high = float(self.radius.min()), float(self.radius.max())
        parts = [
            f"radius={low:.4g}"
            if self.radius.numel() == 1
            else f"radii={self.radius.numel()} in [{low:.4g}, {high:.4g}]"
        ]
        parts += [f"{name}={tuple(part.shape)}" for name, part in self._chart._asdict().items() if part is not None]
        return ", ".join(parts)

    # --- the chart ------------------------------------------------------------------------------------------

    @property
    def _chart(self) -> Chart:
        return Chart(self.loc, self.scale_tril, self.subspace)

    def _norms(self, weight: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._chart.pull(weight)[0], dim=-1)
        return norms

    def _log_radial(self, norms: Tensor, features: int) -> tuple[Tensor, Tensor]:
        """Return log Σ_r ω_r e^{F(r ρ)} for norms ρ (B,), and its terms (B, R), in working precision."""
        work = special.working_dtype(norms.device)
        m = self._chart.dim() or features
        growth = special.log_sphere_mgf(m, norms.to(work).unsqueeze(-1) * self.radius.to(work))
        terms = self.log_weights.to(work) + growth
        return terms.logsumexp(-1), terms


def _zero_sum_basis(d: int) -> Tensor:
    """Return orthonormal rows (d − 1, d) of the hyperplane Σ h = 0 (those of Helmert)."""
    i = torch.arange(1, d, dtype=torch.float64, device="cpu")
    rows = torch.tril(torch.ones(d - 1, d, dtype=torch.float64, device="cpu"))
    rows[torch.arange(d - 1, device="cpu"), torch.arange(1, d, device="cpu")] = -i
    return rows / (i * (i + 1)).sqrt().unsqueeze(-1)
