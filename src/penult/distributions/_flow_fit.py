"""How a normalizing flow is fitted to rows: each spline, the mixture, and both together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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

# --- Splines of single coordinates over a mixture: the density that a normalizing flow has, and is fitted by ---


BOUND = 5.0  # standard deviations within which the splines bend; beyond, they are the identity
SLOPE = 1e-3  # the least of a spline, and the inverse of the greatest
ELEMENTS = 1 << 18  # of values handled at a time; a spline makes some tens of numbers of each
PARTS = ("loc", "components", "logits", "means", "scale_tril", "residual_scale")  # of the mixture


def zuko() -> Any:
    """Transforms of zuko.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from zuko import transforms  # not by importlib, which torch.compile does not trace
    except ImportError as error:
        raise ImportError('a NormalizingFlow needs zuko: pip install "penult[flow]"', name=error.name) from error
    return transforms


def mixture_of(parts: Iterable[Tensor], validate_args: bool = False) -> PrincipalMixture:
    """The mixture of `PARTS`."""
    loc, components, logits, means, scale_tril, residual_scale = parts
    return PrincipalMixture(loc, components, logits, means, scale_tril, residual_scale, validate_args=validate_args)


def splines(knots: Tensor) -> Any:
    """The splines (d,) that unconstrained knots (d, 3·bins − 1) stand for."""
    bins = (knots.shape[-1] + 1) // 3
    widths, heights, slopes = knots.split([bins, bins, bins - 1], -1)
    # bound and slope are part of what the numbers mean, so they don't follow zuko's defaults
    return zuko().MonotonicRQSTransform(widths, heights, slopes, bound=BOUND, slope=SLOPE)


def log_density(rows: Tensor, knots: Tensor, base: PrincipalMixture) -> Tensor:
    """Log density of scaled rows (n, d), (n,)."""
    z, slope = splines(knots).call_and_ladj(rows)
    density: Tensor = base.log_prob(z) + slope.sum(-1)
    return density


Progress = Callable[[int, int], None]

_KEPT = 1 << 24  # elements of the random sample that fit keeps for all but expectation maximisation
_HELD = 4096  # rows held out to stop by, at most, and one in ten
_FEWEST = 100  # rows that splines are fitted to; with fewer, they stay the identity
_COLUMNS = 256  # splines fitted at a time
_BATCH = 256
_PATIENCE = 10  # passes without a gain that end the last step


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
    """Centres, scales, knots and base of a flow; steps, arguments and errors as `NormalizingFlow.fit`."""
    zuko()
    for name, number, least in (
        ("components", components, 1),
        ("dims", 1 if dims is None else dims, 1),
        ("bins", bins, 2),
        ("iterations", iterations, 0),
        ("epochs", epochs, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    rows = Rows(activations)
    d, dtype = len(rows.mean), torch.promote_types(rows.dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    kept, held = _sample(rows, generator)
    loc, scale = rows.mean, _spread(rows)
    fine = bool(iterations or epochs) and int(held.sum()) >= _FEWEST // 10
    blocks = math.ceil(d / _COLUMNS) if fine and iterations else 0
    total, done = blocks * iterations + (2 if blocks else 1) + (epochs if fine else 0), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    index = kept.nonzero().squeeze(-1)
    some = ((_take(rows, index) - loc) / scale).to(rows.device, torch.float32)
    out = held[index].to(rows.device)
    flat = some.new_zeros(d, 3 * bins - 1)
    bent = flat.clone()
    for begin in range(0, blocks * _COLUMNS, _COLUMNS):
        part = slice(begin, begin + _COLUMNS)
        bent[part] = _marginal(some[~out, part], some[out, part], flat[part], iterations, generator, step)

    def mixture(knots: Tensor, left_out: Tensor | None) -> PrincipalMixture:
        warped = _Warped(rows, loc, scale, knots.to(rows.work, torch.float64), left_out)
        return PrincipalMixture.fit(warped, components, d if dims is None else dims, seed=seed)

    starts = []
    for knots in (flat, bent) if blocks else (flat,):  # coordinates of two modes are better left as they are
        base = mixture(knots, held if fine else None)
        law = mixture_of(getattr(base, name).to(some) for name in PARTS)
        starts.append((_held_out(some[out], knots, law) if fine and law.has_density else -math.inf, knots, base))
        step()
    quality, knots, base = max(starts, key=lambda start: start[0])
    better = None
    if epochs and quality > -math.inf:
        better = _polish(some[~out], some[out], knots, base, epochs, generator, step)
    if better is not None:
        knots, base = better
    elif fine:
        base = mixture(knots, None)  # nothing is left to choose, so that all rows may take part
    if progress is not None and done < total:
        progress(total, total)

    def cast(part: Tensor) -> Tensor:
        return part.to(rows.device, dtype)

    law = mixture_of(cast(getattr(base, name)) for name in PARTS)
    return cast(loc), cast(scale), cast(knots), law


class _Warped:
    """Rows in the coordinates of the splines, without those held out; again at each iteration."""

    def __init__(self, rows: Rows, loc: Tensor, scale: Tensor, knots: Tensor, held: Tensor | None) -> None:
        self._rows, self._loc, self._scale, self._held = rows, loc, scale, held
        self._splines = splines(knots)
        self._dtype = torch.promote_types(rows.dtype, torch.float32)

    def __iter__(self) -> Iterator[Tensor]:
        begin = 0
        for rows in self._rows:
            for some in rows.split(max(1, ELEMENTS // len(self._loc))):
                begin, last = begin + len(some), begin
                if self._held is not None:
                    some = some[~self._held[last:begin].to(some.device)]
                # float32 at least, and not float64: what is rounding is judged by the dtype
                yield self._splines((some - self._loc) / self._scale).to(self._dtype)


@torch.no_grad()
def _held_out(rows: Tensor, knots: Tensor, base: PrincipalMixture) -> float:
    parts = [log_density(some, knots, base) for some in rows.split(max(1, ELEMENTS // rows.shape[1]))]
    return float(torch.cat(parts).mean())


def _spread(rows: Rows) -> Tensor:
    """Standard deviations (d,), float64, 1 for a coordinate that is constant but for rounding."""
    total = torch.zeros_like(rows.mean)
    for some in rows:
        total += (some - rows.mean).square().sum(0)
    scale = (total / rows.count).sqrt()
    return torch.where(scale > 8 * torch.finfo(rows.dtype).eps * rows.mean.abs(), scale, 1.0)


def _sample(rows: Rows, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks (N,) of the rows kept in memory and of those among them that are held out."""
    size = min(rows.count, max(1, _KEPT // len(rows.mean)))
    order = torch.randperm(rows.count, generator=generator)[:size]
    kept, held = torch.zeros(2, rows.count, dtype=torch.bool)
    kept[order] = True
    held[order[: min(_HELD, size // 10)]] = True
    return kept, held


def _take(rows: Rows, index: Tensor) -> Tensor:
    """Rows at increasing positions."""
    parts, begin = [], 0
    for some in rows:
        here = index[(index >= begin) & (index < begin + len(some))] - begin
        parts.append(some[here.to(some.device)])
        begin += len(some)
    return torch.cat(parts)


def _marginal(
    rows: Tensor, held: Tensor, start: Tensor, steps: int, generator: torch.Generator, step: Callable[[], None]
) -> Tensor:
    """Splines (n, 3·bins − 1) that make each column as normal as they can, each the best by the held-out rows.

    Adam works entry by entry, so that each column is fitted as if it were alone.
    """
    knots = start.clone().requires_grad_()
    best, least = start.clone(), _marginal_loss(held, start)
    optimizer = torch.optim.Adam([knots], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        batch = torch.randint(len(rows), (_BATCH,), generator=generator).to(rows.device)
        optimizer.zero_grad()
        _marginal_loss(rows[batch], knots).sum().backward()
        optimizer.step()
        schedule.step()
        if i % 20 == 19 or i == steps - 1:
            with torch.no_grad():
                loss = _marginal_loss(held, knots)
                best[loss < least] = knots[loss < least]
                least = torch.minimum(least, loss)
        step()
    return best


def _marginal_loss(rows: Tensor, knots: Tensor) -> Tensor:
    z, slope = splines(knots).call_and_ladj(rows)
    loss: Tensor = (0.5 * z.square() - slope).mean(0)
    return loss


def _polish(
    rows: Tensor,
    held: Tensor,
    knots: Tensor,
    base: PrincipalMixture,
    epochs: int,
    generator: torch.Generator,
    step: Callable[[], None],
) -> tuple[Tensor, PrincipalMixture] | None:
    """Splines and mixture by the likelihood of both, the best by the held-out rows; None if that is the start."""
    first = mixture_of(getattr(base, name).to(rows) for name in PARTS)
    diagonal = first.scale_tril.diagonal(dim1=-2, dim2=-1)
    full = first.components.shape[0] == first.components.shape[1]
    free = [knots, first.logits, first.means, first.scale_tril.tril(-1), diagonal.log()]
    free += [] if full else [first.residual_scale.log()]
    free = [part.detach().clone().requires_grad_() for part in free]

    def law() -> tuple[Tensor, PrincipalMixture]:
        tril = free[3].tril(-1) + torch.diag_embed(free[4].exp())
        across = first.residual_scale if full else free[5].exp()
        return free[0], mixture_of((first.loc, first.components, free[1], free[2], tril, across))

    optimizer = torch.optim.AdamW(free, lr=2e-3, weight_decay=0.0)  # weights here have no zero to decay to
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, most, since = None, _held_out(held, *law()), 0
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for batch in order[: max(1, len(rows) // _BATCH) * _BATCH].split(_BATCH):
            optimizer.zero_grad()
            (-log_density(rows[batch], *law()).mean()).backward()
            nn.utils.clip_grad_norm_(free, 5.0)
            optimizer.step()
        schedule.step()
        since += 1
        if (now := _held_out(held, *law())) > most:
            best, most, since = [part.detach().clone() for part in free], now, 0
        step()
        if since == _PATIENCE:
            break
    if best is None:
        return None
    for part, found in zip(free, best, strict=True):
        part.data = found
    with torch.no_grad():
        return law()
