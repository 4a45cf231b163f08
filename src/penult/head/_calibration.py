"""Temperature scaling by maximum likelihood of held-out labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult._row_blocks import rows_in_double

__all__ = ["best_inverse_temperature"]


def best_inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return 1/T in [0.01, 100] at the minimum of the convex mean negative log-likelihood, see `Head.calibrate`."""
    size = max(1, 2**22 // logits.shape[1])

    def derivatives(beta: float) -> tuple[float, float]:
        """Return the first and second derivative of the negative log-likelihood in beta = 1/T."""
        slope = curvature = 0.0
        for part, label in zip(rows_in_double(logits, size), labels.split(size), strict=True):
            probabilities = torch.softmax(beta * part, dim=1)
            mean = (probabilities * part).sum(1, keepdim=True)
            slope += float((mean - part.gather(1, label.to(part.device)[:, None])).sum())
            curvature += float((probabilities * (part - mean).square()).sum())
        return slope, curvature

    low, high = 0.01, 100.0
    if derivatives(high)[0] <= 0:
        right = (logits.argmax(1) == labels).float().mean().item()
        raise ValueError(
            f"the likelihood of the {len(labels)} held-out labels still grows at T = 0.01, so no temperature "
            f"fits them: {right:.1%} are predicted right, with large margins. Give more held-out data (not data that "
            "the model was trained on)"
        )
    if derivatives(low)[0] >= 0:
        raise ValueError(
            f"the likelihood of the {len(labels)} held-out labels still grows at T = 100: the logits say nothing about "
            "these labels. Check that labels and logits are in the same order"
        )
    beta, step = 1.0, high
    for _ in range(200):
        slope, curvature = derivatives(beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        newton = -slope / curvature if curvature > 0 else math.inf
        # Newton's steps may leave the bracket or shrink in the flat tail; bisection of log T is then faster.
        if low < beta + newton < high and abs(newton) <= abs(step) / 2:
            step = newton
        else:
            step = math.sqrt(low * high) - beta
        beta += step
        if abs(step) <= 1e-12 * beta:
            break
    return beta
