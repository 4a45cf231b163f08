"""Whether a product makes the logits: the few maps between the two that commute with W h + b."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penult.head._layout import Layout, class_axes, layouts
from penult.head._record import Candidate
from penult.special import in_double

__all__ = ["Match", "is_log_softmax", "matches", "relative_error"]

_ROWS = 4096  # that a scale and a shift are fitted to


@dataclass(frozen=True, eq=False)
class Match:
    """One reading of the logits as scale * (W h + b) + shift.

    Attributes:
        candidate: The product.
        layout: Where its positions and classes went.
        scale: A number.
        shift: (K,), or None.
        log_softmax: Whether a log-softmax follows.
        residual: max abs error / max(1, max abs(logits)).
    """

    candidate: Candidate
    layout: Layout
    scale: float
    shift: Tensor | None
    log_softmax: bool
    residual: float

    @property
    def fitted(self) -> bool:
        """Whether numbers were fitted, which a second batch has to confirm."""
        return self.scale != 1 or self.shift is not None


def matches(candidate: Candidate, logits: Tensor, *, fit: bool) -> Iterator[Match]:
    """The readings of a model's output through one product, with or without fitted scale and shift."""
    product = candidate.product
    if not (product.weight.is_floating_point() and product.h.is_floating_point()) or product.weight.shape[0] < 2:
        return
    for axis in class_axes(logits, product.weight.shape[0]):
        target = logits.movedim(axis, -1)
        shape = torch.Size((*product.h.shape[:-1], target.shape[-1]))
        found = list(layouts(shape, target.shape, axis))
        if not found:
            continue
        log_softmax = is_log_softmax(target)
        for layout in found:
            step = math.ceil(target.shape[:-1].numel() / _ROWS)
            if layout.positions == "same" and step > 1:  # large maps: some rows first, all if those fit
                h, part = (x.reshape(-1, x.shape[-1])[::step] for x in (product.h, target))
                first = list(_readings(candidate, layout, h, part, log_softmax, fit))
                if min(match.residual for match in first) > 1e-2:
                    yield from first
                    continue
            yield from _readings(candidate, layout, product.h, target, log_softmax, fit)


def _readings(
    candidate: Candidate, layout: Layout, h: Tensor, logits: Tensor, log_softmax: bool, fit: bool
) -> Iterator[Match]:
    values = F.linear(h, candidate.product.weight, candidate.product.bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    aligned, target = layout.apply(values, values, logits).to(wide), logits.to(wide)
    for after in (False, True) if log_softmax else (False,):
        for scale, shift in _fits(aligned, target, centred=after) if fit else [(1.0, None)]:
            guess = aligned * scale
            guess = guess if shift is None else guess + shift
            guess = guess.log_softmax(-1) if after else guess
            yield Match(candidate, layout, scale, shift, after, relative_error(guess, target))


def relative_error(guess: Tensor, logits: Tensor) -> float:
    """Largest absolute error over max(1, max abs(logits)); inf for NaN.

    Classes that a model masks with a huge negative number, the same for all samples, are judged by themselves: they
    would hide any error of the others.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    z, y = (x.to(wide).reshape(-1, x.shape[-1]) for x in (logits, guess))
    error = (y - z).abs()
    if bool(error.isnan().any()):
        return math.inf
    size, worst = z.abs().amax(0), error.amax(0)
    masked = (z == z[0]).all(0) & (size > 1e4)
    parts = [(worst[rows], size[rows]) for rows in (masked, ~masked) if bool(rows.any())]
    return max(float(e.max()) / max(1.0, float(s.max())) for e, s in parts)


def is_log_softmax(logits: Tensor) -> bool:
    """Whether every row of logits (..., K) is log-probabilities."""
    slack = max(1e-4, 8 * torch.finfo(logits.dtype).eps)
    return bool((logits.logsumexp(-1).abs() <= slack).all())


def _fits(values: Tensor, logits: Tensor, *, centred: bool) -> Iterator[tuple[float, Tensor | None]]:
    """Least squares of logits = scale * values + shift: a shift alone, a scale alone, both."""
    p, z = (each.reshape(-1, each.shape[-1]) for each in (values, logits))
    step = math.ceil(len(p) / _ROWS)
    p, z = in_double(p[::step]), in_double(z[::step])
    if centred:  # what is the same for all classes is gone
        p, z = p - p.mean(-1, keepdim=True), z - z.mean(-1, keepdim=True)
    p_mean, z_mean = p.mean(0), z.mean(0)
    yield 1.0, (z_mean - p_mean).to(values)
    energy = float(p.square().sum())
    if energy > 0 and (scale := float((p * z).sum()) / energy):
        yield scale, None
    energy = float((p - p_mean).square().sum())
    if energy > 0 and (scale := float(((p - p_mean) * (z - z_mean)).sum()) / energy):
        yield scale, (z_mean - scale * p_mean).to(values)
