"""Radius that a head implies without data, from the mean confidence of its samples."""

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

# Largest number of classes in the mean confidence, and number of samples of all classes together.
_CLASSES = 64
_SAMPLES = 4096
# About the number of logits in memory. Heads with many classes use fewer samples, but at least four for each class.
_LOGITS = 1 << 23


def implied_radius(head: Head, subspace: Tensor | None, confidence: float) -> float:
    """Return the radius at which the mean over classes of E[max_k p(k|h)], h ~ p(h|y), equals a confidence.

    Args:
        head: The head.
        subspace: Orthonormal rows (m, d) that the sphere lies in, or None for all of R^d.
        confidence: Between 0 and 1.

    Returns:
        The radius, by bisection on common random numbers.

    Raises:
        ValueError: The confidence cannot be reached, two rows of the head are equal, or their norms are 0 or not finite
            in their dtype.
    """
    if subspace is not None and not len(subspace):
        raise ValueError(
            f"the rows of the head differ by no more than the rounding of their {head.weight.dtype}, so that they span "
            "no subspace. Pass the weight in float64, or a radius: Sphere(radius)"
        )
    with special.in_full(head.weight.device):
        rows = _directions(head)
        reached = _mean_confidence(head, rows, subspace)
    size = float(torch.linalg.vector_norm(rows, dim=-1).mean())
    # The search below would never end with a scale of 0.
    if not 0 < size < math.inf:
        raise ValueError(
            f"the mean norm of the centered rows of the head is {size} in {rows.dtype}; expected a positive, finite "
            "number. Pass the weight in float64, or a radius: Sphere(radius)"
        )
    scale = 1 / size
    low, high = 0.0, scale
    if reached(1e-6 * scale) >= confidence:
        raise ValueError(
            f"confidence is {confidence}; expected more than {reached(1e-6 * scale):.3f}, the mean confidence of the "
            "biases alone. Pass a higher confidence, or fit the radius to activations with Sphere.fit"
        )
    while reached(high) < confidence:
        low, high = high, 2 * high
        if high > 1e6 * scale:
            raise ValueError(
                f"confidence is {confidence}, which no radius reaches: at {high:.3g} it is {reached(high):.4f}. "
                "Pass a lower confidence, or fit the radius to activations with Sphere.fit"
            )
    # An octave is halved to a relative accuracy of 1e-4, which is finer than the sampling error.
    for _ in range(14):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if reached(middle) < confidence else (low, middle)
    return 0.5 * (low + high)


def unit(vectors: Tensor) -> Tensor:
    """Return the directions of vectors (N, m); that of a zero vector is arbitrary, since its tilt is uniform."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    pole = torch.zeros_like(vectors)
    pole[:, 0] = 1.0
    return torch.where(norms > 0, vectors / norms, pole)


def _directions(head: Head) -> Tensor:
    """Return at most 64 evenly spaced centered rows (C, d) of a head.

    Warns of rows w for which another row v of the head has a larger product v·w than w·w itself.
    """
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
            f"classes {shown} are not the largest in their own direction: other rows of the head project further onto "
            "it, so that most activations sampled for these classes are classified as others",
            UserWarning,
            stacklevel=4,
        )
    return rows


def _check_untied(head: Head) -> None:
    """Raise if two rows of a head are equal. Equal rows are neighbours when sorted by a random projection."""
    probe = torch.rand(head.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device="cpu")
    keys = torch.cat([(rows * probe.to(rows.device)).sum(-1) for rows in rows_in_double(head.weight)])
    ordered, order = keys.sort()
    close = ordered.diff() <= 1e-9 * keys.abs().max()
    for i in close.nonzero().flatten().tolist():
        y, twin = sorted((int(order[i]), int(order[i + 1])))
        if torch.equal(head.weight[y], head.weight[twin]):
            raise ValueError(
                f"rows {y} and {twin} of the head are equal, so that no radius separates these classes. "
                "Merge them into one class, or pass a radius: Sphere(radius, subspace=head.span())"
            )


def _mean_confidence(head: Head, rows: Tensor, subspace: Tensor | None) -> Callable[[float], float]:
    """Return the function radius -> mean over classes of E[max_k p(k|h)], with common random numbers.

    An activation is h = r (t μ + √(1 − t²) ξ), with ξ at a right angle to μ: only its cosine t depends on the
    radius, so the logits of μ and ξ are computed once.
    """
    pulled = rows if subspace is None else rows @ subspace.T
    norms = torch.linalg.vector_norm(pulled, dim=-1)
    count = max(4, min(_SAMPLES, _LOGITS // head.num_classes) // len(rows))
    index = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
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
