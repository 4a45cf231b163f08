"""Temperature scaling by maximum likelihood of held-out labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from penult._checks import as_activations, check_finite, integer_labels
from penult._row_blocks import rows_in_double

__all__ = ["calibration"]


def calibration(logits: Tensor, labels: Tensor, num_classes: int, biases: bool) -> tuple[float, Tensor | None]:
    """Return the temperature and the class biases (K,), or None without them; arguments as of `Head.calibrate`."""
    logits = as_activations(logits, "logits", f"(N, {num_classes})")
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
    size = max(1, 2**22 // logits.shape[1])
    blocks = [part.cpu() for part in rows_in_double(logits, size)]
    targets = labels.cpu().split(size)
    # One vector of parameters: 1/T first, then the biases.
    parameters = torch.cat(
        [torch.tensor([beta], dtype=torch.float64, device="cpu"), torch.zeros(logits.shape[1], device="cpu").double()]
    )

    def scores(part: Tensor, direction: Tensor) -> Tensor:
        return direction[0] * part + direction[1:]

    def derivatives(at: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the objective, its gradient, and the diagonal of its second derivative."""
        value = float(at[1:].square().sum() / 2)
        gradient, diagonal = at.clone(), torch.ones_like(at)
        gradient[0] = diagonal[0] = 0
        for part, label in zip(blocks, targets, strict=True):
            log_probabilities = scores(part, at).log_softmax(1)
            value -= float(log_probabilities.gather(1, label[:, None]).sum())
            probabilities = log_probabilities.exp()
            mean = (probabilities * part).sum(1, keepdim=True)
            gradient[0] += (mean - part.gather(1, label[:, None])).sum()
            gradient[1:] += probabilities.sum(0) - label.bincount(minlength=part.shape[1])
            diagonal[0] += (probabilities * (part - mean).square()).sum()
            diagonal[1:] += (probabilities * (1 - probabilities)).sum(0)
        return value, gradient, diagonal

    def curvature_along(at: Tensor, direction: Tensor) -> Tensor:
        """Return the product of the second derivative with a direction."""
        product = direction.clone()
        product[0] = 0
        for part in blocks:
            probabilities = scores(part, at).softmax(1)
            change = scores(part, direction)
            change = probabilities * (change - (probabilities * change).sum(1, keepdim=True))
            product[0] += (change * part).sum()
            product[1:] += change.sum(0)
        return product

    value, gradient, diagonal = derivatives(parameters)
    for _ in range(100):
        step = _conjugate_gradients(partial(curvature_along, parameters), -gradient, diagonal)
        slope = float(step @ gradient)
        # A Newton step changes the objective by half of the slope: below this bound that is rounding.
        if -slope <= 1e-11 * max(1.0, value):
            break
        share = 1.0
        while (trial := derivatives(parameters + share * step))[0] > value + 1e-4 * share * slope and share > 1e-3:
            share /= 2
        parameters = parameters + share * step
        value, gradient, diagonal = trial
    inverse_temperature = float(parameters[0])
    if not 0.01 <= inverse_temperature <= 100:
        raise ValueError(
            f"1/T with class biases is {inverse_temperature:.4g}; expected 0.01 to 100. Give more held-out data, or "
            "calibrate with biases=False"
        )
    return inverse_temperature, parameters[1:]


def _conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor, diagonal: Tensor) -> Tensor:
    """Solve H x = target for a positive definite H, given by its product with a vector and its diagonal."""
    solution, residual = torch.zeros_like(target), target.clone()
    scaled = residual / diagonal
    direction, energy = scaled, residual @ scaled
    first = float(energy)
    for _ in range(100):
        if float(energy) <= 1e-8 * first:
            break
        image = product(direction)
        length = energy / (direction @ image)
        solution = solution + length * direction
        residual = residual - length * image
        scaled = residual / diagonal
        following = residual @ scaled
        direction, energy = scaled + following / energy * direction, following
    return solution
