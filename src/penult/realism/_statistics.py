"""Distances between two sets of activations, or of numbers, that need no classifier."""

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

_BLOCK = 1024  # rows whose distances to as many others are held at a time


def energy_coefficient(x: Tensor, y: Tensor) -> float:
    r"""The energy distance of two samples as a share of their distance to each other, without bias.

    .. math:: \frac{2\,E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|}{2\,E\|X - Y\|}

    It lies in [0, 1] for laws, 0 where they are equal; each mean is taken over distinct pairs, so that two samples
    of one law give 0 on average, and can fall a little below. No (N, M) matrix is kept.

    References:
        Székely and Rizzo, "Energy statistics: a class of statistics based on distances", 2013.

    Args:
        x: Rows (N, d), N ≥ 2.
        y: Rows (M, d), M ≥ 2.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer than two rows.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> energy_coefficient(x, x + 2), energy_coefficient(torch.zeros(2, 3), torch.zeros(2, 3))
        (0.5, 0.0)
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or len(x) < 2 or len(y) < 2:
        raise ValueError(f"x and y must be rows (N, d) and (M, d), N, M >= 2; got {tuple(x.shape)}, {tuple(y.shape)}")
    work = working_dtype(x.device)
    centre = (x.to(work).mean(0) + y.to(work).mean(0)) / 2  # distances as differences of squares: keep these small
    x, y = x.to(work) - centre, y.to(work) - centre
    across = _distances(x, y) / (len(x) * len(y))
    if across == 0:
        return 0.0
    within = _distances(x, x) / (len(x) * (len(x) - 1)) + _distances(y, y) / (len(y) * (len(y) - 1))
    return 1 - within / (2 * across)


def _distances(x: Tensor, y: Tensor) -> float:
    """The sum of distances of all rows of x to all of y; those of a row to itself are exactly 0."""
    total = 0.0
    for i, a in enumerate(x.split(_BLOCK)):
        for j, b in enumerate(y.split(_BLOCK)):
            if x is y and j < i:
                continue  # the mirror image
            apart = torch.cdist(a, b)
            if x is y and i == j:
                apart.fill_diagonal_(0)
            total += float(apart.sum()) * (2 if x is y and i != j else 1)
    return total


def kolmogorov_smirnov(x: Tensor, y: Tensor) -> float:
    """The largest difference between the distribution functions of two samples of numbers (N,) and (M,).

    Example:
        >>> kolmogorov_smirnov(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]))
        0.5
    """
    x, y = x.sort().values, y.sort().values
    at = torch.cat([x, y])
    shares = [torch.searchsorted(each, at, right=True).double() / len(each) for each in (x, y)]
    return float((shares[0] - shares[1]).abs().max())


def wasserstein(x: Tensor, y: Tensor) -> float:
    """The first Wasserstein distance of two samples of numbers of one size (N,): the mean of |x_(i) − y_(i)|.

    Example:
        >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        2.0
    """
    return float((x.sort().values - y.sort().values).double().abs().mean())


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    r"""How far confidence is from accuracy: Σ_bins (n_bin / N) \|accuracy − mean confidence\|, bins of equal width.

    References:
        Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", 2017.

    Args:
        confidence: Largest class probabilities (N,).
        correct: Whether that class is right (N,).
        bins: How many.

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.9, 0.55]), torch.tensor([True, False, True])
        >>> round(expected_calibration_error(confidence, correct, bins=2), 4)  # one bin of three: .667 against .783
        0.1167
    """
    which = (confidence * bins).long().clamp(0, bins - 1)
    gap = correct.double() - confidence.double()
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, which, gap)
    return float(sums.abs().sum() / max(len(gap), 1))


# --- Laws of single numbers: the cosine to the row of the class, and the norm -------------------------------


_BINS = 48


def cosine_spread(real: Tensor, drawn: Tensor, other: Tensor) -> Spread:
    """Cosines (M,) of real activations, of draws, and of other real ones."""
    real, drawn, other = (t.clamp(-1, 1) for t in (real.double(), drawn.double(), other.double()))
    return _spread(real, drawn, kolmogorov_smirnov(real, drawn), kolmogorov_smirnov(real, other))


def norm_spread(real: Tensor, drawn: Tensor, other: Tensor) -> Spread:
    """Norms of rows (M, d), likewise."""
    r, drawn_r, other_r = (torch.linalg.vector_norm(rows.double(), dim=-1) for rows in (real, drawn, other))
    sd = float(r.std(correction=0))
    scale = sd if sd > 0 else 1.0
    return _spread(r, drawn_r, wasserstein(r, drawn_r) / scale, wasserstein(r, other_r) / scale)


def exact_cosine(base: Sphere, rows: Tensor, counts: Tensor, spread: Spread) -> Spread:
    """The same with mean and deviation of the cosine under the tilts by rows (B, d), each ``counts`` (B,) times."""
    rows = rows.to(special.working_dtype(rows.device))
    share, kappa = base.radial_law(rows), base.kappa(rows)
    m = base.read(rows).shape[-1]
    mean, variance = special.mean_resultant_length(m, kappa), special.cosine_variance(m, kappa)
    weight = (counts / counts.sum()).to(share)
    first = float(weight @ (share * mean).sum(-1))
    second = float(weight @ (share * (variance + mean.square())).sum(-1))
    return dataclasses.replace(spread, law_mean=first, law_sd=max(second - first * first, 0.0) ** 0.5)


def _spread(real: Tensor, drawn: Tensor, distance: float, real_distance: float) -> Spread:
    low, high = (float(v) for v in torch.cat([real, drawn]).aminmax())
    edges = torch.linspace(low, high if high > low else low + 1e-6, _BINS + 1, dtype=torch.float64)
    counts = {}
    for name, sample in (("real", real), ("drawn", drawn)):
        place = (torch.searchsorted(edges, sample, right=True) - 1).clamp(0, _BINS - 1)
        counts[name] = tuple(place.bincount(minlength=_BINS).tolist())
    return Spread(
        real_mean=float(real.mean()),
        real_sd=float(real.std(correction=0)),
        drawn_mean=float(drawn.mean()),
        drawn_sd=float(drawn.std(correction=0)),
        distance=distance,
        real_distance=real_distance,
        histogram=Histogram(tuple(edges.tolist()), counts),
    )


# --- How head and class means stand to each other: neural collapse, and the tilt identity -------------------


@torch.no_grad()
def collapse(head: Head, held: _ActivationSource) -> tuple[Collapse, TiltIdentity]:
    """Neural-collapse figures and tilt identity of labelled activations, as sums over one pass, in float64."""
    rows = head.centered_weight().cpu().double()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    bias = head.full_bias.cpu().double()
    moments = _Moments(rows)
    for h, y in held.labelled():
        moments.update(h.cpu().double(), y.cpu())
    seen = moments.count > 0
    means, w = moments.means()[seen], rows[seen]
    share = (moments.count[seen] / moments.count.sum()).unsqueeze(-1)
    middle = means.mean(0)
    cosines = _off_diagonal_cosines(rows)
    row_norms = moments.norm[seen] / moments.count[seen]
    figures = Collapse(
        weight_norm_min=float(norms.min()),
        weight_norm_max=float(norms.max()),
        weight_norm_cv=float(norms.std(correction=0) / norms.mean()),
        bias_max=float((bias - bias.mean()).abs().max()),
        mean_weight_norm=float(torch.linalg.vector_norm(head.mean_row.double())),
        weight_cosine_mean=cosines[0],
        weight_cosine_sd=cosines[1],
        weight_cosine_ideal=-1 / (head.num_classes - 1),
        mean_alignment_raw=float(torch.cosine_similarity(means, w, dim=-1).mean()),
        mean_alignment_centered=float(torch.cosine_similarity(means - middle, w, dim=-1).mean()),
        class_norm_min=float(row_norms.min()),
        class_norm_max=float(row_norms.max()),
        trace_within=moments.within(),
        trace_between=float((share * (means - (share * means).sum(0)).square()).sum()),
        classes=int(seen.sum()),
    )
    w = w - w.mean(0)
    square = float(w.square().sum())
    if square == 0 or figures.trace_within is None:
        return figures, TiltIdentity(None, None, None)
    offset = float(((means - middle) * w).sum()) / square
    variance = moments.within_along(w) / square
    return figures, TiltIdentity(offset, variance, offset / variance if variance > 0 else None)


class _Moments:
    """Class sums of activations, and what within-class variances need."""

    def __init__(self, rows: Tensor) -> None:
        k, d = rows.shape
        self.count = torch.zeros(k, dtype=torch.float64)
        self.norm = torch.zeros(k, dtype=torch.float64)
        self._sum = torch.zeros(k, d, dtype=torch.float64)
        self._product = torch.zeros(d, d, dtype=torch.float64)
        self._origin: Tensor | None = None  # near the mean, so that little cancels

    def update(self, h: Tensor, y: Tensor) -> None:
        if self._origin is None:
            self._origin = h.mean(0)
        self.count.index_add_(0, y, torch.ones(len(y), dtype=torch.float64))
        self.norm.index_add_(0, y, torch.linalg.vector_norm(h, dim=-1))
        h = h - self._origin
        self._sum.index_add_(0, y, h)
        self._product += h.T @ h

    def means(self) -> Tensor:
        assert self._origin is not None
        return self._sum / self.count.clamp_min(1).unsqueeze(-1) + self._origin

    def _freedom(self) -> float:
        return float(self.count.sum() - (self.count > 0).sum())

    def within(self) -> float | None:
        """Trace of the within-class covariance; None where no class has two rows."""
        if self._freedom() < 1:
            return None
        between = (self._sum.square().sum(-1) / self.count.clamp_min(1)).sum()
        return max(float(self._product.trace() - between) / self._freedom(), 0.0)

    def within_along(self, w: Tensor) -> float:
        """Σ_i w_i' S w_i over rows (n, d), for the within-class covariance S."""
        total = ((w @ self._product) * w).sum()
        means = self._sum / self.count.clamp_min(1).sqrt().unsqueeze(-1)
        return max(float(total - (means @ w.T).square().sum()) / self._freedom(), 0.0)


def _off_diagonal_cosines(rows: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the cosines between different rows (K, d)."""
    unit = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-300)
    k = len(unit)
    total = square = 0.0
    for block in unit.split(1024):
        gram = block @ unit.T
        total, square = total + float(gram.sum()), square + float(gram.square().sum())
    pairs = k * (k - 1)
    own = unit.square().sum(-1)
    mean = (total - float(own.sum())) / pairs
    return mean, math.sqrt(max((square - float(own.square().sum())) / pairs - mean * mean, 0.0))
