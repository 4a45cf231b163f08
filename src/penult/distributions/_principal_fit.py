"""How a Gaussian mixture in principal components is fitted to rows: by maximisation, or from class probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from penult.distributions import _expectation_maximisation as em
from penult.distributions._links import NEXT_TO_ZERO, unsquare
from penult.distributions._rows import Rows
from penult.processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Fitted", "by_maximisation", "by_posterior"]

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
    mixture, prior = em.start(first, min(components, max(1, rows.count // _ROWS)), _STRENGTH * len(plane), generator)
    # Machines round differently, and a start that differs in the last digit may end elsewhere.
    mixture, prior = rows.processes.first((mixture, prior))
    mixture = em.Components(*(part.to(rows.work) for part in mixture))
    prior = em.Prior(prior.covariance.to(rows.work), prior.strength)
    mixture, _ = em.maximise(mixture, prior, lambda: projected, iterations, tolerance, rows.processes)
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

    mixture = em.of_responsibilities(parts(), _STRENGTH * len(plane), rows.processes)
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


def _fitted(rows: Rows, plane: Tensor, across: float, mixture: em.Components, softness: Tensor | None) -> Fitted:
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
