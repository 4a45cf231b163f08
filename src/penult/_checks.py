"""What a head accepts, and what it says of the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult._row_blocks import blocks

__all__ = ["as_by_guessing", "check_bias", "check_finite", "check_labels", "check_positive", "check_weight"]


def as_by_guessing(right: float, count: int, classes: int) -> bool:
    """Whether a share of right answers among so many is no more than guessing gives, but for three standard errors."""
    guess = 1 / classes
    return right <= guess + 3 * math.sqrt(guess * (1 - guess) / count)


def check_labels(labels: Tensor, logits_shape: torch.Size, offset: int = 0) -> None:
    """Raise unless labels are integers, one for each row of logits (..., K), in 0..K-1.

    `offset` is added to the index that an error names.
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        what = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels are {what}; they must be a tensor of integer class indices")
    if labels.shape != logits_shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but the logits have shape {tuple(logits_shape)}: "
            f"labels must have shape {tuple(logits_shape[:-1])}, one class index for each row"
        )
    flat = labels.flatten()
    wrong = (flat < 0) | (flat >= logits_shape[-1])
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels[{offset + first}] is {int(flat[first])}, outside of 0..{logits_shape[-1] - 1} "
            f"({int(wrong.sum())} such labels); the head has {logits_shape[-1]} classes"
        )


def check_weight(weight: Tensor, empty_rows: bool = False) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {what}; a head needs a floating-point tensor (K, d)")
    if weight.ndim != 2 or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a head needs (K, d), one row a class")
    if weight.shape[0] == 1:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, one row (K = 1): a single-logit (sigmoid) head is no "
            "softmax head. The two-class head of the same sigmoid, for row w and bias c, is "
            "Head(torch.stack([-w / 2, w / 2]), torch.stack([-c / 2, c / 2]))"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a head needs at least two classes")
    check_finite("weight", weight)
    zero = torch.cat([~rows.any(dim=1) for rows in blocks(weight)]).nonzero().flatten().tolist()
    if zero and not (empty_rows and len(zero) < len(weight)):
        names = ", ".join(map(str, zero[:8])) + (f" and {len(zero) - 8} more" if len(zero) > 8 else "")
        raise ValueError(
            f"the rows of weight for class {names} are all zero: such classes were never trained (padding, "
            "say). Drop them from weight and bias"
        )


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias is a {type(bias).__name__}; give a tensor (K,) or None")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; for a weight of shape {tuple(weight.shape)} it must be "
            f"{tuple(weight.shape[:1])}"
        )
    if bias.dtype != weight.dtype or bias.device != weight.device:
        raise ValueError(
            f"bias is {bias.dtype} on {bias.device}, weight {weight.dtype} on {weight.device}: use bias.to(weight)"
        )
    check_finite("bias", bias)


def check_finite(name: str, tensor: Tensor) -> None:
    count, first, start = 0, [0], 0
    for block in blocks(tensor):
        wrong = (~block.isfinite()).nonzero()
        if len(wrong) and not count:
            first = [start + int(wrong[0, 0]), *wrong[0, 1:].tolist()]
        count += len(wrong)
        start += len(block)
    if count:
        raise ValueError(f"{name} holds {count} values that are NaN or infinite, the first at index {first}")


def check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; it must be positive and finite")
