"""Comparison of products with a model's logits, through the maps between them that commute with W h + b."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penult.head._certificate import Positions
from penult.head._record import Candidate
from penult.special import in_double

__all__ = ["Layout", "Match", "axes_of", "class_axes", "is_log_softmax", "layouts", "matches", "relative_error"]

# --- Layouts: from the product that a model computes to the logits that it returns --------------------------


# Number of spatial axes and arguments of F.interpolate.
_RESIZED: dict[Positions, tuple[int, dict[str, Any]]] = {
    "linear": (1, {"mode": "linear", "align_corners": False}),
    "bilinear": (2, {"mode": "bilinear", "align_corners": False}),
    "bilinear aligned": (2, {"mode": "bilinear", "align_corners": True}),
    "nearest": (2, {"mode": "nearest"}),
    "bicubic": (2, {"mode": "bicubic", "align_corners": False}),
    "bicubic aligned": (2, {"mode": "bicubic", "align_corners": True}),
}


@dataclass(frozen=True)
class Layout:
    """How positions of a product (..., K) become those of the logits (..., K), with classes last in both.

    These maps are linear in the values, are the same for every class, and do not change constants. So they commute
    with W h + b and can be applied to h instead.

    Attributes:
        class_axis: Axis of the classes in the model's own output.
        positions: As in `HeadCertificate`.
    """

    class_axis: int
    positions: Positions

    def apply(self, h: Tensor, product: Tensor, logits: Tensor) -> Tensor:
        """Map activations to the positions of the logits.

        Args:
            h: (*P, d), at the positions of the product.
            product: (*P, K).
            logits: (*S, K), classes last.

        Returns:
            (*S, d).

        Raises:
            RuntimeError: The model no longer returns one row of logits for each row of h.
        """
        shape = (*logits.shape[:-1], h.shape[-1])
        if self.positions in ("same", "pieces", "pieces along axis 1"):
            if h.shape[:-1].numel() != logits.shape[:-1].numel():
                raise RuntimeError(
                    f"the head gives {tuple(h.shape[:-1])} rows of logits and the model returns "
                    f"{tuple(logits.shape[:-1])}; the numbers were equal for the batch that the head was found with: "
                    "find the head again with a batch like this one"
                )
            return h.reshape(shape)
        if self.positions == "swapped":
            return h.transpose(0, 1)
        if self.positions == "mean":
            start = 1 if logits.ndim == h.ndim else logits.ndim - 1
            return h.flatten(start, -2).mean(-2).reshape(shape)
        if self.positions == "picked":
            start = logits.ndim - 1
            rows, h = product.flatten(start, -2), h.flatten(start, -2)
            nearest = (rows - logits.unsqueeze(-2)).abs().amax(-1).argmin(-1)
            return h.gather(-2, nearest[..., None, None].expand(*nearest.shape, 1, h.shape[-1])).squeeze(-2)
        options = _RESIZED[self.positions][1]
        return F.interpolate(h.movedim(-1, 1), size=logits.shape[1:-1], **options).movedim(1, -1)


def class_axes(logits: Tensor, classes: int) -> Iterator[int]:
    """Yield the axes of a model's output that may be the classes: the last one, or the one after the batch."""
    if logits.ndim and logits.shape[-1] == classes:
        yield -1
    if logits.ndim > 2 and logits.shape[1] == classes:
        yield 1


def layouts(
    product: torch.Size, logits: torch.Size, class_axis: int, pieces: Positions | None = None
) -> Iterator[Layout]:
    """Yield the layouts that are possible for shapes (*P, K) and (*S, K); `pieces` if rows were joined already."""
    p, s = product[:-1], logits[:-1]
    if pieces is not None:
        if p == s:
            yield Layout(class_axis, pieces)
        return
    # Positions may be flattened or not, but with equally many axes, a reshape would mix up positions.
    if p == s or (p.numel() == s.numel() and len(p) != len(s)):
        yield Layout(class_axis, "same")
    if len(p) >= 2 and s == (p[1], p[0], *p[2:]):
        yield Layout(class_axis, "swapped")
    if p == s or p.numel() == s.numel():
        return
    pooled = len(s) < len(p) and p[: len(s)] == s
    squashed = len(s) == len(p) and s[:1] == p[:1] and s[1:].numel() == 1
    if pooled or squashed:
        yield Layout(class_axis, "mean")
    if pooled:
        yield Layout(class_axis, "picked")
    if class_axis == 1 and len(p) == len(s) and p[0] == s[0] and not squashed:
        yield from (Layout(class_axis, name) for name, (axes, _) in _RESIZED.items() if axes == len(p) - 1)


_SPATIAL: dict[int, tuple[str, ...]] = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def axes_of(ndim: int, class_axis: int, positions: Positions) -> tuple[str, ...]:
    """Return the names of all axes but the last of h (..., d) and of logits (..., K)."""
    if positions == "swapped":
        first, second, *others = axes_of(ndim, class_axis, "same")
        return (second, first, *others)
    spatial = ndim - 2
    if spatial < 0:
        return ()
    if spatial == 1 and class_axis == -1:
        return ("batch", "token")
    return ("batch", *_SPATIAL.get(spatial, tuple(f"axis {i}" for i in range(1, spatial + 1))))


# --- Matches of products with the logits ---------------------------------------------------------------------

# Number of rows that a scale and a shift are fitted to, at most.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Match:
    """One reading of the logits as scale * (W h + b) + shift.

    Attributes:
        candidate: The product.
        layout: How its positions and classes became those of the logits.
        scale: A number.
        shift: (K,), or None.
        log_softmax: Whether a log-softmax follows.
        residual: See `relative_error`.
    """

    candidate: Candidate
    layout: Layout
    scale: float
    shift: Tensor | None
    log_softmax: bool
    residual: float

    @property
    def fitted(self) -> bool:
        """Whether a scale or shift was fitted, which a second batch has to confirm."""
        return self.scale != 1 or self.shift is not None


def matches(candidate: Candidate, logits: Tensor, *, fit: bool) -> Iterator[Match]:
    """Yield the matches of one product with a model's output, with or without a fitted scale and shift."""
    product = candidate.product
    if not (product.weight.is_floating_point() and product.h.is_floating_point()) or product.weight.shape[0] < 2:
        return
    for axis in class_axes(logits, product.weight.shape[0]):
        target = logits.movedim(axis, -1)
        shape = torch.Size((*product.h.shape[:-1], target.shape[-1]))
        possible_layouts = list(layouts(shape, target.shape, axis, candidate.pieces))
        if not possible_layouts:
            continue
        log_softmax = is_log_softmax(target)
        for layout in possible_layouts:
            step = math.ceil(target.shape[:-1].numel() / _ROWS)
            # Large maps are compared in some rows first, and in all rows only if those match.
            if layout.positions == "same" and step > 1:
                h, part = (x.reshape(-1, x.shape[-1])[::step] for x in (product.h, target))
                first = list(_matches_in_layout(candidate, layout, h, part, log_softmax, fit))
                if min(match.residual for match in first) > 1e-2:
                    yield from first
                    continue
            yield from _matches_in_layout(candidate, layout, product.h, target, log_softmax, fit)


def _matches_in_layout(
    candidate: Candidate, layout: Layout, h: Tensor, logits: Tensor, log_softmax: bool, fit: bool
) -> Iterator[Match]:
    """Yield the matches in one layout: for each fitted scale and shift, with and without a log-softmax."""
    values = candidate.values(h)
    wide = torch.promote_types(logits.dtype, torch.float32)
    aligned, target = layout.apply(values, values, logits).to(wide), logits.to(wide)
    for after in (False, True) if log_softmax else (False,):
        for scale, shift in _fit_scale_and_shift(aligned, target, centred=after) if fit else [(1.0, None)]:
            guess = aligned * scale
            guess = guess if shift is None else guess + shift
            guess = guess.log_softmax(-1) if after else guess
            residual = relative_error(guess, target, shift=None if after else shift, eps=candidate.eps)
            yield Match(candidate, layout, scale, shift, after, residual)


def relative_error(guess: Tensor, logits: Tensor, *, shift: Tensor | None = None, eps: float = 0.0) -> float:
    """Return the largest absolute error divided by the largest absolute logit; inf for NaN.

    A fresh network may have logits of any small size, next to which the error of a wrong product is just as large. The
    error of classes that a model masks with a huge number, the same for all samples, is computed separately. Otherwise
    these classes would hide the error of the others.

    Args:
        guess: (*S, K).
        logits: (*S, K).
        shift: (K,), fitted numbers within the guess. The error is then relative to the largest logit without them,
            because a shift makes any product match logits that hardly differ between samples.
        eps: Rounding of the logits, which limits what can be seen without the shift.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    z, y = (x.to(wide).reshape(-1, x.shape[-1]) for x in (logits, guess))
    error = (y - z).abs()
    if bool(error.isnan().any()):
        return math.inf
    size, worst = z.abs().amax(0), error.amax(0)
    masked = (z == z[0]).all(0) & (size > 1e4)
    if shift is not None:
        size = torch.maximum((z - shift).abs().amax(0), min(1.0, 2**16 * eps) * size)
    parts = [(float(worst[rows].max()), float(size[rows].max())) for rows in (masked, ~masked) if bool(rows.any())]
    # Logits that are zero have no relative error, and only zeros match them.
    tiny = torch.finfo(wide).tiny
    return max(math.inf if s < tiny < e else e / max(s, tiny) for e, s in parts)


def is_log_softmax(logits: Tensor) -> bool:
    """Whether all rows of logits (..., K) are log-probabilities."""
    slack = max(1e-4, 8 * torch.finfo(logits.dtype).eps)
    return bool((logits.logsumexp(-1).abs() <= slack).all())


def _fit_scale_and_shift(values: Tensor, logits: Tensor, *, centred: bool) -> Iterator[tuple[float, Tensor | None]]:
    """Fit logits = scale * values + shift by least squares, with a shift only, a scale only, and both."""
    p, z = (x.reshape(-1, x.shape[-1]) for x in (values, logits))
    step = math.ceil(len(p) / _ROWS)
    p, z = in_double(p[::step]), in_double(z[::step])
    # A log-softmax removes any constant that all classes share.
    if centred:
        p, z = p - p.mean(-1, keepdim=True), z - z.mean(-1, keepdim=True)
    p_mean, z_mean = p.mean(0), z.mean(0)
    yield 1.0, (z_mean - p_mean).to(values)
    energy = float(p.square().sum())
    if energy > 0 and (scale := float((p * z).sum()) / energy):
        yield scale, None
    energy = float((p - p_mean).square().sum())
    if energy > 0 and (scale := float(((p - p_mean) * (z - z_mean)).sum()) / energy):
        yield scale, (z_mean - scale * p_mean).to(values)
