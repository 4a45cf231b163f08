"""The sphere: von Mises-Fisher activations, as they are or through a chart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penult import special
from penult.activations import Activations, _ActivationSource
from penult.bases._chart import Chart
from penult.bases._implied_radius import implied_radius, unit
from penult.bases._radial import log_mass_at, radial_table
from penult.bases._sphere_fit import Shape, fit_sphere, trimmed
from penult.bases.base import Base, BaseInfo
from penult.distributions import _around, _cosine_complement
from penult.head import Head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Sphere"]

_PAIRS = 1 << 20  # (row, radius) pairs evaluated at a time


class Sphere(Base):
    r"""Uniform measure on concentric spheres, seen through a chart h = loc + U'L u, ‖u‖ = r.

    Its tilts are von Mises-Fisher in u: with w' = L'U w, κ = r ‖w'‖ and

    .. math:: M(w) &= e^{w \cdot loc} \sum_r \omega_r e^{F_m(r \|w'\|)}, \\
              \log p(h|w) &= w' \cdot u - \log \sum_r \omega_r e^{F_m(r\|w'\|)}
              - \log \mathrm{area}(S^{m-1}) - (m-1) \log r .

    Densities refer to ω(dr) × the surface measure of radius r in the chart's m dimensions, and are evaluated
    for every h at its own radius: radii need not be atoms, and parts of h outside the subspace are dropped.
    ``Sphere(radius)`` is the base of Seo, Lee and Kwak ("On The Distribution of Penultimate Activations of
    Classification Networks", UAI 2021). In one dimension the sphere is two points.

    Args:
        radius: Radii (R,) or a number, positive.
        loc: Centre (d,); its part outside the subspace is the class-independent mean. Zero when left out.
        scale_tril: Lower triangular L (m, m) with positive diagonal. The identity when left out.
        subspace: Orthonormal rows U (m, d). The whole space when left out.
        log_weights: Log weights log ω (R,), normalised here. Equal when left out.

    Raises:
        ValueError: If a shape does not fit, a radius is not positive and finite, rows of ``subspace`` are not
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
        radius = torch.as_tensor(radius)
        radius = radius.to(torch.promote_types(radius.dtype, torch.float32)).reshape(-1)
        if log_weights is None:
            log_weights = torch.zeros_like(radius)
        if radius.numel() == 0 or not bool(((radius > 0) & radius.isfinite()).all()):
            raise ValueError(f"radius must hold positive, finite numbers (R,); got {radius.tolist()[:8]}")
        if log_weights.shape != radius.shape or not bool(log_weights.logsumexp(-1).isfinite()):
            raise ValueError(
                f"log_weights must have the shape {tuple(radius.shape)} of radius and a finite sum of weights; "
                f"got {tuple(log_weights.shape)}"
            )
        self.register_buffer("radius", radius)
        self.register_buffer("log_weights", log_weights.log_softmax(-1))
        for name, part in Chart.of(loc, scale_tril, subspace)._asdict().items():
            self.register_buffer(name, part)

    # --- construction ---------------------------------------------------------------------------------------

    @classmethod
    def from_head(cls, head: Head, confidence: float = 0.95, ambient: bool = False) -> Sphere:
        """The sphere that a head implies without any data.

        Its radius is the one at which the uniform mean over classes of E[max_k p(k|h)], h ~ p(h|y), equals
        ``confidence``: by bisection, with the same random numbers at each step. It lies in span(W), the only
        part of space that the softmax sees. The radius is not identifiable from a head alone and can be far
        from the true norm, the more so in high dimension; with even one batch of activations use :meth:`fit`.

        Args:
            head: The head.
            confidence: Mean confidence to reach, between that of the biases alone and 1. The known accuracy of
                the model is a good choice.
            ambient: Put the sphere in all of R^d rather than in span(W). For a head whose normalisation was
                folded this is the true support, and the radius is the norm's own, not sought.

        Raises:
            ValueError: If ``confidence`` cannot be reached, or two rows of the head are equal.

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
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
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
        shrinkage: float = 0.02,
        radii: int = 256,
        trim: float = 0.0,
        group: ProcessGroup | None = None,
    ) -> Sphere:
        r"""The sphere closest to unlabelled activations.

        The observed law of radii p(r) becomes the radial law: quantile atoms with weights
        ω(r) ∝ p(r) / Σ_y exp(b'_y + F(r ‖w'_y‖)), so that the pair's own marginal of r is the observed one.

        Args:
            head: The head; its soft labels take the place of labels.
            activations: Activations (N, d), N ≥ 2, as a tensor or as `Activations`, which may be larger than memory.
            shape: ``"round"`` (about the origin), ``"centered"`` (about the centre of the label-free spherical
                Gaussian fit) or ``"elliptic"`` (centre and covariance of the full one).
            ambient: In all of R^d, or in span(W) with the class-independent mean outside it.
            shrinkage: Share of the covariance replaced by a multiple of the identity (elliptic only).
            radii: How many radii to keep at most.
            trim: Share of the activations that the fit leaves out (elliptic only): those of the strangest direction
                by the fit itself, which begins with the less strange half and grows. 0.2 makes outlier scores
                survive activations of which every tenth is an outlier; see the guide on outliers for what it
                costs where there are none.
            group: Processes of ``torch.distributed`` that share the work. Each calls with the same arguments, reads its
                own part of ``activations``, and gets the same fit, that of one process to rounding of sums.

        Raises:
            TypeError: If ``activations`` is not a floating tensor.
            ValueError: If ``activations`` is empty, has a wrong shape, is not finite or constant, or an option
                is unknown.

        Example:
            >>> head = Head(torch.eye(3))
            >>> h = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
            >>> Sphere.fit(head, h, shape="elliptic", radii=64).radius.shape
            torch.Size([64])
        """
        if shape not in ("round", "centered", "elliptic"):
            raise ValueError(f"shape must be 'round', 'centered' or 'elliptic'; got {shape!r}")
        if not 0 <= shrinkage <= 1 or radii < 1:
            raise ValueError(f"shrinkage must lie in [0, 1] and radii be at least 1; got {shrinkage} and {radii}")
        if not 0 <= trim < 0.5 or (trim and shape != "elliptic"):
            raise ValueError(f"trim must lie in [0, 0.5), and needs shape='elliptic'; got {trim} with {shape!r}")
        source = _ActivationSource(activations, head, min_rows=2, group=group)
        dtype = torch.promote_types(head.weight.dtype, torch.float32)

        def fitted(part: _ActivationSource, radii: int) -> Sphere:
            chart, radius, log_weights = fit_sphere(head, part, shape, ambient, shrinkage, radii)
            return cls(radius, log_weights=log_weights, **chart._asdict()).to(head.weight.device, dtype)

        if trim:

            def strangeness(part: _ActivationSource) -> Callable[[Tensor], Tensor]:
                base = fitted(part, radii=1)
                table = radial_table(*base.seen(head), halvings=0)  # ranks need no more
                return lambda rows: -base.direction_log_prob(head, base.project(rows.to(dtype)), table)

            source = trimmed(source, trim, strangeness)
        return fitted(source, radii)

    # --- the base's contract --------------------------------------------------------------------------------

    @property
    def info(self) -> BaseInfo:
        """Facts about this measure."""
        kind = "elliptic sphere" if self.scale_tril is not None else "sphere"
        place = "the subspace" if self.subspace is not None else "R^d"
        return BaseInfo(
            name=kind,
            reference="radial law x surface measure of the chart",
            support=f"{self.radius.numel()} concentric {kind}s in {place}",
            needs_data=False,
            exact_mgf=True,
            source="Seo, Lee, Kwak, UAI 2021; Mardia and Jupp, Directional Statistics, 2000",
        )

    @property
    def in_features(self) -> int | None:
        """The dimension d of activations; None without a chart, when any d ≥ 1 serves."""
        return self._chart.in_features()

    def log_mgf(self, weight: Tensor) -> Tensor:
        """Log M(w) for rows (*B, d), shape (*B,)."""
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
        """Log m(h) = −log area − (m − 1) log r at h's own radius, (*S, d) → (*S,)."""
        m = self._chart.dim() or h.shape[-1]
        u = self.read(h)
        r = torch.linalg.vector_norm(u, dim=-1, dtype=special.working_dtype(u.device))  # squares could overflow
        return (-special.log_sphere_area(m) - ((m - 1) * r.log() if m > 1 else torch.zeros_like(r))).to(u.dtype)

    def project(self, h: Tensor) -> Tensor:
        """H without its deviation from ``loc`` outside the subspace, (*S, d)."""
        return self._chart.project(h)

    def read(self, h: Tensor) -> Tensor:
        """Chart coordinates u = L⁻¹U(h − loc) of activations (*S, d), shape (*S, m)."""
        self._check_features(h, "h")
        return self._chart.read(h)

    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """One activation for each i of ``index`` (N,): a radius, then von Mises-Fisher around L'U weight[i]."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        pulled, _ = self._chart.pull(weight.to(dtype))
        norms, mean = torch.linalg.vector_norm(pulled, dim=-1), unit(pulled)
        radius = self.radius.to(dtype)
        if radius.numel() == 1:
            r = radius.expand(index.shape)
        else:
            # One sorted table of all rows' cumulative weights, row b shifted by b: a look-up of b + uniform.
            share = self._log_radial(norms, weight.shape[-1])[1].softmax(-1)
            table = share.cumsum(-1).clamp_max(1) + torch.arange(len(share), device=index.device).unsqueeze(-1)
            key = index + torch.rand(index.shape, dtype=table.dtype, device=index.device, generator=generator)
            r = radius[
                (torch.searchsorted(table.reshape(-1), key) - index * radius.numel()).clamp(0, radius.numel() - 1)
            ]
        alone = len(weight) == 1
        y = _cosine_complement(mean.shape[-1], r * (norms if alone else norms[index]), dtype, generator)
        u = _around(mean[0] if alone else mean[index], y, generator) * r.unsqueeze(-1)
        return self._chart.push(u).to(weight.dtype)

    def radial_law(self, weight: Tensor) -> Tensor:
        """The share of each radius under the tilts by rows (B, d): ω_r e^{F(r ρ)}, normalised, (B, R)."""
        self._check_features(weight, "weight")
        return self._log_radial(self._norms(weight), weight.shape[-1])[1].softmax(-1).to(weight.dtype)

    def seen(self, head: Head) -> tuple[int, Tensor, Tensor]:
        """A head in the chart: its dimension m, norms ‖L'U w_y‖ (K,) of the centered rows, and b_y + w_y·loc (K,)."""
        return self._chart.seen(head)

    def seen_dim(self, head: Head) -> int:
        """The dimension m of the chart, d of a head where there is none."""
        return self._chart.dim() or head.in_features

    def radial_table(self, head: Head) -> Tensor:
        """The mass that a head's classes put at each radius, for :meth:`direction_log_prob`."""
        return radial_table(*self.seen(head))

    def direction_log_prob(self, head: Head, h: Tensor, table: Tensor) -> Tensor:
        r"""Log density of the direction of u at its own radius, log p(u / r | r), (*S, d) → (*S,).

        .. math:: \log p(u / r | r) = \log \sum_y e^{w_y \cdot h + b_y} - \log \sum_y e^{b'_y + F_m(r \|w'_y\|)}
                  - \log \mathrm{area}(S^{m-1})

        It is relative to the surface measure of the unit sphere in the chart, and no radial law enters.

        Args:
            head: The head of the pair.
            h: Activations (*S, d), as :meth:`project` gives them.
            table: From :meth:`radial_table`.
        """
        u = self.read(h)
        mass = log_mass_at(table, torch.linalg.vector_norm(u, dim=-1)) + special.log_sphere_area(u.shape[-1])
        return (_log_partition(head, h).to(mass.dtype) - mass).to(u.dtype)

    def kappa(self, weight: Tensor) -> Tensor:
        """The concentration κ = r ‖L'U w‖ of the tilts by rows (B, d) at each radius, (B, R)."""
        self._check_features(weight, "weight")
        return self._norms(weight).unsqueeze(-1) * self.radius.to(weight.dtype)

    def cosine(self, h: Tensor, weight: Tensor) -> Tensor:
        """The cosine of activations to rows in the chart, u·w' / (‖u‖ ‖w'‖): (N, d), (N, d) → (N,)."""
        self._check_features(weight, "weight")
        pulled, _ = self._chart.pull(weight)
        u = self.read(h)
        cosine: Tensor = torch.cosine_similarity(u, pulled.to(u.dtype), dim=-1)
        return cosine

    def quadrature(self, nodes: int) -> tuple[Tensor, Tensor] | None:
        """A product rule on the sphere in chart dimension at most 3, at every radius."""
        m = self._chart.dim()
        if m is None or m > 3:
            return None
        turn = 2 * math.pi * torch.arange(nodes, dtype=torch.float64) / nodes
        circle = torch.stack([turn.cos(), turn.sin()], dim=-1)
        if m == 1:
            unit, log_area = torch.tensor([[1.0], [-1.0]]).double(), torch.zeros(2).double()
        elif m == 2:
            unit, log_area = circle, torch.full((nodes,), math.log(2 * math.pi / nodes), dtype=torch.float64)
        else:
            x, weight = (torch.tensor(a, dtype=torch.float64) for a in zip(*special.gauss_legendre(nodes), strict=True))
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
        """Radii and chart, for ``print``."""
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
        """Log Σ_r ω_r e^{F(r ρ)} for norms ρ (B,), and its terms (B, R), in working precision."""
        work = special.working_dtype(norms.device)
        m = self._chart.dim() or features
        growth = special.log_sphere_mgf(m, norms.to(work).unsqueeze(-1) * self.radius.to(work))
        terms = self.log_weights.to(work) + growth
        return terms.logsumexp(-1), terms


def _log_partition(head: Head, h: Tensor) -> Tensor:
    """The log-sum of exponentiated centered logits of activations (*S, d), (*S,)."""
    if h.dtype != head.weight.dtype:
        return head.centered_logits(h).logsumexp(-1)
    log_sum: Tensor = head(h).logsumexp(-1)  # centering it takes a number a row, centering the logits K
    return log_sum - (h @ head.mean_row.to(h.dtype))


def _zero_sum_basis(d: int) -> Tensor:
    """Orthonormal rows (d − 1, d) of the hyperplane Σ h = 0 (Helmert's)."""
    i = torch.arange(1, d, dtype=torch.float64)
    rows = torch.tril(torch.ones(d - 1, d, dtype=torch.float64))
    rows[torch.arange(d - 1), torch.arange(1, d)] = -i
    return rows / (i * (i + 1)).sqrt().unsqueeze(-1)
