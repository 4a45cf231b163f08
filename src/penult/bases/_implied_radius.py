"""The radius that a head implies on its own, from the confidence that its draws shall have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from penult import special
from penult._row_blocks import rows_in_double
from penult.distributions import _around, _cosine_complement
from penult.head import Head

__all__ = ["implied_radius", "unit"]

_CLASSES = 64  # looked at, at most
_DRAWS = 4096  # in all
_LOGITS = 1 << 23  # kept, about; a head of very many classes takes fewer draws, but four a class


def implied_radius(head: Head, subspace: Tensor | None, confidence: float) -> float:
    """The radius at which the mean over classes of E[max_k p(k|h)], h ~ p(h|y), equals a confidence.

    Args:
        head: The head.
        subspace: Orthonormal rows (m, d) that the sphere lies in, or None for all of R^d.
        confidence: Between 0 and 1.

    Returns:
        The radius, by bisection on common random numbers.

    Raises:
        ValueError: If the confidence cannot be reached, two rows of the head are equal, or their norms are no number
            of their precision.
    """
    if subspace is not None and not len(subspace):
        raise ValueError(
            f"the rows of the head differ by no more than the rounding of their {head.weight.dtype}, so that they span "
            "nothing; give the weight in float64, or a radius: Sphere(radius)"
        )
    with special.in_full(head.weight.device):
        rows = _directions(head)
        reached = _mean_confidence(head, rows, subspace)
    size = float(torch.linalg.vector_norm(rows, dim=-1).mean())
    if not 0 < size < math.inf:  # a scale of 0 would be doubled for ever
        raise ValueError(
            f"the centered rows of the head have a mean norm of {size} in {rows.dtype}, so no radius can be told from "
            "them; give the weight in float64, or a radius: Sphere(radius)"
        )
    scale = 1 / size
    low, high = 0.0, scale
    if reached(1e-6 * scale) >= confidence:
        raise ValueError(
            f"the biases alone already give a mean confidence of {reached(1e-6 * scale):.3f} >= {confidence}; "
            "ask for a higher confidence or fit the radius to activations with Sphere.fit"
        )
    while reached(high) < confidence:
        low, high = high, 2 * high
        if high > 1e6 * scale:
            raise ValueError(
                f"no radius reaches a mean confidence of {confidence}: at {high:.3g} it is {reached(high):.4f}; "
                "ask for less, or fit the radius to activations with Sphere.fit"
            )
    for _ in range(14):  # an octave to 1e-4, finer than the draws resolve
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reached(middle) < confidence else (low, middle)
    return 0.5 * (low + high)


def unit(vectors: Tensor) -> Tensor:
    """Directions of vectors (N, m); a zero vector tilts nothing, so any direction serves it."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    pole = torch.zeros_like(vectors)
    pole[:, 0] = 1.0
    return torch.where(norms > 0, vectors / norms, pole)


def _directions(head: Head) -> Tensor:
    """At most 64 centered rows (C, d) of a head, after a look at how they stand to the others."""
    _check_untied(head)
    k = head.num_classes
    classes = list(range(k)) if k <= _CLASSES else [round(i * (k - 1) / (_CLASSES - 1)) for i in range(_CLASSES)]
    rows = head.centered_weight(torch.tensor(classes, device=head.weight.device))
    best = rows.new_full((len(classes),), -torch.inf)
    winner = torch.zeros(len(classes), dtype=torch.long, device=rows.device)
    for part, block in head.centered_blocks():
        top, at = (rows @ block.T).max(-1)
        winner = torch.where(top > best, at + part.start, winner)
        best = torch.maximum(best, top)
    lost = [y for y, other in zip(classes, winner.tolist(), strict=True) if other != y]
    if lost:
        shown = ", ".join(map(str, lost[:8])) + (", ..." if len(lost) > 8 else "")
        warnings.warn(
            f"classes {shown} are not the largest in their own direction: another row of the head projects "
            "further onto theirs, so activations drawn for them are mostly classified as others",
            UserWarning,
            stacklevel=4,
        )
    return rows


def _check_untied(head: Head) -> None:
    """Refuse a head with two equal rows: they are neighbours in the order of a random projection."""
    probe = torch.rand(head.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = torch.cat([(rows * probe.to(rows.device)).sum(-1) for rows in rows_in_double(head.weight)])
    ordered, order = keys.sort()
    close = ordered.diff() <= 1e-9 * keys.abs().max()
    for i in close.nonzero().flatten().tolist():
        y, twin = sorted((int(order[i]), int(order[i + 1])))
        if torch.equal(head.weight[y], head.weight[twin]):
            raise ValueError(
                f"rows {y} and {twin} of the head are equal, so no radius can tell these classes apart; "
                "merge them into one class, or give a radius: Sphere(radius, subspace=head.span())"
            )


def _mean_confidence(head: Head, rows: Tensor, subspace: Tensor | None) -> Callable[[float], float]:
    """The function radius ↦ mean over classes of E[max_k p(k|h)], on common random numbers.

    An activation is h = r (t μ + √(1 − t²) ξ), with ξ at a right angle to μ: only its cosine t depends on the
    radius, so the logits of μ and ξ are computed once.
    """
    pulled = rows if subspace is None else rows @ subspace.T
    norms = torch.linalg.vector_norm(pulled, dim=-1)
    draws = max(4, min(_DRAWS, _LOGITS // head.num_classes) // len(rows))
    index = torch.arange(len(rows), device=rows.device).repeat_interleave(draws)
    mean = unit(pulled)
    generator = torch.Generator(device=rows.device)
    right_angle = torch.ones(len(index), dtype=special.working_dtype(rows.device), device=rows.device)
    across = _around(mean[index], right_angle, generator.manual_seed(0))
    if subspace is not None:
        mean, across = mean @ subspace, across @ subspace
    weight = head.weight
    along_logits = torch.nn.functional.linear(mean.to(weight.dtype), weight).to(rows.dtype)[index]
    across_logits = torch.nn.functional.linear(across.to(weight.dtype), weight).to(rows.dtype)
    bias = head.full_bias.to(rows.dtype)

    def reached(radius: float) -> float:
        y = _cosine_complement(
            pulled.shape[-1], radius * norms[index].to(right_angle.dtype), rows.dtype, generator.manual_seed(1)
        )
        t, sine = (1 - y).to(rows.dtype), (y * (2 - y)).clamp_min(0).sqrt().to(rows.dtype)
        logits = radius * (t.unsqueeze(-1) * along_logits + sine.unsqueeze(-1) * across_logits) + bias
        return float(logits.softmax(-1).amax(-1).to(right_angle.dtype).mean())

    return reached
