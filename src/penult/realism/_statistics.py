"""Statistics of activations that need no classifier: distances, distributions of cosines and norms, neural collapse."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from penult import special
from penult.activations import _ActivationSource
from penult.bases import Sphere
from penult.head import Head
from penult.realism._result import Collapse, Histogram, Spread, TiltIdentity
from penult.special import working_dtype

__all__ = [
    "collapse",
    "cosine_spread",
    "energy_coefficient",
    "exact_cosine",
    "expected_calibration_error",
    "kolmogorov_smirnov",
    "norm_spread",
    "wasserstein",
]

# Rows on either side of a block of distances.
_BLOCK = 1024


def energy_coefficient(x: Tensor, y: Tensor) -> float:
    r"""Return the energy distance of two samples, divided by twice the mean distance between them.

    .. math:: \frac{2\,E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|}{2\,E\|X - Y\|}

    For two distributions it lies in [0, 1], and is 0 if they are equal. Means are taken over pairs of different rows,
    so that the estimate for two samples of one distribution is 0 on average, and can be slightly negative. No (N, M)
    matrix is stored.

    References:
        Székely and Rizzo, "Energy statistics: a class of statistics based on distances", 2013.

    Args:
        x: Rows (N, d), N ≥ 2.
        y: Rows (M, d), M ≥ 2.

    Raises:
        ValueError: The shapes do not fit, or there are fewer than two rows.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> energy_coefficient(x, x + 2), energy_coefficient(torch.zeros(2, 3), torch.zeros(2, 3))
        (0.5, 0.0)
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or len(x) < 2 or len(y) < 2:
        raise ValueError(
            f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (N, d), (M, d), N, M >= 2"
        )
    work = working_dtype(x.device)
    # cdist computes differences of squares, which lose fewer digits for rows close to 0.
    center = (x.to(work).mean(0) + y.to(work).mean(0)) / 2
    x, y = x.to(work) - center, y.to(work) - center
    between = _sum_of_distances(x, y) / (len(x) * len(y))
    if between == 0:
        return 0.0
    within = _sum_of_distances(x, x) / (len(x) * (len(x) - 1)) + _sum_of_distances(y, y) / (len(y) * (len(y) - 1))
    return 1 - within / (2 * between)


def _sum_of_distances(x: Tensor, y: Tensor) -> float:
    """Return the sum of distances of all rows of x to all rows of y; from a row to itself it is exactly 0."""
    total = 0.0
    for i, a in enumerate(x.split(_BLOCK)):
        for j, b in enumerate(y.split(_BLOCK)):
            # The blocks below the diagonal mirror those above it.
            if x is y and j < i:
                continue
            distances = torch.cdist(a, b)
            if x is y and i == j:
                distances.fill_diagonal_(0)
            total += float(distances.sum()) * (2 if x is y and i != j else 1)
    return total


def kolmogorov_smirnov(x: Tensor, y: Tensor) -> float:
    """Return the largest difference between the distribution functions of two samples of numbers (N,) and (M,).

    Example:
        >>> kolmogorov_smirnov(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]))
        0.5
    """
    x, y = x.sort().values, y.sort().values
    points = torch.cat([x, y])
    cdf_x, cdf_y = (torch.searchsorted(sample, points, right=True).double() / len(sample) for sample in (x, y))
    return float((cdf_x - cdf_y).abs().max())


def wasserstein(x: Tensor, y: Tensor) -> float:
    """Return the first Wasserstein distance of two samples of numbers (N,): the mean of |x − y| of the sorted values.

    Example:
        >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        2.0
    """
    return float((x.sort().values - y.sort().values).double().abs().mean())


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    r"""Return the calibration error Σ_bins (n_bin / N) \|accuracy − mean confidence\|, with bins of equal width.

    References:
        Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", 2017.

    Args:
        confidence: Largest class probabilities (N,).
        correct: Whether that class is right (N,).
        bins: Number of bins.

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.9, 0.55]), torch.tensor([True, False, True])
        >>> # All three are in one bin, with accuracy .667 and mean confidence .783.
        >>> round(expected_calibration_error(confidence, correct, bins=2), 4)
        0.1167
    """
    bin_index = (confidence * bins).long().clamp(0, bins - 1)
    gap = correct.double() - confidence.double()
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, bin_index, gap)
    return float(sums.abs().sum() / max(len(gap), 1))


# --- distributions of the cosine to the row of the class, and of the norm -----------------------------------


_BINS = 48


def cosine_spread(real: Tensor, sampled: Tensor, other: Tensor) -> Spread:
    """Summarize cosines (M,) of real activations, of samples, and of other real activations."""
    real, sampled, other = (t.clamp(-1, 1) for t in (real.double(), sampled.double(), other.double()))
    return _spread(real, sampled, kolmogorov_smirnov(real, sampled), kolmogorov_smirnov(real, other))


def norm_spread(real: Tensor, sampled: Tensor, other: Tensor) -> Spread:
    """Summarize norms of real activations (M, d), of samples, and of other real activations."""
    real, sampled, other = (torch.linalg.vector_norm(rows.double(), dim=-1) for rows in (real, sampled, other))
    sd = float(real.std(correction=0))
    scale = sd if sd > 0 else 1.0
    return _spread(real, sampled, wasserstein(real, sampled) / scale, wasserstein(real, other) / scale)


def exact_cosine(base: Sphere, rows: Tensor, counts: Tensor, spread: Spread) -> Spread:
    """Add the exact mean and deviation of the cosine under tilts by rows (B, d), weighted by ``counts`` (B,)."""
    rows = rows.to(special.working_dtype(rows.device))
    radius_weights, kappa = base.radial_law(rows), base.kappa(rows)
    m = base.read(rows).shape[-1]
    mean, variance = special.mean_resultant_length(m, kappa), special.cosine_variance(m, kappa)
    row_weights = (counts / counts.sum()).to(radius_weights)
    first_moment = float(row_weights @ (radius_weights * mean).sum(-1))
    second_moment = float(row_weights @ (radius_weights * (variance + mean.square())).sum(-1))
    sd = max(second_moment - first_moment * first_moment, 0.0) ** 0.5
    return dataclasses.replace(spread, law_mean=first_moment, law_sd=sd)


def _spread(real: Tensor, sampled: Tensor, distance: float, real_distance: float) -> Spread:
    low, high = (float(v) for v in torch.cat([real, sampled]).aminmax())
    edges = torch.linspace(low, high if high > low else low + 1e-6, _BINS + 1, dtype=torch.float64, device="cpu")
    counts = {}
    for name, values in (("real", real), ("drawn", sampled)):
        bin_index = (torch.searchsorted(edges, values, right=True) - 1).clamp(0, _BINS - 1)
        counts[name] = tuple(bin_index.bincount(minlength=_BINS).tolist())
    return Spread(
        real_mean=float(real.mean()),
        real_sd=float(real.std(correction=0)),
        drawn_mean=float(sampled.mean()),
        drawn_sd=float(sampled.std(correction=0)),
        distance=distance,
        real_distance=real_distance,
        histogram=Histogram(tuple(edges.tolist()), counts),
    )


# --- neural collapse and the tilt identity ------------------------------------------------------------------


@torch.no_grad()
def collapse(head: Head, source: _ActivationSource) -> tuple[Collapse, TiltIdentity]:
    """Compute neural-collapse figures and the tilt identity of labelled activations, in one pass, in float64."""
    rows = head.centered_weight().cpu().double()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    bias = head.full_bias.cpu().double()
    moments = _ClassMoments(*rows.shape)
    for h, y in source.labelled():
        moments.update(h.cpu().double(), y.cpu())
    nonempty = moments.count > 0
    means, w = moments.means()[nonempty], rows[nonempty]
    frequency = (moments.count[nonempty] / moments.count.sum()).unsqueeze(-1)
    center = means.mean(0)
    cosine_mean, cosine_sd = _off_diagonal_cosines(rows)
    class_norms = moments.norm[nonempty] / moments.count[nonempty]
    figures = Collapse(
        weight_norm_min=float(norms.min()),
        weight_norm_max=float(norms.max()),
        weight_norm_cv=float(norms.std(correction=0) / norms.mean()),
        bias_max=float((bias - bias.mean()).abs().max()),
        mean_weight_norm=float(torch.linalg.vector_norm(head.mean_row.double())),
        weight_cosine_mean=cosine_mean,
        weight_cosine_sd=cosine_sd,
        weight_cosine_ideal=-1 / (head.num_classes - 1),
        mean_alignment_raw=float(torch.cosine_similarity(means, w, dim=-1).mean()),
        mean_alignment_centered=float(torch.cosine_similarity(means - center, w, dim=-1).mean()),
        class_norm_min=float(class_norms.min()),
        class_norm_max=float(class_norms.max()),
        trace_within=moments.trace_within(),
        trace_between=float((frequency * (means - (frequency * means).sum(0)).square()).sum()),
        classes=int(nonempty.sum()),
    )
    w = w - w.mean(0)
    squared_norm = float(w.square().sum())
    if squared_norm == 0 or figures.trace_within is None:
        return figures, TiltIdentity(None, None, None)
    offset = float(((means - center) * w).sum()) / squared_norm
    variance = moments.variance_within(w) / squared_norm
    return figures, TiltIdentity(offset, variance, offset / variance if variance > 0 else None)


class _ClassMoments:
    """Running class sums and second moments of activations."""

    def __init__(self, num_classes: int, in_features: int) -> None:
        self.count = torch.zeros(num_classes, dtype=torch.float64, device="cpu")
        self.norm = torch.zeros(num_classes, dtype=torch.float64, device="cpu")
        self._sum = torch.zeros(num_classes, in_features, dtype=torch.float64, device="cpu")
        self._product = torch.zeros(in_features, in_features, dtype=torch.float64, device="cpu")
        # Subtracted from all rows: close to their mean, so that variances lose few digits.
        self._origin: Tensor | None = None

    def update(self, h: Tensor, y: Tensor) -> None:
        """Add rows (n, d) with labels (n,)."""
        if self._origin is None:
            self._origin = h.mean(0)
        self.count.index_add_(0, y, torch.ones(len(y), dtype=torch.float64, device="cpu"))
        self.norm.index_add_(0, y, torch.linalg.vector_norm(h, dim=-1))
        h = h - self._origin
        self._sum.index_add_(0, y, h)
        self._product += h.T @ h

    def means(self) -> Tensor:
        """Return the class means (K, d)."""
        assert self._origin is not None
        return self._sum / self.count.clamp_min(1).unsqueeze(-1) + self._origin

    def _degrees_of_freedom(self) -> float:
        return float(self.count.sum() - (self.count > 0).sum())

    def trace_within(self) -> float | None:
        """Return the trace of the within-class covariance; None if no class has two rows."""
        if self._degrees_of_freedom() < 1:
            return None
        between = (self._sum.square().sum(-1) / self.count.clamp_min(1)).sum()
        return max(float(self._product.trace() - between) / self._degrees_of_freedom(), 0.0)

    def variance_within(self, w: Tensor) -> float:
        """Return Σ_i w_i' S w_i over rows (n, d), for the within-class covariance S."""
        total = ((w @ self._product) * w).sum()
        scaled_means = self._sum / self.count.clamp_min(1).sqrt().unsqueeze(-1)
        return max(float(total - (scaled_means @ w.T).square().sum()) / self._degrees_of_freedom(), 0.0)


def _off_diagonal_cosines(rows: Tensor) -> tuple[float, float]:
    """Return the mean and standard deviation of the cosines between different rows (K, d)."""
    unit = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-300)
    k = len(unit)
    total = square = 0.0
    for block in unit.split(1024):
        gram = block @ unit.T
        total, square = total + float(gram.sum()), square + float(gram.square().sum())
    pairs = k * (k - 1)
    diagonal = unit.square().sum(-1)
    mean = (total - float(diagonal.sum())) / pairs
    return mean, math.sqrt(max((square - float(diagonal.square().sum())) / pairs - mean * mean, 0.0))
