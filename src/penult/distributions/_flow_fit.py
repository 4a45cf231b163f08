"""Fit of a normalizing flow to rows: splines, mixture, and both together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from penult._checks import check_integer, check_seed
from penult.distributions._principal_components import Rows
from penult.distributions.principal_mixture import PrincipalMixture

__all__ = [
    "BOUND",
    "ELEMENTS",
    "PARTS",
    "SLOPE",
    "Progress",
    "fit_flow",
    "log_density",
    "mixture_of",
    "splines",
    "zuko",
]

# --- Density of a normalizing flow: splines of single coordinates over a mixture ----------------------------


# Standard deviations within which the splines are not linear; beyond, they are the identity.
BOUND = 5.0
# Smallest slope of a spline; its inverse is the largest.
SLOPE = 1e-3
# Number of values processed at a time; a spline computes some tens of numbers for each value.
ELEMENTS = 1 << 18
# Names of the tensors of the mixture.
PARTS = ("loc", "components", "logits", "means", "scale_tril", "residual_scale")


def zuko() -> Any:
    """Import and return the transforms of zuko.

    Raises:
        ImportError: zuko is not installed.
    """
    validation = Distribution._validate_args
    try:
        # An import statement, because torch.compile does not trace importlib.
        from zuko import transforms
    except ImportError as error:
        raise ImportError('a NormalizingFlow needs zuko: pip install "penult[flow]"', name=error.name) from error
    # The first import of zuko switches validation off for all distributions of the process.
    if Distribution._validate_args != validation:
        Distribution.set_default_validate_args(validation)
    return transforms


def mixture_of(parts: Iterable[Tensor], validate_args: bool = False) -> PrincipalMixture:
    """Return the mixture with the given tensors, which are in the order of the names `PARTS`."""
    loc, components, logits, means, scale_tril, residual_scale = parts
    return PrincipalMixture(loc, components, logits, means, scale_tril, residual_scale, validate_args=validate_args)


def splines(knots: Tensor) -> Any:
    """Return the splines (d,) of unconstrained knots (d, 3·bins − 1)."""
    bins = (knots.shape[-1] + 1) // 3
    widths, heights, slopes = knots.split([bins, bins, bins - 1], -1)
    # Bound and slope are fixed here, because saved knots depend on them and the defaults of zuko may change.
    return zuko().MonotonicRQSTransform(widths, heights, slopes, bound=BOUND, slope=SLOPE)


def log_density(rows: Tensor, knots: Tensor, base: PrincipalMixture) -> Tensor:
    """Return the log density (n,) of scaled rows (n, d)."""
    z, slope = splines(knots).call_and_ladj(rows)
    density: Tensor = base.log_prob(z) + slope.sum(-1)
    return density


Progress = Callable[[int, int], None]

# --- Fit ----------------------------------------------------------------------------------------------------

# Number of elements of the random sample that all steps but expectation maximisation use.
_SAMPLE_ELEMENTS = 1 << 24
# One row in ten is held out for early stopping, at most this many.
_MAX_HELD_OUT = 4096
# With fewer rows than this, the splines stay the identity.
_MIN_ROWS = 100
# Number of splines fitted at a time.
_COLUMNS = 256
_BATCH = 256
# Number of passes without a gain after which the last step ends.
_PATIENCE = 10


def fit_flow(
    activations: Tensor | Iterable[Tensor],
    components: int,
    dims: int | None,
    seed: int,
    bins: int,
    iterations: int,
    epochs: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor, Tensor, PrincipalMixture]:
    """Fit centres, scales, knots and base of a flow; steps, arguments and errors as `NormalizingFlow.fit`."""
    zuko()
    components, bins = check_integer("components", components), check_integer("bins", bins, 2)
    dims = None if dims is None else check_integer("dims", dims)
    iterations, epochs = check_integer("iterations", iterations, 0), check_integer("epochs", epochs, 0)
    seed = check_seed(seed)
    rows = Rows(activations)
    d, dtype = len(rows.mean), torch.promote_types(rows.dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    sampled, held_out = _sample(rows, generator)
    loc, scale = rows.mean, _spread(rows)
    can_select = bool(iterations or epochs) and int(held_out.sum()) >= _MIN_ROWS // 10
    blocks = math.ceil(d / _COLUMNS) if can_select and iterations else 0
    total, done = blocks * iterations + (2 if blocks else 1) + (epochs if can_select else 0), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    index = sampled.nonzero().squeeze(-1)
    sample = ((_take(rows, index) - loc) / scale).to(rows.device, torch.float32)
    test = held_out[index].to(rows.device)
    identity = sample.new_zeros(d, 3 * bins - 1)
    fitted = identity.clone()
    for begin in range(0, blocks * _COLUMNS, _COLUMNS):
        part = slice(begin, begin + _COLUMNS)
        fitted[part] = _fit_splines(
            sample[~test, part], sample[test, part], identity[part], iterations, generator, step
        )

    def fit_mixture(knots: Tensor, left_out: Tensor | None) -> PrincipalMixture:
        warped = _Warped(rows, loc, scale, knots.to(rows.work, torch.float64), left_out)
        return PrincipalMixture.fit(warped, components, d if dims is None else dims, seed=seed)

    starts = []
    # Splines can make coordinates with two modes worse, so the identity is tried as well.
    for knots in (identity, fitted) if blocks else (identity,):
        base = fit_mixture(knots, held_out if can_select else None)
        mixture = mixture_of(getattr(base, name).to(sample) for name in PARTS)
        usable = can_select and mixture.has_density
        starts.append((_mean_log_density(sample[test], knots, mixture) if usable else -math.inf, knots, base))
        step()
    quality, knots, base = max(starts, key=lambda start: start[0])
    better = None
    if epochs and quality > -math.inf:
        better = _fit_jointly(sample[~test], sample[test], knots, base, epochs, generator, step)
    if better is not None:
        knots, base = better
    elif can_select:
        # No further choice is made, so the held-out rows can be used as well.
        base = fit_mixture(knots, None)
    if progress is not None and done < total:
        progress(total, total)

    def cast(part: Tensor) -> Tensor:
        return part.to(rows.device, dtype)

    mixture = mixture_of(cast(getattr(base, name)) for name in PARTS)
    return cast(loc), cast(scale), cast(knots), mixture


class _Warped:
    """Rows in the coordinates of the splines, without the held-out rows; can be iterated several times."""

    def __init__(self, rows: Rows, loc: Tensor, scale: Tensor, knots: Tensor, held_out: Tensor | None) -> None:
        self._rows, self._loc, self._scale, self._held_out = rows, loc, scale, held_out
        self._splines = splines(knots)
        self._dtype = torch.promote_types(rows.dtype, torch.float32)

    def __iter__(self) -> Iterator[Tensor]:
        begin = 0
        for rows in self._rows:
            for some in rows.split(max(1, ELEMENTS // len(self._loc))):
                begin, last = begin + len(some), begin
                if self._held_out is not None:
                    some = some[~self._held_out[last:begin].to(some.device)]
                # Not float64, because the fit estimates the rounding error of the rows from their dtype.
                yield self._splines((some - self._loc) / self._scale).to(self._dtype)


@torch.no_grad()
def _mean_log_density(rows: Tensor, knots: Tensor, base: PrincipalMixture) -> float:
    parts = [log_density(some, knots, base) for some in rows.split(max(1, ELEMENTS // rows.shape[1]))]
    return float(torch.cat(parts).mean())


def _spread(rows: Rows) -> Tensor:
    """Return the standard deviations (d,), float64, and 1 for coordinates that are constant up to rounding."""
    total = torch.zeros_like(rows.mean)
    for some in rows:
        total += (some - rows.mean).square().sum(0)
    scale = (total / rows.count).sqrt()
    return torch.where(scale > 8 * torch.finfo(rows.dtype).eps * rows.mean.abs(), scale, 1.0)


def _sample(rows: Rows, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two masks (N,): a random sample of the rows, and the rows of the sample that are held out."""
    size = min(rows.count, max(1, _SAMPLE_ELEMENTS // len(rows.mean)))
    order = torch.randperm(rows.count, generator=generator, device="cpu")[:size]
    sampled, held_out = torch.zeros(2, rows.count, dtype=torch.bool, device="cpu")
    sampled[order] = True
    held_out[order[: min(_MAX_HELD_OUT, size // 10)]] = True
    return sampled, held_out


def _take(rows: Rows, index: Tensor) -> Tensor:
    """Return the rows at increasing positions."""
    parts, begin = [], 0
    for some in rows:
        here = index[(index >= begin) & (index < begin + len(some))] - begin
        parts.append(some[here.to(some.device)])
        begin += len(some)
    return torch.cat(parts)


def _fit_splines(
    rows: Tensor, held_out: Tensor, start: Tensor, steps: int, generator: torch.Generator, step: Callable[[], None]
) -> Tensor:
    """Fit splines (n, 3·bins − 1) that make each column standard normal; return the best by the held-out rows."""
    # Adam updates each entry separately, so the columns do not influence each other.
    knots = start.clone().requires_grad_()
    best, lowest_loss = start.clone(), _spline_loss(held_out, start)
    optimizer = torch.optim.Adam([knots], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        batch = torch.randint(len(rows), (_BATCH,), generator=generator, device="cpu").to(rows.device)
        optimizer.zero_grad()
        _spline_loss(rows[batch], knots).sum().backward()
        optimizer.step()
        schedule.step()
        if i % 20 == 19 or i == steps - 1:
            with torch.no_grad():
                loss = _spline_loss(held_out, knots)
                best[loss < lowest_loss] = knots[loss < lowest_loss]
                lowest_loss = torch.minimum(lowest_loss, loss)
        step()
    return best


def _spline_loss(rows: Tensor, knots: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of each column, up to a constant."""
    z, slope = splines(knots).call_and_ladj(rows)
    loss: Tensor = (0.5 * z.square() - slope).mean(0)
    return loss


def _fit_jointly(
    rows: Tensor,
    held_out: Tensor,
    knots: Tensor,
    base: PrincipalMixture,
    epochs: int,
    generator: torch.Generator,
    step: Callable[[], None],
) -> tuple[Tensor, PrincipalMixture] | None:
    """Fit splines and mixture by their common likelihood.

    Returns:
        The splines and mixture of the best step by the held-out rows; None if no step improved on the start.
    """
    first = mixture_of(getattr(base, name).to(rows) for name in PARTS)
    diagonal = first.scale_tril.diagonal(dim1=-2, dim2=-1)
    full = first.components.shape[0] == first.components.shape[1]
    free = [knots, first.logits, first.means, first.scale_tril.tril(-1), diagonal.log()]
    free += [] if full else [first.residual_scale.log()]
    free = [part.detach().clone().requires_grad_() for part in free]

    def current() -> tuple[Tensor, PrincipalMixture]:
        tril = free[3].tril(-1) + torch.diag_embed(free[4].exp())
        across = first.residual_scale if full else free[5].exp()
        return free[0], mixture_of((first.loc, first.components, free[1], free[2], tril, across))

    # No weight decay, because zero is not a neutral value of these parameters.
    optimizer = torch.optim.AdamW(free, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, highest, passes_without_gain = None, _mean_log_density(held_out, *current()), 0
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator, device="cpu").to(rows.device)
        for batch in order[: max(1, len(rows) // _BATCH) * _BATCH].split(_BATCH):
            optimizer.zero_grad()
            (-log_density(rows[batch], *current()).mean()).backward()
            nn.utils.clip_grad_norm_(free, 5.0)
            optimizer.step()
        schedule.step()
        passes_without_gain += 1
        if (quality := _mean_log_density(held_out, *current())) > highest:
            best, highest, passes_without_gain = [part.detach().clone() for part in free], quality, 0
        step()
        if passes_without_gain == _PATIENCE:
            break
    if best is None:
        return None
    for part, best_part in zip(free, best, strict=True):
        part.data = best_part
    with torch.no_grad():
        return current()
