"""Fit of a sphere to unlabelled activations: its chart and its distribution of radii."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from penult.activations import _ActivationSource
from penult.bases._chart import Chart
from penult.bases._radial import direction_log_prob, log_mass, radial_table
from penult.bases._tilted_gaussian import Shrinkage, tilted_gaussian
from penult.head import Head
from penult.special import in_double, working_dtype

__all__ = ["RadialHistogram", "Shape", "check_trim", "fit_chart", "fit_sphere", "typical_rows"]

Shape = Literal["round", "centered", "elliptic"]


def fit_sphere(
    head: Head, source: _ActivationSource, shape: Shape, ambient: bool, shrinkage: Shrinkage, radii: int
) -> tuple[Chart, Tensor, Tensor]:
    """Return chart, radii (R,) and log weights (R,) of a sphere, float64; arguments and errors as ``Sphere.fit``."""
    chart = fit_chart(head, source, shape, ambient, shrinkage)
    return chart, *_radial_distribution(head, source, chart, radii)


def fit_chart(head: Head, source: _ActivationSource, shape: Shape, ambient: bool, shrinkage: Shrinkage) -> Chart:
    """Return the chart of a sphere, float64; arguments and errors as ``Sphere.fit``."""
    outside: Tensor | None = None
    subspace = None
    if not ambient:
        subspace = in_double(head.span())
        mean = source.mean()
        outside = mean - subspace.T @ (subspace @ mean)
    loc = scale_tril = None
    if shape != "round":
        kind: Literal["full", "spherical"] = "full" if shape == "elliptic" else "spherical"
        loc, covariance = tilted_gaussian(head, source, kind, shrinkage, subspace)
        if shape == "elliptic":
            scale_tril, failed = torch.linalg.cholesky_ex(covariance)
            if int(failed):
                raise ValueError(
                    f"the covariance of {len(source)} activations in {len(covariance)} dimensions is singular. "
                    "Pass more activations or a larger shrinkage"
                )
    if subspace is not None and outside is not None:
        loc = outside if loc is None else outside + subspace.T @ loc
    return Chart.of(loc, scale_tril, subspace)


def _radial_distribution(head: Head, source: _ActivationSource, chart: Chart, radii: int) -> tuple[Tensor, Tensor]:
    """Return radii that represent the observed ones, and log weights that give the pair their distribution."""
    histogram = RadialHistogram()
    for rows in source:
        histogram.update(torch.linalg.vector_norm(chart.read(in_double(rows)), dim=-1).clamp_min(1e-18))
    histogram.counts, histogram.sums = (source.processes.sum(part) for part in (histogram.counts, histogram.sums))
    device, dtype = head.weight.device, working_dtype(head.weight.device)
    radius, share = (a.to(device, dtype) for a in histogram.atoms(radii))
    if float(radius.max()) <= 1e-15:
        raise ValueError(
            f"all {len(source)} activations are equal to the centre, so that there is no radius to fit; pass different "
            "activations"
        )
    moved = Chart(*(None if part is None else part.to(device, dtype) for part in chart))
    log_weights = share.log() - log_mass(*moved.seen(head), radius)
    return radius, log_weights.log_softmax(-1)


# --- Histogram of radii -------------------------------------------------------------------------------------


# Bins between r and 2r. They are 0.27 % wide, and each stores the mean of its radii.
_PER_OCTAVE = 256
# Octaves from 2^-64 to 2^64.
_OCTAVES = 128


class RadialHistogram:
    """Counts and sums of radii on a fixed logarithmic grid, which can be added over parts of a data set.

    Example:
        >>> histogram = RadialHistogram()
        >>> histogram.update(torch.tensor([1.0, 2.0, 2.0, 4.0]))
        >>> histogram.atoms(2)
        (tensor([1.0000, 2.6667], dtype=torch.float64), tensor([0.2500, 0.7500], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_PER_OCTAVE * _OCTAVES, dtype=torch.float64, device="cpu")
        self.sums = torch.zeros_like(self.counts)

    def update(self, radii: Tensor) -> None:
        """Add radii (N,), all positive and finite."""
        r = radii.detach().double().cpu()
        bins = ((r.log2() + _OCTAVES / 2) * _PER_OCTAVE).floor().long().clamp(0, len(self.counts) - 1)
        self.counts.index_add_(0, bins, torch.ones_like(r))
        self.sums.index_add_(0, bins, r)

    def merge(self, other: RadialHistogram) -> None:
        """Add the counts and sums of another histogram."""
        self.counts += other.counts
        self.sums += other.sums

    def atoms(self, count: int) -> tuple[Tensor, Tensor]:
        """Return at most ``count`` radii, the means of groups of equal mass, and the fraction of each group."""
        filled = self.counts > 0
        counts, sums = self.counts[filled], self.sums[filled]
        total = counts.sum()
        middle = (counts.cumsum(0) - 0.5 * counts) / total
        group = (middle * count).floor().long().clamp_max(count - 1)
        _, group = group.unique(return_inverse=True)
        mass = counts.new_zeros(int(group.max()) + 1).index_add_(0, group, counts)
        return mass.new_zeros(len(mass)).index_add_(0, group, sums) / mass, mass / total


# --- Trimmed fits, which tolerate outliers in their activations ---------------------------------------------


# The steps grow the kept rows from half of all rows (0) to all rows but the trimmed ones (1).
_GROWTH = (0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1)


def check_trim(trim: float) -> None:
    """Raise unless a fraction of rows to leave out is at least 0 and below 0.5."""
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim is {trim}; expected a number of at least 0 and below 0.5")


def typical_rows(
    head: Head, source: _ActivationSource, trim: float, shrinkage: Shrinkage, ambient: bool = True
) -> _ActivationSource:
    """Return the fraction 1 − trim of the rows that have the most likely directions under an elliptic fit.

    The fit is to these rows themselves: each step fits to the rows that are kept and keeps those with the most likely
    directions, at first half of all (the concentration steps of Rousseeuw and Van Driessen, "A Fast Algorithm for the
    Minimum Covariance Determinant Estimator", Technometrics 1999).

    Args:
        head: The head.
        source: Activations.
        trim: Fraction to leave out, in (0, 0.5).
        shrinkage: As for `Sphere.fit`.
        ambient: As for `Sphere.fit`.
    """
    dtype, kept = torch.promote_types(head.weight.dtype, torch.float32), source
    for growth in _GROWTH:
        chart = fit_chart(head, kept, "elliptic", ambient, shrinkage)
        chart = Chart(*(None if part is None else part.to(head.weight.device, dtype) for part in chart))
        # A coarse table is accurate enough for ranks.
        table = radial_table(*chart.seen(head), halvings=0)
        scores = []
        for rows in source:
            h = chart.project(rows.to(dtype))
            scores.append(-direction_log_prob(head, h, chart.read(h), table))
        order = source.processes.gather(torch.cat(scores)).argsort(stable=True)
        kept = source.only(order[: max(2, math.ceil(len(source) * (0.5 + growth * (0.5 - trim))))])
    return kept
