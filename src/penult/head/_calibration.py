"""Temperature scaling by maximum likelihood of held-out labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from penult._checks import check_finite, integer_labels
from penult._row_blocks import rows_in_double

__all__ = ["calibration"]


def calibration(logits: Tensor, labels: Tensor, num_classes: int, biases: bool) -> tuple[float, Tensor | None]:
    """Return the temperature and the class biases (K,), or None without them; arguments as of `Head.calibrate`."""
    if logits.ndim != 2 or logits.shape[1] != num_classes or len(logits) == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected (N, {num_classes}) with N >= 1")
    labels = integer_labels(labels, logits.shape[:1], num_classes).to(logits.device)
    check_finite("logits", logits)
    beta = _best_inverse_temperature(logits.detach(), labels)
    if not biases:
        return 1 / beta, None
    beta, class_biases = _best_biases(logits.detach(), labels, beta)
    return 1 / beta, class_biases


def _best_inverse_temperature(logits: Tensor, labels: Tensor) -> float:
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


def _best_biases(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, Tensor]:
    """Return 1/T and class biases c (K,), float64, at the minimum of a penalised negative log-likelihood.

    The objective, convex in 1/T and c, is the sum over rows of −log softmax(logits / T + c)_label, plus ½‖c‖². The
    penalty is a standard normal prior: it fixes the common constant of c, keeps the bias of a class without rows at a
    finite value, and weighs as much as about one row.

    Args:
        logits: (N, K).
        labels: (N,), int64 on the same device.
        beta: 1/T to start from, see `_best_inverse_temperature`.

    Raises:
        ValueError: The best 1/T lies outside of [0.01, 100].
    """
    scale = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    size = max(1, 2**22 // logits.shape[1])
    optimizer = torch.optim.LBFGS(
        [scale, biases],
        max_iter=500,
        history_size=30,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = biases.square().sum() / (2 * len(logits))
        value.backward()
        total = value.detach()
        for part, label in zip(rows_in_double(logits, size), labels.split(size), strict=True):
            rows = scale * part.cpu() + biases
            block = F.cross_entropy(rows, label.cpu(), reduction="sum") / len(logits)
            block.backward()
            total += block.detach()
        return total

    with torch.enable_grad():
        optimizer.step(objective)
    inverse_temperature = float(scale.detach())
    if not 0.01 <= inverse_temperature <= 100:
        raise ValueError(
            f"the best temperature with class biases is {1 / inverse_temperature:.4g}; expected 0.01 to 100. Give more "
            "held-out data, or calibrate with biases=False"
        )
    return inverse_temperature, biases.detach()
