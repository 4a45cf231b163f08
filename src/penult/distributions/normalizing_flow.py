"""A normalizing flow for activations: one spline for each coordinate over a Gaussian mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from penult.distributions._rows import Rows
from penult.distributions.principal_mixture import PrincipalMixture
from penult.special import traced, working_dtype

__all__ = ["NormalizingFlow"]

Progress = Callable[[int, int], None]

_BOUND = 5.0  # standard deviations within which the splines bend; beyond, they are the identity
_SLOPE = 1e-3  # the least of a spline, and the inverse of the greatest
_ELEMENTS = 1 << 18  # of values handled at a time; a spline makes some tens of numbers of each
_KEPT = 1 << 24  # elements of the random sample that fit keeps for all but expectation maximisation
_HELD = 4096  # rows held out to stop by, at most, and one in ten
_FEWEST = 100  # rows that splines are fitted to; with fewer, they stay the identity
_COLUMNS = 256  # splines fitted at a time
_BATCH = 256
_PATIENCE = 10  # passes without a gain that end the last step
_START = ("loc", "components", "logits", "means", "scale_tril", "residual_scale")  # of the mixture


class NormalizingFlow(nn.Module):
    r"""A spline flow over a Gaussian mixture, optionally rectified: a law of activations with a density.

    .. math:: x_i = a_i + s_i\,T_i^{-1}(z_i),\qquad z \sim \text{PrincipalMixture},

    with a monotone rational-quadratic spline T_i for each coordinate, and :math:`h = \max(x, 0)` in place of x when
    ``rectified``. The splines take the skewness and the edges of single coordinates, the mixture the clusters and
    the correlations. It has the interface of a `PrincipalMixture` and is a module: it moves, and its state is
    tensors of floats. All of them are buffers.

    Flows of more layers over a normal base (masked autoregressive, coupling) reach the same likelihood, but put mass
    between the clusters, where a two-sample test finds it.

    It needs zuko: ``pip install "penult[flow]"``.

    References:
        Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows", 2019.

    Args:
        loc: Centres a (d,).
        scale: Scales s > 0 (d,).
        knots: Widths, heights and slopes of the splines, unconstrained, (d, 3·bins − 1); zeros are the identity.
        base: The law of z.
        rectified: Whether negative coordinates are set to zero.

    Raises:
        ImportError: If zuko is not installed.
        TypeError: If ``base`` is no `PrincipalMixture`, or the dtypes differ.
        ValueError: If shapes do not agree, the base is rectified, or a value is out of range or not finite.

    Example:
        >>> rows = torch.cat([torch.randn(300, 4), torch.randn(300, 4) + 5.0]).exp()
        >>> p = NormalizingFlow.fit(rows, components=2, iterations=50, epochs=2)
        >>> p
        NormalizingFlow(2 components in 4 of 4 dimensions, 8 bins, 151 floats)
        >>> p.sample((3,), generator=torch.Generator().manual_seed(0)).shape, p.log_prob(rows).shape
        (torch.Size([3, 4]), torch.Size([600]))
    """

    loc: Tensor
    scale: Tensor
    knots: Tensor
    base_components: Tensor
    base_logits: Tensor

    def __init__(
        self, loc: Tensor, scale: Tensor, knots: Tensor, base: PrincipalMixture, rectified: bool = False
    ) -> None:
        super().__init__()
        _zuko()  # here, rather than at the first draw
        if not isinstance(base, PrincipalMixture):
            raise TypeError(f"base must be a PrincipalMixture, got {type(base).__name__}")
        given = {"loc": loc, "scale": scale, "knots": knots}
        for name, value in given.items():
            if not isinstance(value, Tensor) or value.dtype != base.loc.dtype:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a tensor of the base's dtype {base.loc.dtype}, got {kind}")
        d = base.event_shape[0]
        if loc.shape != (d,) or scale.shape != (d,) or knots.dim() != 2 or len(knots) != d or knots.shape[1] % 3 != 2:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
            raise ValueError(
                f"the shapes do not agree: {shapes}; expected loc ({d},), scale ({d},), knots ({d}, 3 bins - 1)"
            )
        if not all(bool(value.isfinite().all()) for value in given.values()) or not bool((scale > 0).all()):
            raise ValueError("loc, scale and knots must be finite, and scale positive")
        if base.rectified or base.batch_shape:
            raise ValueError("base must be neither rectified nor expanded; pass rectified=True to the flow itself")
        self.rectified = bool(rectified)
        for name, value in given.items():
            self.register_buffer(name, value.detach().clone())
        for name in _START:
            self.register_buffer(f"base_{name}", getattr(base, name).detach().clone())

    @classmethod
    def fit(
        cls,
        activations: Tensor | Iterable[Tensor],
        components: int = 12,
        dims: int | None = 64,
        rectified: bool = False,
        seed: int = 0,
        bins: int = 8,
        iterations: int = 300,
        epochs: int = 40,
        progress: Progress | None = None,
    ) -> NormalizingFlow:
        """Fit to activations, without labels.

        Three steps: each spline by the likelihood of its coordinate under a standard normal; the mixture by
        `PrincipalMixture.fit` in the coordinates that they give, and in those of no splines; then the better of the
        two by the likelihood of splines and mixture together (AdamW, a cosine schedule, clipped gradients). One row
        in ten, at most 4096, is held out, and chooses at each step; if the last gains nothing, the mixture is fitted
        again to all rows. With fewer than 100 rows there is nothing to choose by, and the splines are the identity.

        Expectation maximisation passes over all activations, so that they need not fit in memory; the other steps
        use a random sample of at most 2²⁴ numbers, kept in memory. The fit is by likelihood: where rows hold exact
        zeros, as after a ReLU, fit the rows before it with ``rectified``.

        Args:
            activations: Rows (N, d), or something that can be iterated more than once and gives rows (n, d). For a
                rectified law these are the rows *before* the rectification, the pre-activations.
            components: How many components of the mixture, at most.
            dims: How many principal components of the splines' coordinates the mixture has its own covariances in,
                at most; None for all. Fewer than d leave an isotropic residual across them.
            rectified: Whether the law is rectified; the fit is the same.
            seed: Seed of the sample, the start and the order of rows. The global random state is not touched.
            bins: Of each spline.
            iterations: Steps of the splines; 0 leaves them the identity.
            epochs: Passes of the last step over the sample; 0 leaves it out.
            progress: Called with the steps done and their number, after each.

        Returns:
            A flow of the dtype of the rows, at least float32, on their device.

        Raises:
            ImportError: If zuko is not installed.
            TypeError: If ``activations`` gives no floating tensors, or can be iterated only once.
            ValueError: If a shape is wrong, rows hold NaN or infinity, all rows are equal, there are fewer than two,
                passes differ in their number of rows, or a number is out of range.
        """
        _zuko()
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
            law = _mixture(getattr(base, name).to(some) for name in _START)
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

        law = _mixture(cast(getattr(base, name)) for name in _START)
        return cls(cast(loc), cast(scale), cast(knots), law, rectified)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NormalizingFlow:
        """The flow whose :meth:`config` and ``state_dict`` these are.

        Raises:
            ValueError: If they belong to no flow, or not to each other.
        """
        wanted = {"loc", "scale", "knots", *(f"base_{name}" for name in _START)}
        if set(tensors) != wanted or not isinstance(config.get("rectified"), bool):
            raise ValueError(
                f"not the state of a NormalizingFlow: it has {', '.join(sorted(wanted))} and config 'rectified', "
                f"got {', '.join(sorted(tensors)) or 'no tensors'} and config {dict(config)!r}"
            )
        base = _mixture((tensors[f"base_{name}"] for name in _START), validate_args=True)
        new = cls(tensors["loc"], tensors["scale"], tensors["knots"], base, config["rectified"])
        if new.config() != dict(config):
            raise ValueError(f"config {dict(config)!r} and tensors do not belong together; these make {new.config()!r}")
        return new

    def config(self) -> dict[str, Any]:
        """What makes this flow again, with its ``state_dict``, by :meth:`from_config`; for JSON."""
        (m, d), c = self.base_components.shape, len(self.base_logits)
        spline = {"bins": self._bins, "bound": _BOUND, "slope": _SLOPE}
        return {"features": d, "components": c, "dims": m, **spline, "rectified": self.rectified}

    @property
    def base(self) -> PrincipalMixture:
        """The law of z; it shares the buffers."""
        return _mixture(getattr(self, f"base_{name}") for name in _START)

    @property
    def batch_shape(self) -> Size:
        """Always empty."""
        return Size()

    @property
    def event_shape(self) -> Size:
        """(d,)."""
        return self.loc.shape

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors, or the nonnegative orthant when rectified."""
        if self.rectified:
            return constraints.independent(constraints.nonnegative, 1)
        return constraints.real_vector

    @property
    def has_density(self) -> bool:
        """Whether there is a density with respect to Lebesgue measure, so that :meth:`log_prob` works."""
        return not self.rectified and self.base.has_density

    @property
    def num_parameters(self) -> int:
        """How many floats the law takes, with triangles counted as triangles."""
        return self.loc.numel() + self.scale.numel() + self.knots.numel() + self.base.num_parameters

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at (*S, d), shape (*S); computed in at least float32.

        Raises:
            ValueError: If there is no density (see :attr:`has_density`), or values are of a wrong shape or not
                finite.
        """
        if not self.has_density:
            why = (
                "a rectified law has atoms at zero; the density of the pre-activations is that of the same "
                "parameters with rectified=False"
                if self.rectified
                else "it was fitted to rows that lie in a plane"
            )
            raise ValueError(f"this NormalizingFlow has no density, and so no log_prob: {why}")
        d = len(self.loc)
        if value.dim() < 1 or value.shape[-1] != d:
            raise ValueError(f"value has shape {tuple(value.shape)}; expected (..., {d})")
        if not traced(value) and not bool(value.isfinite().all()):
            raise ValueError("value holds NaN or infinity")
        dtype = torch.promote_types(torch.promote_types(value.dtype, self.loc.dtype), torch.float32)
        loc, scale, knots, base = self._cast(dtype)
        parts = []
        for rows in value.to(dtype).reshape(-1, d).split(max(1, _ELEMENTS // d)):
            parts.append(_log_density((rows - loc) / scale, knots, base))
        density = torch.cat(parts) - scale.log().sum()
        return density.reshape(value.shape[:-1]).to(torch.promote_types(value.dtype, self.loc.dtype))

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw activations of shape (*sample_shape, d), from ``generator`` or torch's default."""
        shape, d = Size(sample_shape), len(self.loc)
        _, _, _, base = self._cast(torch.promote_types(self.loc.dtype, torch.float32))
        z = base.sample((shape.numel(),), generator=generator)
        # the inverse is a root of a quadratic, whose discriminant single precision can make negative
        loc, scale, knots, _ = self._cast(working_dtype(self.loc.device))
        inverse = _splines(knots).inv
        parts = [loc + scale * inverse(rows.to(loc)) for rows in z.split(max(1, _ELEMENTS // d))]
        x = torch.cat(parts).to(self.loc.dtype)
        return (x.clamp_(min=0) if self.rectified else x).reshape(shape + self.event_shape)

    def extra_repr(self) -> str:  # noqa: D102
        (m, d), c = self.base_components.shape, len(self.base_logits)
        size = f"{self.num_parameters:,}".replace(",", " ")
        return (
            f"{c} component{'s' * (c != 1)} in {m} of {d} dimensions, {self._bins} bins, {size} floats"
            f"{', rectified' * self.rectified}"
        )

    @property
    def _bins(self) -> int:
        return (self.knots.shape[1] + 1) // 3

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, PrincipalMixture]:
        law = _mixture(getattr(self, f"base_{name}").to(dtype) for name in _START)
        return self.loc.to(dtype), self.scale.to(dtype), self.knots.to(dtype), law


class _Warped:
    """Rows in the coordinates of the splines, without those held out; again at each iteration."""

    def __init__(self, rows: Rows, loc: Tensor, scale: Tensor, knots: Tensor, held: Tensor | None) -> None:
        self._rows, self._loc, self._scale, self._held = rows, loc, scale, held
        self._splines = _splines(knots)
        self._dtype = torch.promote_types(rows.dtype, torch.float32)

    def __iter__(self) -> Iterator[Tensor]:
        begin = 0
        for rows in self._rows:
            for some in rows.split(max(1, _ELEMENTS // len(self._loc))):
                begin, last = begin + len(some), begin
                if self._held is not None:
                    some = some[~self._held[last:begin].to(some.device)]
                # float32 at least, and not float64: what is rounding is judged by the dtype
                yield self._splines((some - self._loc) / self._scale).to(self._dtype)


def _zuko() -> Any:
    try:
        from zuko import transforms  # not by importlib, which torch.compile does not trace
    except ImportError as error:
        raise ImportError('a NormalizingFlow needs zuko: pip install "penult[flow]"', name=error.name) from error
    return transforms


def _mixture(parts: Iterable[Tensor], validate_args: bool = False) -> PrincipalMixture:
    loc, components, logits, means, scale_tril, residual_scale = parts
    return PrincipalMixture(loc, components, logits, means, scale_tril, residual_scale, validate_args=validate_args)


def _splines(knots: Tensor) -> Any:
    bins = (knots.shape[-1] + 1) // 3
    widths, heights, slopes = knots.split([bins, bins, bins - 1], -1)
    # bound and slope are part of what the numbers mean, so they don't follow zuko's defaults
    return _zuko().MonotonicRQSTransform(widths, heights, slopes, bound=_BOUND, slope=_SLOPE)


def _log_density(rows: Tensor, knots: Tensor, base: PrincipalMixture) -> Tensor:
    z, slope = _splines(knots).call_and_ladj(rows)
    density: Tensor = base.log_prob(z) + slope.sum(-1)
    return density


@torch.no_grad()
def _held_out(rows: Tensor, knots: Tensor, base: PrincipalMixture) -> float:
    parts = [_log_density(some, knots, base) for some in rows.split(max(1, _ELEMENTS // rows.shape[1]))]
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
    z, slope = _splines(knots).call_and_ladj(rows)
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
    first = _mixture(getattr(base, name).to(rows) for name in _START)
    diagonal = first.scale_tril.diagonal(dim1=-2, dim2=-1)
    full = first.components.shape[0] == first.components.shape[1]
    free = [knots, first.logits, first.means, first.scale_tril.tril(-1), diagonal.log()]
    free += [] if full else [first.residual_scale.log()]
    free = [part.detach().clone().requires_grad_() for part in free]

    def law() -> tuple[Tensor, PrincipalMixture]:
        tril = free[3].tril(-1) + torch.diag_embed(free[4].exp())
        across = first.residual_scale if full else free[5].exp()
        return free[0], _mixture((first.loc, first.components, free[1], free[2], tril, across))

    optimizer = torch.optim.AdamW(free, lr=2e-3, weight_decay=0.0)  # weights here have no zero to decay to
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, most, since = None, _held_out(held, *law()), 0
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for batch in order[: max(1, len(rows) // _BATCH) * _BATCH].split(_BATCH):
            optimizer.zero_grad()
            (-_log_density(rows[batch], *law()).mean()).backward()
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
