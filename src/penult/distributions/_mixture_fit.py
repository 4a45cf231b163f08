"""Fit of a Gaussian mixture in principal components: by expectation maximisation, or from class probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from penult._checks import check_integer, check_not_negative, check_seed
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

# Number of rows that the start is computed from, at most.
_START_ROWS = 1 << 14
# Softness as a fraction of the mean of a coordinate, or of a hundredth of the mean of all coordinates if that is 0.
_SOFTNESS = 0.01
# Weight of the prior of a covariance in rows for each dimension, see PrincipalMixture.fit.
_STRENGTH = 0.5
# Smallest number of rows for each component.
_ROWS_PER_COMPONENT = 20


class Fitted(NamedTuple):
    """Parameters of a `PrincipalMixture` by name, with the device of the rows and their dtype, at least float32."""

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
    """Fit by expectation maximisation in principal components; arguments and errors as `PrincipalMixture.fit`."""
    components, dims = check_integer("components", components), check_integer("dims", dims)
    iterations, tolerance = check_integer("iterations", iterations), check_not_negative("tolerance", tolerance)
    seed = check_seed(seed)
    rows, softness = _read(activations, rectified, positive, Processes(group))
    plane, across = rows.plane(dims)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.arange(rows.count, device="cpu")
    if rows.count > _START_ROWS:
        sample = torch.randint(rows.count, (_START_ROWS,), generator=generator, device="cpu").unique()
    projected = rows.project(plane)
    first = projected.take(sample)
    components = min(components, max(1, rows.count // _ROWS_PER_COMPONENT))
    mixture, prior = start(first, components, _STRENGTH * len(plane), generator)
    # Machines round differently, and starts that differ in the last digit may have different results.
    mixture, prior = rows.processes.first((mixture, prior))
    mixture = Components(*(part.to(rows.work) for part in mixture))
    prior = Prior(prior.covariance.to(rows.work), prior.strength)
    mixture, _ = maximise(mixture, prior, lambda: projected, iterations, tolerance, rows.processes)
    return _parameters(rows, plane, across, mixture, softness)


def by_posterior(
    activations: Tensor | Iterable[Tensor],
    posterior: Callable[[Tensor], Tensor],
    dims: int,
    rectified: bool,
    positive: bool,
    group: ProcessGroup | None,
) -> Fitted:
    """Fit one component for each class, in closed form; arguments and errors as `PrincipalMixture.from_posterior`."""
    dims = check_integer("dims", dims)
    rows, softness = _read(activations, rectified, positive, Processes(group))
    plane, across = rows.plane(dims)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in rows.given():
            p = posterior(batch)
            if p.dim() != 2 or len(p) != len(batch):
                raise ValueError(f"posterior has shape {tuple(p.shape)} for {len(batch)} rows; expected (n, C)")
            yield (rows.wide(batch) - rows.mean) @ plane.mT, p.detach().to(plane)

    mixture = of_responsibilities(parts(), _STRENGTH * len(plane), rows.processes)
    return _parameters(rows, plane, across, mixture, softness)


def _read(
    activations: Tensor | Iterable[Tensor], rectified: bool, positive: bool, processes: Processes
) -> tuple[Rows, Tensor | None]:
    """Return the rows x that a distribution of activations h is fitted to, and its softness."""
    rows = Rows(activations, processes=processes)
    if not positive:
        return rows, None
    if rectified:
        raise ValueError("rectified and positive are both True; expected at most one")
    minimum, mean = min((float(batch.min()) for batch in rows.given() if len(batch)), default=math.inf), rows.mean
    minimum = processes.least(minimum)
    if minimum < 0 or not bool((mean > 0).any()):
        raise ValueError(
            f"the smallest value of activations is {minimum:.4g}; positive=True expects values of at least 0, not all 0"
        )
    b = _SOFTNESS * torch.where(mean > 0, mean, 0.01 * mean.mean())
    return Rows(activations, lambda h: unsquare(torch.maximum(h, NEXT_TO_ZERO * b), b)[0], processes), b


def _parameters(rows: Rows, plane: Tensor, across: float, mixture: Components, softness: Tensor | None) -> Fitted:
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
# them. So the E-step is one matrix product, of t(u) with the natural parameters of all components, and the M-step is
# another, of the responsibilities with t(u). No tensor of size samples × components × dimensions is needed.
# Products and sums are float64, because of cancellation in the quadratic form of a component far from the origin.
#
# The covariances have an inverse-Wishart prior, with the weight of ``strength`` samples of covariance Ψ,
#
#     log p(Σ) = −½ ν [log|Σ| + tr(Ψ Σ⁻¹)] + const,  which makes  Σ_c = (S_c + ν Ψ) / (N_c + ν)
#
# (Fraley and Raftery, "Bayesian Regularization for Normal Mixture Estimation and Model-Based Clustering", 2007).


# Number of elements of statistics and responsibilities processed at a time.
_ELEMENTS = 1 << 21
# Iterations of k-means before the first M-step.
_K_MEANS_ITERATIONS = 10


class Components(NamedTuple):
    """A mixture: log weights (C,), means (C, m) and Cholesky factors (C, m, m), all float64."""

    logits: Tensor
    means: Tensor
    scale_tril: Tensor


class Prior(NamedTuple):
    """Prior of the covariances: Ψ (m, m), float64, and its weight ν in samples."""

    covariance: Tensor
    strength: float


def start(points: Tensor, components: int, strength: float, generator: torch.Generator) -> tuple[Components, Prior]:
    """Return a first mixture and the prior, from k-means on a sample.

    The first centres are chosen as in k-means++ (Arthur and Vassilvitskii, "k-means++: The Advantages of Careful
    Seeding", 2007). Each coordinate is first divided by the square root of its standard deviation, which makes scales
    more equal: clusters may differ in small coordinates too. Ψ of the prior is the pooled covariance within clusters.

    Args:
        points: A sample (n, m), float64.
        components: Number of components, at most; fewer if fewer points are distinct.
        strength: ν of the prior.
        generator: Generator of the device of ``points``.

    Returns:
        The mixture and its prior.
    """
    spread = points.square().mean(0)
    scale = spread.clamp_min(1e-12 * spread.max()).pow(0.25)
    scaled = points / scale
    centres = _seeds(scaled, components, generator)
    for _ in range(_K_MEANS_ITERATIONS):
        nearest = _nearest(scaled, centres)
        counts = nearest.bincount(minlength=len(centres)).to(points).unsqueeze(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, scaled)
        centres = torch.where(counts > 0, sums / counts, centres)
    nearest, centres = _nearest(scaled, centres), centres * scale
    deviations = points - centres[nearest]
    # If every cluster has one point, the deviations are zero.
    floor = torch.diag(1e-3 * spread.clamp_min(1e-12 * spread.max()))
    prior = Prior(deviations.mT @ deviations / len(points) + floor, strength)
    total = points.new_zeros(len(centres), _width(points.shape[-1]))
    for block, cluster in zip(
        _blocks(points, len(centres)), _blocks(nearest, len(centres), points.shape[-1]), strict=True
    ):
        total += torch.nn.functional.one_hot(cluster, len(centres)).to(points).mT @ _statistics(block)
    return _update(total, centres, prior), prior


def maximise(
    mixture: Components,
    prior: Prior,
    batches: Callable[[], Iterable[Tensor]],
    iterations: int,
    tolerance: float,
    processes: Processes,
) -> tuple[Components, list[float]]:
    """Maximise log likelihood plus log prior by expectation maximisation (Dempster, Laird and Rubin, 1977).

    Args:
        mixture: The mixture to start from.
        prior: Prior of the covariances.
        batches: Function that returns an iterable over all points, in batches (n, m) of float64.
        iterations: Largest number of updates, at least one.
        tolerance: Gain per point below which an update is the last.
        processes: Processes that share the points.

    Returns:
        The mixture, without components that hold less than half a point, and the objective per point of the mixture
        before each update, which decreases only by rounding.
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
    """Make one M-step with given responsibilities; the prior is the pooled covariance within components.

    Args:
        parts: Batches of points (n, m) and responsibilities (n, C), float64.
        strength: ν of the prior.
        processes: Processes that share the points.

    Returns:
        The mixture, without components that hold less than 1e-6 of a point.
    """
    total: Tensor | None = None
    for points, responsibilities in parts:
        for block, block_responsibilities in zip(
            _blocks(points, responsibilities.shape[-1]),
            _blocks(responsibilities, responsibilities.shape[-1], points.shape[-1]),
            strict=True,
        ):
            part = block_responsibilities.mT @ _statistics(block)
            total = part if total is None else total + part
        dims = points.shape[-1]
    assert total is not None
    total = processes.sum(total)
    total = total[total[:, -1] >= 1e-6]
    counts, means, scatter = _moments(total, total.new_zeros(len(total), dims))
    pooled = scatter.sum(0) / counts.sum()
    variance = pooled.diagonal()
    # If all classes have collapsed to points, the variance within them is rounding error of the sums.
    floor = 1e-12 * total[:, : -dims - 1].abs().sum() / counts.sum()
    pooled = pooled + torch.diag(1e-9 * variance.clamp_min(0) + floor)
    return _update(total, means, Prior(pooled, strength))


def _width(dims: int) -> int:
    """Return the number of entries of the statistics t(u), see `_statistics`."""
    return dims * (dims + 1) // 2 + dims + 1


def _blocks(points: Tensor, components: int, dims: int | None = None) -> Sequence[Tensor]:
    width = _width(points.shape[-1] if dims is None else dims)
    parts: Sequence[Tensor] = points.split(max(1, _ELEMENTS // (width + 2 * components)))
    return parts


def _statistics(points: Tensor) -> Tensor:
    """Return the sufficient statistics t(u) of points u (n, m): products u_i u_j, u and 1, (n, m(m+1)/2 + m + 1)."""
    rows, columns = torch.tril_indices(points.shape[-1], points.shape[-1], device=points.device)
    return torch.cat([points[:, rows] * points[:, columns], points, points.new_ones(len(points), 1)], dim=-1)


def _natural(mixture: Components) -> Tensor:
    """Return the log density of each component times its weight, as coefficients of t(u): (C, m(m+1)/2 + m + 1)."""
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
    """Make the M-step; a component without points keeps its mean, and has weight 0 and the prior's covariance."""
    counts, means, scatter = _moments(total, means)
    covariance = (scatter + prior.strength * prior.covariance) / (counts + prior.strength)[:, None, None]
    return Components((counts / counts.sum()).log(), means, torch.linalg.cholesky(covariance))


def _moments(total: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts (C,), means (C, m) and scatter about them (C, m, m); empty components keep the given means."""
    m = means.shape[-1]
    counts = total[:, -1]
    has_points = (counts > 1e-100).unsqueeze(-1)
    safe = torch.where(has_points, counts.unsqueeze(-1), 1.0)
    means = torch.where(has_points, total[:, -m - 1 : -1] / safe, means)
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
    """Choose the first centres as in k-means++."""
    chosen = torch.randint(len(points), (1,), generator=generator, device=points.device)
    nearest = (points - points[chosen]).square().sum(-1)
    picks = [chosen]
    while len(picks) < components and bool(nearest.max() > 0):
        picks.append(torch.multinomial(nearest, 1, generator=generator))
        nearest = torch.minimum(nearest, (points - points[picks[-1]]).square().sum(-1))
    return points[torch.cat(picks)]


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the nearest centre of each point, (n,)."""
    half = 0.5 * centres.square().sum(-1)
    return torch.cat([(half - block @ centres.mT).argmin(-1) for block in _blocks(points, len(centres))])
