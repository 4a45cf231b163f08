"""Why a model is refused: the nearest candidates, and what its output looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from penult.head._certificate import HeadNotFoundError
from penult.head._match import Match, relative_error
from penult.head._model import is_scripted
from penult.head._record import Candidate

__all__ = ["are_probabilities", "not_confirmed", "not_found", "refuse_other_tasks"]

_SIGMOID = (
    "For a sigmoid head with row w (d,) and bias c, use penult.Head(torch.stack([-w / 2, w / 2]), "
    "torch.stack([-c / 2, c / 2]))"
)


def refuse_other_tasks(model: nn.Module, logits: Tensor) -> None:
    """Raise where no softmax reads the logits: one logit a sample, or labels that do not exclude each other."""
    if logits.ndim == 0 or max(logits.shape[-1], logits.shape[1] if logits.ndim > 2 else 0) < 2:
        raise HeadNotFoundError(
            f"the model's output has shape {tuple(logits.shape)}: one logit a sample (a sigmoid or a regression) is "
            f"no softmax. {_SIGMOID}"
        )
    configs = (getattr(module, "config", None) for module in model.modules())
    problem = next((kind for config in configs if (kind := getattr(config, "problem_type", None))), None)
    if problem == "regression":
        raise HeadNotFoundError("the model's config says problem_type='regression': its outputs are no logits")
    if problem == "multi_label_classification":
        raise HeadNotFoundError(
            "the model's config says problem_type='multi_label_classification': its classes do not exclude each other, "
            f"so that each has a sigmoid of its own and no softmax is their posterior. {_SIGMOID}, one a class"
        )


def not_found(
    model: nn.Module,
    logits: Tensor,
    ranked: Sequence[Match],
    candidates: Mapping[int, Sequence[Candidate]],
    path: str | None,
    tolerance: float,
    squashed_by: str | None,
) -> HeadNotFoundError:
    """The error that names the three best candidates and the likely cause."""
    shape = tuple(logits.shape)
    best: dict[Candidate, Match] = {}
    for match in ranked:
        best.setdefault(match.candidate, match)
    if best:
        seen = "nearest: " + "; ".join(_describe(match) for match in list(best.values())[:3])
    else:
        made = ", ".join(f"{k} ({each[-1].path or 'the model itself'})" for k, each in list(candidates.items())[-6:])
        seen = f"no product has that number of classes; the numbers of rows seen: {made or 'none'}"
    subject = "no linear map of one activation" if path is None else f"nothing computed in {path!r}"
    scripted = [name for name, module in model.named_modules() if is_scripted(module)]
    unseen = f" What {scripted[0]!r} computes is TorchScript and cannot be watched." if scripted else ""
    return HeadNotFoundError(
        f"{subject} reproduces the logits of shape {shape} within tolerance {tolerance:g} ({seen}). "
        f"{_cause(logits, list(best.values()), squashed_by)}{unseen} "
        "If W and b are known, build penult.Head(weight, bias) from them"
    )


def not_confirmed(match: Match, residual: float | None, tolerance: float) -> HeadNotFoundError:
    """The error for a head that the second batch speaks against."""
    what = _describe(match)
    if residual is None:
        return HeadNotFoundError(
            f"{what} reproduces the logits only with a fitted scale or shift, which takes a second batch to confirm, "
            "and the batch given, reversed, shows the model nothing new: give several different samples"
        )
    return HeadNotFoundError(
        f"{what} reproduces the logits of this batch but not those of a second one (residual {residual:.2g}, tolerance "
        f"{tolerance:g}): what the model does after it depends on its input"
    )


def _describe(match: Match) -> str:
    product, extra = match.candidate.product, ""
    if match.layout.positions != "same":
        extra += f", positions {match.layout.positions}"
    if match.scale != 1:
        extra += f", scale {match.scale:.4g}"
    if match.shift is not None:
        extra += ", shifted"
    where = match.candidate.path or "(the model itself)"
    classes, features = product.weight.shape
    return f"{where} ({product.kind} {features}->{classes}{extra}) residual {match.residual:.2g}"


def are_probabilities(output: Tensor) -> bool:
    """Whether no value is negative, and all sum to 1 over the classes."""
    z = output.float()
    sums = [z.sum(axis) for axis in ({-1, 1} if z.ndim > 2 else {-1})]
    return bool((z >= 0).all()) and any(bool(((s - 1).abs() <= 1e-2).all()) for s in sums)


def _cause(logits: Tensor, best: Sequence[Match], squashed_by: str | None) -> str:
    """The most likely reason, by what was seen to run and by the look of the output."""
    z = logits.float()
    if z.ndim == 1:
        return "The output is one number a sample (a sigmoid or a regression), which is no softmax."
    if are_probabilities(z):
        return "The output is probabilities (a softmax inside the model): return the logits."
    if "sigmoid" in (squashed_by or "").lower() or bool(((z >= 0) & (z <= 1)).all()):
        return (
            "The output lies in 0..1 (a sigmoid inside the model, as for labels that do not exclude each other, which "
            "no softmax reads)."
        )
    if squashed_by is not None:
        return (
            f"After the last product the model applies {squashed_by} (a soft cap, an activation after the head): "
            "return what comes before it."
        )
    for match in best:
        values = _values(match)
        if values is not None and _monotone(values, logits.movedim(match.layout.class_axis, -1)):
            return (
                f"The output is a function of each value that {match.candidate.path or 'the model itself'} gives (a "
                "soft cap, a ReLU): return what comes before it."
            )
    for one, other in combinations(best, 2):
        a, b = _values(one), _values(other)
        if a is None or b is None or a.shape != b.shape:
            continue
        target = logits.movedim(one.layout.class_axis, -1)
        for factor, what in ((1.0, "sum"), (0.5, "mean")):
            if relative_error(factor * (a + b), target) <= 1e-4:
                return (
                    f"The output is the {what} of two products ({one.candidate.path!r} and {other.candidate.path!r}): "
                    "two heads, or a low-rank update beside one. Merge them into one layer."
                )
    if not best:
        return (
            "Typical causes: a head that is more than one matrix for each position (a convolution wider than one "
            "pixel), distances to prototypes, a quantised head."
        )
    return (
        "Typical causes: a scale that depends on the input, a soft cap or an activation after the head, several heads "
        "averaged, a quantised head."
    )


def _values(match: Match) -> Tensor | None:
    """What the candidate gave, classes last; None if its positions are not those of the logits."""
    product: Any = match.candidate.product
    if match.layout.positions != "same":
        return None
    return torch.nn.functional.linear(product.h, product.weight, product.bias)


def _monotone(values: Tensor, logits: Tensor) -> bool:
    """Whether larger values always have larger or equal logits, over at least a few different values."""
    if values.numel() != logits.numel():
        return False
    order = values.flatten().float().argsort()[:: max(1, values.numel() // 100_000)]
    z = logits.flatten().float()[order]
    slack = 1e-5 * float(z.abs().max())
    return len(order) >= 8 and bool((z.diff() >= -slack).all())
