"""The sphere closest to unlabelled activations: where it lies, and its law of radii."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from penult.bases._chart import Chart
from penult.bases._moments import tilted_gaussian
from penult.bases._pool import Pool
from penult.bases._radial_mass import log_mass
from penult.bases._radii import RadialHistogram
from penult.head import Head
from penult.special import in_double, working_dtype

__all__ = ["Shape", "fit_sphere"]

Shape = Literal["round", "centered", "elliptic"]


def fit_sphere(
    head: Head, pool: Pool, shape: Shape, ambient: bool, shrinkage: float, radii: int
) -> tuple[Chart, Tensor, Tensor]:
    """Chart, radii (R,) and log weights (R,) of a sphere, float64; arguments and errors as ``Sphere.fit``."""
    chart = _chart(head, pool, shape, ambient, shrinkage)
    return chart, *_radial_law(head, pool, chart, radii)


def _chart(head: Head, pool: Pool, shape: Shape, ambient: bool, shrinkage: float) -> Chart:
    outside: Tensor | None = None
    subspace = None
    if not ambient:
        subspace = in_double(head.span())
        mean = pool.mean()
        outside = mean - subspace.T @ (subspace @ mean)
    loc = scale_tril = None
    if shape != "round":
        kind: Literal["full", "spherical"] = "full" if shape == "elliptic" else "spherical"
        loc, covariance = tilted_gaussian(head, pool, kind, shrinkage, subspace)
        if shape == "elliptic":
            scale_tril, failed = torch.linalg.cholesky_ex(covariance)
            if int(failed):
                raise ValueError(
                    f"the covariance of {len(pool)} activations in {len(covariance)} dimensions is singular; "
                    f"pass more activations or a shrinkage above {shrinkage}"
                )
    if subspace is not None and outside is not None:
        loc = outside if loc is None else outside + subspace.T @ loc
    return Chart.of(loc, scale_tril, subspace)


def _radial_law(head: Head, pool: Pool, chart: Chart, radii: int) -> tuple[Tensor, Tensor]:
    """Atoms of the observed radii, and the log weights with which the pair's own marginal of r is the observed one."""
    histogram = RadialHistogram()
    for rows in pool:
        histogram.update(torch.linalg.vector_norm(chart.read(in_double(rows)), dim=-1).clamp_min(1e-18))
    histogram.counts, histogram.sums = (pool.processes.sum(part) for part in (histogram.counts, histogram.sums))
    device, dtype = head.weight.device, working_dtype(head.weight.device)
    radius, share = (a.to(device, dtype) for a in histogram.atoms(radii))
    if float(radius.max()) <= 1e-15:
        raise ValueError(f"all {len(pool)} activations lie at the centre, so there is no radius to fit")
    there = Chart(*(None if part is None else part.to(device, dtype) for part in chart))
    log_weights = share.log() - log_mass(*there.seen(head), radius)
    return radius, log_weights.log_softmax(-1)
