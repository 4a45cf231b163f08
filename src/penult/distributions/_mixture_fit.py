"""How a Gaussian mixture in principal components is fitted to rows: by maximisation, or from class probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from penult.distributions._positive import NEXT_TO_ZERO, unsquare
from penult.distributions._principal_components import Rows
from penult.processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Components",
    "Fitted",
    "Prior",
    "by_maximisation",
    "by_posterior",
    "maximise",
    "of_responsibilities",
    "start",
]

_SAMPLE = 1 << 14  # rows that the start is found on, where there are more
_SOFTNESS = 0.01  # of the mean of a coordinate; where that is 0, of a hundredth of the mean of all
_STRENGTH = 0.5  # rows that the prior of a covariance counts for, for each dimension, see PrincipalMixture.fit
_ROWS = 20  # for each component, at least


class Fitted(NamedTuple):
    """Parameters of a `PrincipalMixture`, by their names, in the dtype and on the device of a law of the rows."""

    loc: Tensor
    components: Tensor
    logits: Tensor
    means: Tensor
    scale_tril: Tensor
    residual_scale: Tensor
    softness: Tensor | None


def by_maximisation(
    activations: Tensor | Iterable[Tensor],
    components: int,
    dims: int,
    rectified: bool,
    positive: bool,
    seed: int,
    iterations: int,
    tolerance: float,
    group: ProcessGroup | None,
) -> Fitted:
    """Principal components, then expectation maximisation in them; arguments and errors as `PrincipalMixture.fit`."""
    for name, number in (("components", components), ("dims", dims), ("iterations", iterations)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    rows, softness = _read(activations, rectified, positive, Processes(group))
    plane, across = rows.plane(dims)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.arange(rows.count)
    if rows.count > _SAMPLE:
        sample = torch.randint(rows.count, (_SAMPLE,), generator=generator).unique()
    projected = rows.project(plane)
    first = projected.take(sample)
    mixture, prior = start(first, min(components, max(1, rows.count // _ROWS)), _STRENGTH * len(plane), generator)
    # Machines round differently, and a start that differs in the last digit may end elsewhere.
    mixture, prior = rows.processes.first((mixture, prior))
    mixture = Components(*(part.to(rows.work) for part in mixture))
    prior = Prior(prior.covariance.to(rows.work), prior.strength)
    mixture, _ = maximise(mixture, prior, lambda: projected, iterations, tolerance, rows.processes)
    return _fitted(rows, plane, across, mixture, softness)


def by_posterior(
    activations: Tensor | Iterable[Tensor],
    posterior: Callable[[Tensor], Tensor],
    dims: int,
    rectified: bool,
    positive: bool,
    group: ProcessGroup | None,
) -> Fitted:
    """One component a class, in closed form; arguments and errors as `PrincipalMixture.from_posterior`."""
    if isinstance(dims, bool) or not isinstance(dims, int) or dims < 1:
        raise ValueError(f"dims must be a positive integer, got {dims!r}")
    rows, softness = _read(activations, rectified, positive, Processes(group))
    plane, across = rows.plane(dims)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in rows.given():
            p = posterior(batch)
            if p.dim() != 2 or len(p) != len(batch):
                raise ValueError(f"posterior gave {tuple(p.shape)} for {len(batch)} rows; expected (n, C)")
            yield (rows.wide(batch) - rows.mean) @ plane.mT, p.detach().to(plane)

    mixture = of_responsibilities(parts(), _STRENGTH * len(plane), rows.processes)
    return _fitted(rows, plane, across, mixture, softness)


def _read(
    activations: Tensor | Iterable[Tensor], rectified: bool, positive: bool, processes: Processes
) -> tuple[Rows, Tensor | None]:
    """The rows x that a law of h = activations is fitted to, and its softness."""
    rows = Rows(activations, processes=processes)
    if not positive:
        return rows, None
    if rectified:
        raise ValueError("a law is rectified or positive, not both")
    least, mean = min((float(batch.min()) for batch in rows.given() if len(batch)), default=math.inf), rows.mean
    least = processes.least(least)
    if least < 0 or not bool((mean > 0).any()):
        raise ValueError(f"positive=True is for activations that are not negative; the least of these is {least:.4g}")
    b = _SOFTNESS * torch.where(mean > 0, mean, 0.01 * mean.mean())
    return Rows(activations, lambda h: unsquare(torch.maximum(h, NEXT_TO_ZERO * b), b)[0], processes), b


def _fitted(rows: Rows, plane: Tensor, across: float, mixture: Components, softness: Tensor | None) -> Fitted:
    dtype = torch.promote_types(rows.dtype, torch.float32)

    def cast(part: Tensor) -> Tensor:
        return part.to(dtype).to(rows.device)

    return Fitted(
        cast(rows.mean),
        cast(plane),
        cast(mixture.logits.log_softmax(-1)),
        cast(mixture.means),
        cast(mixture.scale_tril),
        torch.tensor(across, dtype=dtype, device=rows.device),
        None if softness is None else cast(softness),
    )


# --- Maximum a posteriori fit of a Gaussian mixture, as sums over batches -----------------------------------
# The sufficient statistics of a Gaussian are t(u) = (u_i u_j for i ≥ j, u_i, 1), and its log density is linear in
# them. So the E-step is one matrix product, t(u) with the natural parameters of all components, and what the M-step
# needs is another, the responsibilities with t(u). Nothing of size samples × components × dimensions is formed.
# Products and sums are float64: the quadratic form of a component far from the origin cancels.
#
# The covariances have an inverse-Wishart prior, worth ``strength`` samples of covariance Ψ,
#
#     log p(Σ) = −½ ν [log|Σ| + tr(Ψ Σ⁻¹)] + const,  which makes  Σ_c = (S_c + ν Ψ) / (N_c + ν)
#
# (Fraley and Raftery, "Bayesian Regularization for Normal Mixture Estimation and Model-Based Clustering", 2007).


_ELEMENTS = 1 << 21  # of statistics and responsibilities handled at a time
_LLOYD = 10  # rounds of k-means before the first M-step


class Components(NamedTuple):
    """A mixture: log weights (C,), means (C, m) and Cholesky factors (C, m, m), all float64."""

    logits: Tensor
    means: Tensor
    scale_tril: Tensor


class Prior(NamedTuple):
    """What the covariances are drawn to: Ψ (m, m), float64, and the number of samples ν it counts for."""

    covariance: Tensor
    strength: float


def start(points: Tensor, components: int, strength: float, generator: torch.Generator) -> tuple[Components, Prior]:
    """A first mixture and the prior, from k-means on a sample.

    The centres start as those of k-means++ (Arthur and Vassilvitskii, "k-means++: The Advantages of Careful
    Seeding", 2007). Each coordinate is divided by the root of its standard deviation first, half way to equal
    scales: clusters differ in small coordinates too. The prior's Ψ is the covariance within the clusters, pooled.

    Args:
        points: A sample (n, m), float64.
        components: How many components, at most; fewer where fewer points are distinct.
        strength: ν of the prior.
        generator: Of the device of ``points``.

    Returns:
        The mixture and its prior.
    """
    spread = points.square().mean(0)
    scale = spread.clamp_min(1e-12 * spread.max()).pow(0.25)
    scaled = points / scale
    centres = _seeds(scaled, components, generator)
    for _ in range(_LLOYD):
        nearest = _nearest(scaled, centres)
        counts = nearest.bincount(minlength=len(centres)).to(points).unsqueeze(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, scaled)
        centres = torch.where(counts > 0, sums / counts, centres)
    nearest, centres = _nearest(scaled, centres), centres * scale
    off = points - centres[nearest]
    floor = torch.diag(1e-3 * spread.clamp_min(1e-12 * spread.max()))  # for clusters of one point each
    prior = Prior(off.mT @ off / len(points) + floor, strength)
    total = points.new_zeros(len(centres), _width(points.shape[-1]))
    for some, which in zip(
        _blocks(points, len(centres)), _blocks(nearest, len(centres), points.shape[-1]), strict=True
    ):
        total += torch.nn.functional.one_hot(which, len(centres)).to(points).mT @ _statistics(some)
    return _update(total, centres, prior), prior


def maximise(
    mixture: Components,
    prior: Prior,
    batches: Callable[[], Iterable[Tensor]],
    iterations: int,
    tolerance: float,
    processes: Processes,
) -> tuple[Components, list[float]]:
    """Expectation maximisation (Dempster, Laird and Rubin, 1977) of log likelihood plus log prior.

    Args:
        mixture: Where to start.
        prior: On the covariances.
        batches: Gives the points again at each call, (n, m) float64 at a time.
        iterations: Updates, at least one, at most this many.
        tolerance: An update that gains less than this, per point, is the last.
        processes: Those whose points these are.

    Returns:
        The mixture, without the components that hold less than half a point, and the objective per point of the
        mixture before each update: it never decreases but by rounding.
    """
    history: list[float] = []
    counts = mixture.logits.exp()
    for _ in range(iterations):
        natural = _natural(mixture)
        total, likelihood, seen = torch.zeros_like(natural), 0.0, 0
        for batch in batches():
            for points in _blocks(batch, len(natural)):
                statistics = _statistics(points)
                joint = statistics @ natural.mT
                evidence = joint.logsumexp(-1, keepdim=True)
                total += (joint - evidence).exp_().mT @ statistics
                likelihood += float(evidence.sum())
                seen += len(points)
        total = processes.sum(total)
        objective = processes.total(likelihood) + _log_prior(mixture, prior)
        history.append(objective / processes.total(seen))
        mixture, counts = _update(total, mixture.means, prior), total[:, -1]
        if len(history) > 1 and history[-1] - history[-2] < tolerance:
            break
    kept = counts >= 0.5
    return Components(*(part[kept] for part in mixture)), history


def of_responsibilities(parts: Iterable[tuple[Tensor, Tensor]], strength: float, processes: Processes) -> Components:
    """One M-step with given responsibilities, under a prior of the covariance within components, pooled.

    Args:
        parts: Points (n, m) and responsibilities (n, C), float64, some at a time.
        strength: ν of the prior.
        processes: Those whose points these are.

    Returns:
        The mixture, without the components that hold less than 1e-6 of a point.
    """
    total: Tensor | None = None
    for points, responsibilities in parts:
        for some, theirs in zip(
            _blocks(points, responsibilities.shape[-1]),
            _blocks(responsibilities, responsibilities.shape[-1], points.shape[-1]),
            strict=True,
        ):
            part = theirs.mT @ _statistics(some)
            total = part if total is None else total + part
        dims = points.shape[-1]
    assert total is not None
    total = processes.sum(total)
    total = total[total[:, -1] >= 1e-6]
    counts, means, scatter = _moments(total, total.new_zeros(len(total), dims))
    pooled = scatter.sum(0) / counts.sum()
    variance = pooled.diagonal()
    # Of collapsed classes what is left within is rounding of sums about the origin.
    floor = 1e-12 * total[:, : -dims - 1].abs().sum() / counts.sum()
    pooled = pooled + torch.diag(1e-9 * variance.clamp_min(0) + floor)
    return _update(total, means, Prior(pooled, strength))


def _width(dims: int) -> int:
    return dims * (dims + 1) // 2 + dims + 1


def _blocks(points: Tensor, components: int, dims: int | None = None) -> Sequence[Tensor]:
    width = _width(points.shape[-1] if dims is None else dims)
    blocks: Sequence[Tensor] = points.split(max(1, _ELEMENTS // (width + 2 * components)))
    return blocks


def _statistics(points: Tensor) -> Tensor:
    """t(u) for points (n, m): (n, m(m+1)/2 + m + 1)."""
    rows, columns = torch.tril_indices(points.shape[-1], points.shape[-1], device=points.device)
    return torch.cat([points[:, rows] * points[:, columns], points, points.new_ones(len(points), 1)], dim=-1)


def _natural(mixture: Components) -> Tensor:
    """The log density of each component with its weight, as coefficients of t(u): (C, m(m+1)/2 + m + 1)."""
    m = mixture.means.shape[-1]
    precision = torch.cholesky_inverse(mixture.scale_tril)
    pulled = (precision @ mixture.means.unsqueeze(-1)).squeeze(-1)
    rows, columns = torch.tril_indices(m, m, device=pulled.device)
    quadratic = precision[:, rows, columns] * torch.where(rows == columns, -0.5, -1.0).to(pulled)
    constant = (
        mixture.logits
        - 0.5 * ((pulled * mixture.means).sum(-1) + m * math.log(2 * math.pi))
        - mixture.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    )
    return torch.cat([quadratic, pulled, constant.unsqueeze(-1)], dim=-1)


def _update(total: Tensor, means: Tensor, prior: Prior) -> Components:
    """The M-step; a component without points keeps its mean, and has weight 0 and the prior's covariance."""
    counts, means, scatter = _moments(total, means)
    covariance = (scatter + prior.strength * prior.covariance) / (counts + prior.strength)[:, None, None]
    return Components((counts / counts.sum()).log(), means, torch.linalg.cholesky(covariance))


def _moments(total: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (C,), means (C, m), those given where there are no points, and scatter about them (C, m, m)."""
    m = means.shape[-1]
    counts = total[:, -1]
    held = (counts > 1e-100).unsqueeze(-1)
    safe = torch.where(held, counts.unsqueeze(-1), 1.0)
    means = torch.where(held, total[:, -m - 1 : -1] / safe, means)
    rows, columns = torch.tril_indices(m, m, device=total.device)
    second = total.new_zeros(len(total), m, m)
    second[:, rows, columns] = total[:, : -m - 1]
    second[:, columns, rows] = total[:, : -m - 1]
    return counts, means, second - counts[:, None, None] * means.unsqueeze(-1) * means.unsqueeze(-2)


def _log_prior(mixture: Components, prior: Prior) -> float:
    log_det = 2 * mixture.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum()
    trace = (torch.cholesky_inverse(mixture.scale_tril) * prior.covariance).sum()
    return -0.5 * prior.strength * float(log_det + trace)


def _seeds(points: Tensor, components: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(points), (1,), generator=generator, device=points.device)
    nearest = (points - points[chosen]).square().sum(-1)
    picks = [chosen]
    while len(picks) < components and bool(nearest.max() > 0):
        picks.append(torch.multinomial(nearest, 1, generator=generator))
        nearest = torch.minimum(nearest, (points - points[picks[-1]]).square().sum(-1))
    return points[torch.cat(picks)]


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The index of the nearest centre of each point, (n,)."""
    half = 0.5 * centres.square().sum(-1)
    return torch.cat([(half - some @ centres.mT).argmin(-1) for some in _blocks(points, len(centres))])
